"""The snippets of the README that this project grew from run as they are printed, but for what `REPLACED` lists."""

import json
from itertools import pairwise

import pytest
import torch

import edit_ray.cache
from edit_ray import EditWanPipeline
from edit_ray.cache import CachePolicy, DiskOffloadStore, GPUStore, TieredStore, register_policy
from tests.calls import quiet
from tests.parity.conftest import BUILTIN_FOLDER
from tests.unit.entry_folder import files_in

REPLACED = {
    # the package
    "from edit import": "from edit_ray import",
    "from edit.cache import": "from edit_ray.cache import",
    # model, dtype, device
    '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': '"builtin:tiny_wan"',
    "torch.bfloat16": "torch.float32",
    '"cuda"': '"cpu"',
    # steps, sizes
    "num_inference_steps=30": "num_inference_steps=10",
    "height=480": "height=32",
    "width=832": "width=48",
    "num_frames=33": "num_frames=5",
    # prompts; the README's dots stand for what a call is given, of which sizes and steps are needed here
    '"A cat and a dog baking a cake together in a kitchen."': '"a red circle bouncing on a black background"',
    "pipe(prompt=...,": ('pipe(prompt="a red circle", height=32, width=48, num_frames=5, num_inference_steps=steps,'),
}
# Names that the snippets use and do not define: `steps`, `num_segments` and `tiered_store` (over device and disk, in
# one process) of the third, and `pipe` where it stands for that of the first.

QUICK_START = """
import torch
from edit import EditWanPipeline

pipe = EditWanPipeline.from_pretrained(
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    torch_dtype=torch.bfloat16,
    device="cuda",
)
"""

TEACACHE = """
pipe.enable_cache(
    policy="teacache",      # "teacache", "fbcache", or a registered policy
    num_inference_steps=30,
    rel_l1_thresh=0.2,      # higher is faster; lower preserves more fidelity
    wan_variant="t2v-1.3B", # official Wan2.1 TeaCache coefficients
)
"""

GENERATE = """
video = pipe(
    prompt="A cat and a dog baking a cake together in a kitchen.",
    negative_prompt="blurry, low quality",
    height=480,
    width=832,
    num_frames=33,
    num_inference_steps=30,
    guidance_scale=5.0,
)[0]
"""

PRINT_STATS = """
print(pipe.cache.stats)
"""

LONG_VIDEO = """
pipe.enable_cache(
    policy="warmstart_reuse",            # TeaCache + warm-start the first steps from the window
    num_inference_steps=steps, store=tiered_store, warm_steps=2, wan_variant="t2v-1.3B",
)
cache = pipe.cache
for g in range(num_segments):            # one long video, segment by segment
    cache.set_generation(g)
    cache.set_reuse_window(range(max(0, g - 4), g))   # warm-start from the last 4 segments
    cache.reset(clear_store=False)                    # keep the cache across segments
    pipe(prompt=..., reset_cache=False, prefetch_reuse=True)   # stage the window → overlap
"""

CUSTOM_POLICY = """
from edit.cache import CachePolicy, register_policy, relative_l1

@register_policy("my_policy")
class MyPolicy(CachePolicy):
    needs_first_block_probe = False

    def __init__(self, *, rel_l1_thresh=0.1):
        self.rel_l1_thresh = rel_l1_thresh

    def reset(self, state):
        state.user["prev"] = None

    def should_compute(self, ctx) -> bool:
        prev = ctx.state.user["prev"]
        ctx.state.user["prev"] = ctx.e0.clone()
        return prev is None or relative_l1(ctx.e0, prev) >= self.rel_l1_thresh
"""

BY_NAME = """
pipe.enable_cache(
    policy="my_policy",
    num_inference_steps=30,
    granularity="per_block", # "stack", "per_block", or an integer group size
    rel_l1_thresh=0.1,
)
"""

CONTEXT = ("step", "num_steps", "branch", "unit_index", "num_units", "hidden", "e0", "e", "encoder_hidden", "state")
STEPS = 10
LAYERS = json.loads((BUILTIN_FOLDER / "transformer" / "config.json").read_text())["num_layers"]


def run(snippet, **names):
    """The names that a snippet leaves, after the replacements."""
    for old, new in REPLACED.items():
        snippet = snippet.replace(old, new)
    exec(compile(snippet, "<the seed's README>", "exec"), names)
    return names


@pytest.fixture(scope="module")
def loaded():
    return quiet(run(QUICK_START)["pipe"])


@pytest.fixture
def pipe(loaded):
    loaded.disable_cache()
    yield loaded
    loaded.disable_cache()


def generate(pipe):
    torch.manual_seed(0)  # the snippet gives no generator
    return torch.from_numpy(run(GENERATE, pipe=pipe)["video"])


@pytest.fixture(scope="module")
def baseline(loaded):
    loaded.disable_cache()
    return generate(loaded)


