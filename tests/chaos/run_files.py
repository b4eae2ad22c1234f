"""What chaos is done to, and what it must not leave."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan
from tests.chaos.undisturbed import compare

WINDOW = 2
GPU_ACTORS = min(2, os.cpu_count() or 1)  # Ray gives each a CPU
CONTINUITY = {
    "history": "{mode: history, history_latents: 2}",
    "overlap": "{mode: overlap, history_latents: 2, overlap_source: latent}",
    "overlap-hybrid": "{mode: overlap, history_latents: 2}",
    "warm-start": "{mode: warm_start}",
    "none": "{mode: none}",
    "image": "{{mode: image, picture_as: still, init: {pictures}/a.png}}",
    "svi": "{{mode: svi, init: {pictures}/a.png}}",
    "causal-recache": "{mode: causal, chunk_size: 1, chunks: 5}",
    "causal-commit": "{mode: causal, chunk_size: 1, chunks: 5, kv: commit}",
}
# Beside the second prompt: another picture, from which `image` begins anew and to which `svi` holds on, and an end.
PICTURES = ", image: {pictures}/b.png, last_image: {pictures}/c.png"
CAUSAL = {"chunk_size": 1, "window": 3, "sink": 1, "timesteps": [1000.0, 937.5, 833.3, 625.0]}
# Five steps of eight are computed anew in one segment of three, and the others' cache skips more of the rest. The host
# tier holds two of its eight residuals: [1, 5 * 4 * 4, 24] in float32 is two pages.
CONFIG = """
model: {{path: "{model}"}}
sampling: {{height: 64, width: 64, seed: 3{steps}}}
video: {{num_segments: 6}}
prompt_segments: [{{start: 0s, prompt: a red circle}}, {{segment: 3, prompt: a blue square{pictures}}}]
continuity: {continuity}
cache: {cache}
store: {{host_bytes: 16KiB, allow_tmpfs: true}}
engine: {{start_timeout_s: 60, cpu_threads: 1, gpu_actors: {gpu_actors}}}
"""
REUSE = (
    "{{policy: warmstart_reuse, inner: fbcache, rel_l1_thresh: 0.5, warm_steps: 2, reuse_window: {window},"
    " granularity: 3}}"
)


def save_models(root):
    """What runs are made with: a model that holds latents, one that sees pictures, a causal one, and pictures."""
    save_random_wan(root / "text", num_layers=6, expand_timesteps=True)
    save_random_wan(root / "svi", num_layers=6, layout="image")
    save_random_wan(root / "causal", num_layers=6, causal=CAUSAL)
    for seed, name in enumerate("abc"):
        noise = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{name}.png")
    return root


def configuration(path, models, mode):
    continuity, of_pictures, causal = CONTINUITY[mode], mode in ("image", "svi"), is_causal(mode)
    model = models / ("causal" if causal else "svi" if mode == "svi" else "text")
    changes = {
        "continuity": continuity.format(pictures=models) if of_pictures else continuity,
        "pictures": PICTURES.format(pictures=models) if of_pictures else "",
        "steps": "" if causal else ", num_frames: 17, num_inference_steps: 8",
        "cache": "{policy: none}" if causal else REUSE.format(window=WINDOW),
    }
    path.write_text(CONFIG.format(model=model, gpu_actors=GPU_ACTORS, **changes))
    return path


def is_causal(mode):
    """Whether a mode is a causal model's, whose runs reuse nothing between segments."""
    return mode.startswith("causal")


def check_same(whole: Path, hurt: Path) -> None:
    """Every file is as in the run to which nothing has happened; AssertionError names one that is not."""
    folder = RunFolder(hurt.parent, hurt.name)
    compare(folder, folder.read_manifest(), RunFolder(whole.parent, whole.name), None)


def skipped_share(path: Path) -> float:
    """Of the units of an undisturbed run, those that were not computed."""
    records = RunFolder(path.parent, path.name).read_manifest().segments
    skipped, computed = (sum(r.statistics[f"units_{name}"] for r in records) for name in ("skipped", "computed"))
    return skipped / (skipped + computed)


def left_over(root: Path) -> list[Path]:
    """Residuals of runs that are done, drafts, probes."""
    return [
        *root.glob(".cache_store/**/*.safetensors"),
        *root.rglob(".*.part"),
        *root.glob(".probe-*"),
        *root.glob(".run-*"),
    ]
