"""Pictures in a configuration: what a model and a mode take, and files that can be used; before anything is loaded."""

import numpy as np
import pytest
from PIL import Image

from edit_ray.config import load_config
from edit_ray.engine.init_file import read_picture
from edit_ray.errors import ConfigError
from edit_ray.testing import save_random_wan

LAYOUTS = {
    "text": {},
    "TI2V": {"expand_timesteps": True},
    "image": {"layout": "image"},
    "CLIP": {"layout": "image_clip"},
    "first and last": {"layout": "first_last_clip"},
    "VACE": {"layout": "vace"},
}
RUN = """
video: {num_segments: 4}
sampling: {height: 32, width: 32, num_frames: 17}
prompt_segments: [{segment: 0, prompt: a red circle}, {segment: 2, prompt: a blue square}]
"""
FIRST, SECOND, MODE, INIT = "prompt_segments.0.", "prompt_segments.1.", "continuity.mode=", "continuity.init="


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, layout in LAYOUTS.items():
        save_random_wan(root / name, **layout)
    (root / "run.yaml").write_text(RUN)
    Image.new("RGB", (40, 40), "red").save(root / "a.png")
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    for name in ("moving.png", "moving.webp"):
        frames[0].save(root / name, save_all=True, append_images=frames[1:])
    (root / "broken.jpg").write_bytes(b"no picture")
    frames[0].save(root / "other.gif")
    return root


def problems_of(folder, layout, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(folder / "run.yaml", [f"model.path={folder / layout}", *overrides])
    return caught.value.problems


WRONG = [
    ("text", ["image=a.png"], "this model is a text-to-video model; it takes no picture"),
    ("text", ["last_image=a.png"], "this model is a text-to-video model; it takes no picture"),
    ("text", [f"{MODE}image"], "must be none, warm_start or overlap for this model, because image needs a model that"),
    ("text", [f"{MODE}svi", f"{INIT}a.png"], "because svi needs an image-to-video model"),
    ("TI2V", [f"{MODE}svi", f"{INIT}a.png"], "must be none, warm_start, history, overlap or image for this model"),
    ("TI2V", ["reference_images.0=a.png"], "a text- and image-to-video model; it takes image and last_image"),
    ("TI2V", ["image=a.png", f"{MODE}history"], "needs continuity.mode none, warm_start, image or svi (with history"),
    ("image", [f"{MODE}image"], "prompt_segments.0.image is missing; this model is an image-to-video model"),
    ("image", [f"{MODE}svi"], "is 'svi', which needs a picture to hold on to: continuity.init"),
    ("image", ["image=a.png"], "prompt_segments.1.image is missing"),
    (
        "image",
        [f"{MODE}overlap"],
        "must be none, warm_start, image or svi for this model, because it is an image-to-vid",
    ),
    ("image", [f"{MODE}image", f"{INIT}other.gif"], "other.gif', a clip; it must be a picture"),
    (
        "image",
        [f"{MODE}image", f"{INIT}a.png", "continuity.picture_as=still"],
        "it must be first_frame for an image-to",
    ),
    (
        "image",
        [f"{MODE}svi", f"{INIT}a.png", "sampling.num_frames=5"],
        "it must be at least 9 where continuity.mode is svi",
    ),
    ("CLIP", [f"{MODE}image", f"{INIT}a.png", "last_image=a.png"], "and this model sees one picture; it takes image"),
    ("first and last", [f"{MODE}image", f"{INIT}a.png"], "each of its segments must have an image and a last_image"),
    ("VACE", [f"{MODE}overlap"], "must be none or warm_start for this model, because it is a VACE model"),
    ("VACE", ["image=a.png"], "a VACE model; it takes reference_images"),
    ("TI2V", ["image=missing.png"], "missing.png', which is not a file here"),
    ("TI2V", ["image=broken.jpg"], "broken.jpg', which cannot be read as a picture"),
    ("TI2V", ["last_image=moving.png"], "moving.png', which has 2 frames; a picture must have one"),
    ("VACE", ["reference_images.0=a.png", "reference_images.1=moving.webp"], "reference_images.1 is"),
    ("TI2V", ["image=other.gif"], "it must be the path of a picture (.png, .jpg"),
    ("TI2V", [f"{SECOND}last_image=a.png", "video.num_segments=null"], "this video has no end"),
    (
        "VACE",
        ["reference_images.0=a.png", "cache.policy=warmstart_reuse", "cache.warm_steps=2", "cache.reuse_window=1"],
        "with references it must be 0",
    ),
]


@pytest.mark.parametrize(("layout", "overrides", "words"), WRONG, ids=[words[:40] for _, _, words in WRONG])
def test_what_cannot_be_is_one_sentence(folder, monkeypatch, layout, overrides, words):
    monkeypatch.chdir(folder)
    keys = ("image=", "last_image=", "reference_images.")
    overrides = [FIRST + text if text.startswith(keys) else text for text in overrides]
    assert [problem for problem in problems_of(folder, layout, *overrides) if words in problem], problems_of(
        folder, layout, *overrides
    )


def test_every_mistake_is_said_at_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = problems_of(
        folder,
        "text",
        f"{FIRST}image=missing.png",
        f"{SECOND}last_image=moving.png",
        f"{MODE}image",
        "sampling.width=30",
    )
    for words in ("missing.png', which is not", "has 2 frames", "takes no picture", "continuity.mode is 'image'"):
        assert [problem for problem in found if words in problem], (words, found)
    assert [problem for problem in found if "sampling.width" in problem]


STORY = [
    "prompt_segments.2.segment=3",
    "prompt_segments.2.prompt=a red circle",
    f"{SECOND}image=a.png",
    f"{FIRST}last_image=b.png",
]
SHOWN = {
    "image": [("init", None), (None, "b"), ("a", None), (None, None)],
    "svi": [("init", None), ("init", "b"), ("a", None), ("init", None)],
}


@pytest.mark.parametrize("mode", SHOWN)
def test_an_entry_begins_and_ends_with_its_pictures(folder, monkeypatch, mode):
    monkeypatch.chdir(folder)
    for name in ("b.png", "init.png"):
        Image.new("RGB", (32, 32), "blue").save(name)
    path = f"model.path={folder / 'image'}"
    board = load_config(folder / "run.yaml", [path, f"{MODE}{mode}", f"{INIT}init.png", *STORY]).storyboard
    pictures = [board.segment(index).pictures for index in range(4)]
    named = [(None if path is None else str(folder / f"{path}.png")) for pair in SHOWN[mode] for path in pair]
    assert [path for each in pictures for path in (each.image, each.last_image)] == named
    assert [board.stream_start(index) for index in range(4)] == ([0, 0, 2, 2] if mode == "image" else [0] * 4)


def test_pictures_of_every_kind_are_8_bits_of_rgb(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    grey = read_picture(str(tmp_path / "grey16.png"), height=64, width=64)[0]
    assert np.array_equal(grey[..., 0], ramp >> 8)
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")
    Image.new("P", (32, 32)).save(tmp_path / "palette.png")
    Image.new("1", (32, 32), 1).save(tmp_path / "black_and_white.png")
    Image.new("LA", (32, 32), (255, 0)).save(tmp_path / "alpha.png")
    for name, color in (("ink.jpg", (254, 0, 0)), ("palette.png", 0), ("black_and_white.png", 255), ("alpha.png", 0)):
        frame = read_picture(str(tmp_path / name), height=16, width=16)
        assert frame.shape == (1, 16, 16, 3)
        assert np.abs(frame[0, 0, 0].astype(int) - color).max() <= 2
