"""What chaos is done to, and how its runs are compared."""

from pathlib import Path

import numpy as np

from edit_ray.engine.latent_files import load_latents
from edit_ray.runs.folder import RunFolder

WINDOW = 2
CONTINUITY = {
    "history": "{mode: history, history_latents: 2}",
    "overlap": "{mode: overlap, history_latents: 2, overlap_source: latent}",
    "overlap-hybrid": "{mode: overlap, history_latents: 2}",
    "warm-start": "{mode: warm_start}",
    "none": "{mode: none}",
}
# Five steps of eight are computed anew in one segment of three, and the others' cache skips more of the rest. The host
# tier holds two of its eight residuals: [1, 5 * 4 * 4, 24] in float32 is two pages.
CONFIG = """
model: {{path: "{model}"}}
sampling: {{height: 64, width: 64, num_frames: 17, num_inference_steps: 8, seed: 3}}
video: {{num_segments: 6}}
prompt_segments: [{{start: 0s, prompt: a red circle}}, {{segment: 3, prompt: a blue square}}]
continuity: {continuity}
cache:
  {{policy: warmstart_reuse, inner: fbcache, rel_l1_thresh: 0.5, warm_steps: 2, reuse_window: {window}, granularity: 3}}
store: {{host_bytes: 16KiB, allow_tmpfs: true}}
engine: {{start_timeout_s: 60, cpu_threads: 1, segment_retries: 50}}
"""


def configuration(path, model, mode):
    path.write_text(CONFIG.format(model=model, continuity=CONTINUITY[mode], window=WINDOW))
    return path


def check_same(whole, hurt):
    """All latents and the bytes of the whole video."""
    one, two = (RunFolder(path.parent, path.name) for path in (whole, hurt))
    records = one.read_manifest().segments
    assert len(two.read_manifest().segments) == len(records)
    for index in range(len(records)):
        assert np.array_equal(load_latents(one.latents(index)), load_latents(two.latents(index))), f"latents {index}"
    assert one.final.read_bytes() == two.final.read_bytes(), "final.mp4"


def skipped_share(path: Path) -> float:
    """Of the units of an undisturbed run, those that were not computed."""
    records = RunFolder(path.parent, path.name).read_manifest().segments
    skipped, computed = (sum(r.statistics[f"units_{name}"] for r in records) for name in ("skipped", "computed"))
    return skipped / (skipped + computed)


def left_over(root: Path) -> list[Path]:
    """Residuals of runs that are done, drafts, probes."""
    return [
        *root.glob(".cache_store/*.safetensors"),
        *root.rglob(".*.part"),
        *root.glob(".probe-*"),
        *root.glob(".run-*"),
    ]
