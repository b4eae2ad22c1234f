"""The examples run as they stand."""

import runpy
from pathlib import Path

import pytest
import torch

from edit_ray.cache import Cache, CachePolicy, apply_cache_on_transformer
from edit_ray.cache.adapters import adapter_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small run fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_other_model_runs_and_skips(capsys):
    runpy.run_path(str(EXAMPLES / "other_model.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    never, *_, skipping = [line for line in lines if line.startswith("rel_l1_thresh")]
    assert "equal: True " in never
    assert "equal: False" in skipping
    assert "0 skipped" in lines[1]
    assert "equal again without the cache: True" in lines[-1]


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
    hook = transformer.time_embed.register_forward_hook(lambda module, args, output: embedded.append(output))
    cache = apply_cache_on_transformer(transformer, policy, ltx["STEPS"])
    ltx["denoise"](transformer)
    hook.remove()
    cache.remove()
    assert len(policy.seen) == len(embedded) == 2 * ltx["STEPS"]
    for ctx, (e0, e) in zip(policy.seen, embedded, strict=True):
        assert torch.equal(ctx.e, e)
        assert torch.equal(ctx.e0.flatten(1), e0)
        assert ctx.latents.shape == (1, ltx["CHANNELS"], ltx["FRAMES"], ltx["HEIGHT"], ltx["WIDTH"])
        assert ctx.encoder_hidden.shape == (1, 8, 32)


def test_the_adapter_stays_small(ltx):
    adapter = adapter_of(ltx["tiny_ltx"]())
    assert type(adapter).__name__ == "LTXAdapter"
    lines = (EXAMPLES / "other_model.py").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("@register_adapter"))
    last = next(i for i, line in enumerate(lines) if i > first and line.startswith("def "))
    assert last - first <= 60
