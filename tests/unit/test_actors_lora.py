"""Runs with LoRA: the library's bits, weights that change with the storyboard, files that must stay the same."""

import asyncio

import pytest
import torch

from edit_ray import EditWanPipeline
from edit_ray.actors.local import LocalPool
from edit_ray.engine.continuity import load_latents
from edit_ray.engine.lora_files import loras_digest
from edit_ray.errors import HardwareDiffers
from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan
from tests.loras import save_lora
from tests.unit.test_actors import config_for
from tests.unit.test_actors_recovery import end_of, leave_half_made

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("wan"), two_experts=True, boundary_ratio=0.9)


@pytest.fixture
def library(model):
    pipe = EditWanPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def loras(library, tmp_path):
    """A LoRA for each expert, of one name."""
    for seed, expert in enumerate(EXPERTS):
        save_lora(tmp_path / f"{expert}.safetensors", getattr(library, expert), seed=seed)
    return [
        {"path": str(tmp_path / f"{expert}.safetensors"), "expert": expert, "adapter": "both", "weight": weight}
        for expert, weight in zip(EXPERTS, (0.8, -0.4), strict=True)
    ]


def config(model, loras, *, fuse_lora=False, prompts=({"segment": 0, "prompt": "a red circle"},), **changes):
    return config_for(
        model,
        model={"loras": loras, "fuse_lora": fuse_lora},
        continuity={"mode": "none", "history_latents": 1},
        prompt_segments=list(prompts),
        **changes,
    )


def load(pipe, loras):
    for lora in loras:
        second = lora["expert"] == "transformer_2"
        pipe.load_lora_weights(lora["path"], adapter_name="both", load_into_transformer_2=second)


def by_library(pipe, config, index, weights):
    pipe.set_adapters("both", [dict(zip(EXPERTS, weights, strict=True))])
    segment, sampling = config.storyboard.segment(index), config.sampling
    call = {name: getattr(sampling, name) for name in ("height", "width", "num_frames", "num_inference_steps")}
    call |= {"generator": torch.Generator().manual_seed(segment.seed), "guidance_scale": sampling.guidance_scale}
    return pipe(segment.prompt, "", output_type="latent", **call).frames


async def test_weights_change_where_the_storyboard_says(finish, model, library, loras, tmp_path):
    prompts = [
        {"segment": 0, "prompt": "a red circle"},
        {"segment": 1, "prompt": "a red circle", "lora_weights": {"both": 0.2}},
        {"segment": 3, "prompt": "a blue square"},
    ]
    cache = {"policy": "teacache", "coefficients": [0.0, 0.0], "target_speedup": 1.5}
    for run_id, cached in (("plain", {}), ("cached", {"cache": cache})):
        made = config(model, loras, prompts=prompts, **cached)
        assert (await finish(made, run_id)).state == "done"
    load(library, loras)
    folder = RunFolder(tmp_path, "plain")
    for index, weights in enumerate([(0.8, -0.4), (0.2, 0.2), (0.2, 0.2), (0.8, -0.4)]):
        assert torch.equal(load_latents(folder.latents(index)), by_library(library, made, index, weights))


@pytest.mark.parametrize("fuse_lora", [True, False])
async def test_the_files_are_part_of_where_a_run_comes_from(start, model, library, loras, tmp_path, fuse_lora):
    made = config(model, loras, fuse_lora=fuse_lora)
    await leave_half_made(tmp_path, "one", made)
    folder = RunFolder(tmp_path, "one")
    known = folder.read_manifest().provenance["loras"]
    assert known == loras_digest(made.model.loras)
    save_lora(tmp_path / "transformer.safetensors", library.transformer, seed=9)
    scheduler = start()
    with pytest.raises(HardwareDiffers, match="its LoRA files are others than those it was begun with"):
        await scheduler.resume("one", str(tmp_path), False)
    save_lora(tmp_path / "transformer.safetensors", library.transformer, seed=0)
    await scheduler.resume("one", str(tmp_path), False)
    assert (await end_of(scheduler, "one")).state == "done"
    load(library, loras)
    expected = by_library(library, made, 3, (0.8, -0.4))
    seen = load_latents(folder.latents(3))
    assert torch.allclose(seen, expected, atol=1e-4) if fuse_lora else torch.equal(seen, expected)


async def test_a_run_without_has_no_word_of_it(finish, model, tmp_path):
    assert (await finish(config(model, []))).state == "done"
    assert "loras" not in RunFolder(tmp_path, "one").read_manifest().provenance


async def test_a_replaced_file_is_loaded_by_the_next_run(finish, model, library, loras, tmp_path):
    pool = LocalPool()
    for run_id, seed in (("one", 0), ("other", 7)):
        await asyncio.sleep(0.01)
        save_lora(tmp_path / "transformer.safetensors", library.transformer, seed=seed)
        assert (await finish(config(model, loras, fuse_lora=True), run_id, pool)).state == "done"
    one, other = (load_latents(RunFolder(tmp_path, run_id).latents(0)) for run_id in ("one", "other"))
    assert not torch.equal(one, other)
