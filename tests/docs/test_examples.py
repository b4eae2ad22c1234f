"""The examples run as they stand; those that need Ray are in tests/ray."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch

from edit_ray.cache import Cache, CachePolicy, apply_cache_on_transformer
from edit_ray.testing import save_random_wan

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
# Each with the video that it leaves, and what it prints.
OF_THE_LIBRARY = {
    "text_to_video": ("text_to_video.mp4", "text_to_video.mp4"),
    "wan_t2v_teacache": ("wan_t2v_teacache.mp4", "of the steps skipped"),
    "custom_policy": (None, "most=3  ■■·■·■··■··■···■···■"),
    "custom_store": (None, "'CompressedStore'"),
    "edit_a_generation": ("edit_a_generation.mp4", "5 of 20 forwards came from the other generation"),
    "other_model": (None, "equal again without the cache: True"),
}
WITH_RAY = {"storyboard", "contact_sheet"}
OF_A_CAUSAL_MODEL = {"type_prompts"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ltx():
    """The names of examples/other_model.py, which registers its adapter."""
    return runpy.run_path(str(EXAMPLES / "other_model.py"))


class Mask(CachePolicy):
    """Computes at every other step, or always; remembers what it was shown."""

    timestep_only = False

    def __init__(self, every):
        self.every, self.seen = every, []

    def should_compute(self, ctx):
        self.seen.append(ctx)
        return ctx.step % self.every == 0


@pytest.mark.parametrize("granularity", ["stack", "per_block", 4])
def test_ltx_is_cached_exactly(ltx, granularity):
    transformer, denoise, steps = ltx["tiny_ltx"](), ltx["denoise"], ltx["STEPS"]
    uncached, units = denoise(transformer), {"stack": 1, "per_block": 6, 4: 2}[granularity]
    cache = apply_cache_on_transformer(transformer, Mask(1), steps, granularity)
    assert isinstance(cache, Cache)
    assert torch.equal(denoise(transformer), uncached)
    assert cache.stats["cond"].computed == cache.stats["uncond"].computed == steps * units
    cache.remove()
    cache = apply_cache_on_transformer(transformer, Mask(2), steps, granularity)
    assert not torch.equal(denoise(transformer), uncached)
    assert cache.record.mask() == [step % 2 == 0 for step in range(steps)]
    cache.remove()
    assert torch.equal(denoise(transformer), uncached)


def test_the_adapter_of_ltx_shows_what_the_model_itself_makes(ltx):
    transformer, policy, embedded = ltx["tiny_ltx"](), Mask(1), []
    transformer.time_embed.register_forward_hook(lambda module, args, output: embedded.append(output))
    apply_cache_on_transformer(transformer, policy, ltx["STEPS"])
    ltx["denoise"](transformer)
    assert len(policy.seen) == len(embedded) == 2 * ltx["STEPS"]
    for ctx, (e0, e) in zip(policy.seen, embedded, strict=True):
        assert torch.equal(ctx.e, e)
        assert torch.equal(ctx.e0.flatten(1), e0)
        assert ctx.latents.shape == (1, ltx["CHANNELS"], ltx["FRAMES"], ltx["HEIGHT"], ltx["WIDTH"])
        assert ctx.encoder_hidden.shape == (1, 8, 32)


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == OF_THE_LIBRARY.keys() | WITH_RAY | OF_A_CAUSAL_MODEL


def test_a_video_follows_what_is_typed(tmp_path):
    model = save_random_wan(tmp_path / "model", causal={"window": 6, "timesteps": [1000.0]})
    command = [sys.executable, str(EXAMPLES / "type_prompts.py"), str(model), "--size", "32", "48", "--chunks", "50"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = {"text": True, "cwd": tmp_path, "env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **said) as running:
        lines = []
        for typed in ("a blue square", "cut: a green circle", ""):
            lines += [running.stdout.readline()]
            running.stdin.write(typed + "\n")
            running.stdin.flush()
        lines += running.stdout.readlines()
        assert running.wait() == 0
    followed = [line.split(" follows ")[1].strip() for line in lines if " follows " in line]
    assert followed == ["'a blue square'", "'cut: a green circle'"]
    chunks = [line for line in lines if line.startswith("chunk") and "frames in" in line]
    assert chunks[0].startswith("chunk 0: 9 frames in ")
    frames, _ = imageio_ffmpeg.count_frames_and_secs(tmp_path / "type_prompts.mp4")
    assert frames == 9 + 12 * (len(chunks) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_THE_LIBRARY)
def test_an_example_runs_without_arguments(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    video, words = OF_THE_LIBRARY[name]
    assert words in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ([video] if video else [])