def test_every_replacement_is_needed():
    everything = QUICK_START + TEACACHE + GENERATE + PRINT_STATS + LONG_VIDEO + CUSTOM_POLICY + BY_NAME
    assert [old for old in REPLACED if old not in everything] == []


def test_quick_start(pipe, baseline, capsys):
    assert type(pipe) is EditWanPipeline
    assert baseline.shape == (5, 32, 48, 3)
    run(TEACACHE, pipe=pipe)
    video = generate(pipe)
    run(PRINT_STATS, pipe=pipe)
    stats = pipe.cache.stats
    assert capsys.readouterr().out == f"{stats}\n"
    for branch in ("cond", "uncond"):
        assert stats[branch].computed + stats[branch].skipped == STEPS
        assert stats[branch].skipped > 0
    assert pipe.cache.record.mask() == list(pipe.cache.plan()["transformer", "cond", 0])
    assert not torch.equal(video, baseline)
    pipe.disable_cache()
    assert torch.equal(generate(pipe), baseline)  # "Skip enable_cache(...) to run the baseline path."


def test_parity_when_skipping_is_disabled(pipe, baseline):
    for never in ("0.0", "-1"):
        run(TEACACHE.replace("0.2", never), pipe=pipe)
        assert torch.equal(generate(pipe), baseline)
        assert pipe.cache.stats["cond"].skipped == 0
        pipe.disable_cache()


def long_video(pipe, store):
    torch.manual_seed(0)
    return run(LONG_VIDEO, pipe=pipe, steps=4, num_segments=7, tiered_store=store)["cache"]


def test_long_video(pipe, tmp_path):
    reference = GPUStore()
    cache = long_video(pipe, reference)
    # Every fifth segment computes its opening, the others reuse that of a segment in their window.
    assert {entry.key[0] for entry in cache.entries() if entry.key[-1] < 2} == {5}
    for branch in ("cond", "uncond"):
        assert cache.record.mask(branch)[:3] == [False, False, True]
    expected = {key: reference.get(key).clone() for key in reference.sizes()}
    size = next(iter(expected.values())).nbytes
    pipe.disable_cache()

    store = TieredStore([(GPUStore(), 5 * size), (DiskOffloadStore(tmp_path), None)])
    cache = long_video(pipe, store)
    assert cache is pipe.cache
    assert store.num_spills > 0
    assert 0 < store.tier_bytes["device"] <= 5 * size
    assert store.tier_bytes["disk"] > 0
    assert store.bytes_resident == len(expected) * size
    assert {entry.key for entry in cache.entries()} == set(expected)
    assert all(torch.equal(store.get(key), tensor) for key, tensor in expected.items())
    pipe.disable_cache()
    assert files_in(tmp_path) == []


def test_custom_policy(pipe, baseline):
    names = run(CUSTOM_POLICY)
    assert names["relative_l1"] is edit_ray.cache.relative_l1
    run(BY_NAME, pipe=pipe)
    assert type(pipe.cache.policy).__name__ == "MyPolicy"
    shown = []
    pipe.cache.on_unit(lambda ctx: shown.append((ctx.branch, ctx.unit_index, ctx.e0)))
    generate(pipe)
    signals = [e0 for branch, unit, e0 in shown if (branch, unit) == ("cond", 0)]
    changes = [names["relative_l1"](now, before) for before, now in pairwise(signals)]
    expected = [True, *(change >= 0.1 for change in changes)]
    assert False in expected
    for branch in ("cond", "uncond"):
        for unit in range(LAYERS):
            assert pipe.cache.record.mask(branch, unit) == expected
    pipe.disable_cache()
    run(BY_NAME.replace("rel_l1_thresh=0.1", "rel_l1_thresh=0"), pipe=pipe)
    assert torch.equal(generate(pipe), baseline)


def test_the_context_has_the_names_of_the_readme(pipe):
    seen = []

    @register_policy("seed_context")
    class Sees(CachePolicy):
        needs_first_block_probe = True

        def should_compute(self, ctx) -> bool:
            seen.append({name: getattr(ctx, name) for name in (*CONTEXT, "first_block_residual")})
            return True

    run(BY_NAME.replace("my_policy", "seed_context").replace("    rel_l1_thresh=0.1,\n", ""), pipe=pipe)
    generate(pipe)
    assert len(seen) == STEPS * 2 * LAYERS
    last = seen[-1]
    assert (last["step"], last["num_steps"], last["branch"]) == (STEPS - 1, STEPS, "uncond")
    assert (last["unit_index"], last["num_units"]) == (LAYERS - 1, LAYERS)
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    assert last["hidden"].shape == last["first_block_residual"].shape == (1, 2 * 2 * 3, width)
    assert last["encoder_hidden"].shape[0::2] == (1, width)
    assert last["e"].shape == (1, width)
    assert last["e0"].shape == (1, 6, width)
    assert last["state"].computed_steps == list(range(STEPS))
