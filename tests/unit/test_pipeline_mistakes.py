"""What a user of `EditWanPipeline` gets wrong is said in a sentence; what is saved or rebuilt keeps its parts."""

import json
import logging
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from edit_ray import EditWanPipeline
from edit_ray.errors import ModelError
from edit_ray.testing import save_random_wan
from tests import calls
from tests.calls import cached, load, quiet

pytestmark = pytest.mark.usefixtures("one_thread")
latents = partial(calls.latents, num_inference_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_random_wan(tmp_path_factory.mktemp("wan"), num_layers=2)
    calibration = {"schema": 1, "policies": {"ranked": {"skip_rank": [None, 0]}}, "measured": {}}
    Path(made, "cache_calibration.json").write_text(json.dumps(calibration))
    return made


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


def skips(pipe):
    """Of `ranked`, whose ranks only the model's calibration knows."""
    with cached(pipe, "ranked", 2, skips=1) as cache:
        return cache.plan()["transformer", "cond", 0].count(False)


def test_what_is_saved_is_a_pipeline_that_stock_diffusers_loads(pipe, tmp_path):
    with cached(pipe, "always", 2):
        pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is WanPipeline
    ours = load(tmp_path)
    assert torch.equal(latents(ours), latents(quiet(stock)))
    assert skips(ours) == 1
    ours.save_pretrained(tmp_path)  # over itself
    assert skips(load(tmp_path)) == 1


def test_a_pipeline_made_of_anothers_components_knows_the_models_calibration(pipe, folder):
    assert skips(EditWanPipeline(**pipe.components)) == 1
    alone = type(pipe.transformer).from_pretrained(folder, subfolder="transformer")
    assert skips(EditWanPipeline(**{**pipe.components, "transformer": alone})) == 1


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
def test_a_number_of_steps_that_is_none_is_refused(pipe, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}; it must be a whole number from 1"):
        latents(pipe, num_inference_steps=steps)


@pytest.mark.parametrize(("returned", "said"), [(None, "None"), (torch.zeros(1), "Tensor")])
def test_a_callback_that_returns_no_dict_is_refused(pipe, returned, said):
    with pytest.raises(TypeError, match=rf"callback_on_step_end returned {said}; it must return a dict"):
        latents(pipe, callback_on_step_end=lambda *_: returned)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cuda", torch.device("cuda", 42)])
def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(device, tmp_path):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    for call in (
        lambda: EditWanPipeline.from_pretrained(tmp_path / "nothing", device=device),
        lambda: EditWanPipeline.enable_cfg_parallel(EditWanPipeline.__new__(EditWanPipeline), device),
    ):
        with pytest.raises(ModelError, match=r"device is .*it must be 'cpu'") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_prompt_that_the_model_is_not_given_whole_is_named(pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="edit_ray"):
        latents(pipe, prompt="a red circle " * 10, max_sequence_length=32)
        assert caplog.messages == []
        latents(pipe, prompt="a red circle " * 12, max_sequence_length=32)
    (said,) = caplog.messages
    assert "tokens; the model is given the first 32: 'a red circle" in said


def test_a_second_call_of_a_pipeline_at_work_is_refused_and_the_first_undisturbed(pipe):
    expected = latents(pipe)
    entered, go_on, made = threading.Event(), threading.Event(), []

    def wait(*_):
        entered.set()
        assert go_on.wait(60)
        return {}

    first = threading.Thread(target=lambda: made.append(latents(pipe, callback_on_step_end=wait)))
    first.start()
    assert entered.wait(60)
    try:
        with pytest.raises(RuntimeError, match="is running, in another thread"):
            latents(pipe)
    finally:
        go_on.set()
        first.join()
    assert torch.equal(made[0], expected)
    with pytest.raises(RuntimeError, match="makes one call at a time"):
        latents(pipe, callback_on_step_end=lambda *_: latents(pipe) and {})
    assert torch.equal(latents(pipe), expected)
