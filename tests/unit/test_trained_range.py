"""What a model's card says that it was trained for is read from it, and the library and jobs warn beyond it."""

import logging
from pathlib import Path

import pytest
import torch

from edit_ray import EditWanPipeline
from edit_ray.config import load_config
from edit_ray.config.model_checks import training_warning
from edit_ray.engine.model_files import locate_model
from edit_ray.engine.trained_range import CARD, TrainedFor, beyond_training, read_trained_for
from edit_ray.testing import save_random_wan
from tests.calls import load, quiet

pytestmark = pytest.mark.usefixtures("one_thread")
CARD_TEXT = """---
license: apache-2.0
trained_for:
  sizes: [[32, 32], [32, 48]]
  num_frames: [9, 17]
  num_inference_steps: [2, 4]
---
# A model
"""
WITHIN = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture
def card(tmp_path):
    def write(text):
        (tmp_path / CARD).write_text(text)
        return tmp_path / CARD

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = Path(save_random_wan(tmp_path_factory.mktemp("wan"), num_layers=1))
    (made / CARD).write_text(CARD_TEXT)
    return made


@pytest.fixture(scope="module")
def pipe(folder):
    return quiet(load(folder))


def test_a_card_says_what_the_model_was_trained_for(card):
    found = read_trained_for(card(CARD_TEXT))
    assert found == TrainedFor(((32, 32), (32, 48)), (9, 17), (2, 4))
    assert found.beyond(WITHIN) is None
    assert found.beyond({}) is None


@pytest.mark.parametrize(
    ("beyond", "said"),
    [
        ({"height": 48, "width": 32}, "height and width are 48x32 and not 32x32 and 32x48"),
        ({"num_frames": 21}, "num_frames is 21 and not 9 to 17"),
        ({"num_frames": 5, "num_inference_steps": 1}, "9 to 17, num_inference_steps is 1 and not 2 to 4"),
    ],
)
def test_what_lies_beyond_is_said(card, beyond, said):
    assert said in read_trained_for(card(CARD_TEXT)).beyond(WITHIN | beyond)


@pytest.mark.parametrize(
    "text",
    [
        "# no front matter",
        "---\nlicense: mit\n---\n",
        "---\ntrained_for: [1\n---\n",
        "---\ntrained_for: everything\n---\n",
        "---\ntrained_for:\n  sizes: [128]\n---\n",
        "---\ntrained_for:\n  num_frames: [many]\n---\n",
    ],
)
def test_another_card_says_nothing(card, text):
    assert read_trained_for(card(text)) == TrainedFor()


def test_no_card_says_nothing(tmp_path):
    assert read_trained_for(None) == read_trained_for(tmp_path / CARD) == TrainedFor()
    assert beyond_training(str(tmp_path), WITHIN) is None  # nor does a folder without a model
    assert beyond_training("org/name", WITHIN) is None


def call(pipe, prompt="a red circle", **changes):
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **size | changes)


def test_the_library_warns_beyond_the_card(pipe, caplog):
    with caplog.at_level(logging.WARNING, "edit_ray"):
        call(pipe)
        assert not caplog.messages
        call(pipe, num_inference_steps=1, num_frames=5)
    (said,) = caplog.messages
    assert said == (
        "This call is beyond what this model was trained for: num_frames is 5 and not 9 to 17, "
        "num_inference_steps is 1 and not 2 to 4."
    )


def test_a_video_has_as_many_frames_as_its_latents(pipe, caplog):
    with caplog.at_level(logging.WARNING, "edit_ray"):
        call(pipe, video=torch.zeros(1, 9, 3, 32, 32), strength=1.0, num_frames=33)
    assert not caplog.messages


@pytest.mark.parametrize("which", ["prompt", "negative_prompt"])
def test_the_library_warns_of_unknown_words(pipe, caplog, which):
    with caplog.at_level(logging.WARNING, "edit_ray"):
        call(pipe, **{which: "a red zebra blurry"})
    (said,) = caplog.messages
    assert "has words that this model does not know: 'zebra', 'blurry'; it knows: a, " in said


def test_a_job_is_warned_as_the_library_is(folder, tmp_path):
    base = ["video.num_segments=2", "prompt_segments.0.segment=0", "prompt_segments.0.prompt=a red circle"]
    base += [f"model.path={folder}", "sampling.height=32", "sampling.width=32", "sampling.num_frames=9"]
    assert training_warning(load_config(None, [*base, "sampling.num_inference_steps=4"])) is None
    few = load_config(None, [*base, "sampling.num_inference_steps=1"])
    assert training_warning(few) == "beyond what this model was trained for: num_inference_steps is 1 and not 2 to 4"


def test_the_embedded_model_has_such_a_card_and_the_shipped_configuration_keeps_to_it():
    card = Path(locate_model("builtin:tiny_wan"), CARD)
    assert None not in vars(read_trained_for(card)).values()
    assert training_warning(load_config(Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml")) is None


def test_a_pipeline_of_saved_parts_has_no_card(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.WARNING, "edit_ray"):
        call(quiet(EditWanPipeline.from_pretrained(tmp_path / "saved")), num_inference_steps=1)
    assert not caplog.messages
