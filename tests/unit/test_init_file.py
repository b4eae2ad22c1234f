"""The user's picture or clip: read, scaled and cut, or refused in one sentence."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from edit_ray.engine import init_file
from edit_ray.engine.init_file import pictures_digest, read_init
from edit_ray.errors import ConfigError
from edit_ray.video.encode import OutputOptions, encode

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(path, width=80, height=40, **save):
    """Red, with a blue part in the middle that is as wide as it is high."""
    image = Image.new("RGB", (width, height), RED)
    side = min(width, height)
    image.paste(BLUE, ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2))
    image.save(path, **save)
    return str(path)


def clip(path, frames=12, width=64, height=32):
    """Frame f is a grey of 10 + 20 f."""
    grey = (10 + 20 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    path.write_bytes(encode(np.broadcast_to(grey, (frames, height, width, 3)), fps=16, options=OutputOptions(crf=0)))
    return str(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp", "a.bmp"])
@pytest.mark.parametrize(("width", "height"), [(80, 40), (40, 80)])
def test_a_picture_is_cut_around_its_middle(tmp_path, name, width, height):
    (frame,) = read_init(picture(tmp_path / name, width, height), frames=1, height=32, width=32)
    assert frame.shape == (32, 32, 3)
    assert np.abs(frame[2:-2, 2:-2].astype(int) - BLUE).max() < 12, "all that is left is blue"


def test_a_picture_keeps_its_proportions_is_turned_as_its_camera_says_and_lies_on_black(tmp_path):
    (frame,) = read_init(picture(tmp_path / "a.png", 80, 40), frames=1, height=32, width=64)
    assert tuple(frame[16, 2]) == RED
    assert tuple(frame[16, 18]) == BLUE
    assert frame.shape == (32, 64, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    (frame,) = read_init(picture(tmp_path / "b.png", 80, 40, exif=exif), frames=1, height=80, width=40)
    assert tuple(frame[5, 20]) == RED
    assert tuple(frame[40, 5]) == BLUE
    Image.new("RGBA", (32, 32), (255, 255, 255, 0)).save(tmp_path / "c.png")
    assert read_init(str(tmp_path / "c.png"), frames=1, height=16, width=16).max() == 0


@pytest.mark.parametrize(("height", "width"), [(32, 64), (32, 32), (64, 16)])
def test_the_end_of_a_clip_is_read(tmp_path, height, width):
    frames = read_init(clip(tmp_path / "a.mp4"), frames=5, height=height, width=width)
    assert frames.shape == (5, height, width, 3)
    assert np.abs(frames.mean((1, 2, 3)) - (10 + 20 * np.arange(7, 12))).max() < 3


def test_a_gif_is_a_clip(tmp_path):
    images = [Image.new("RGB", (32, 32), (value, value, value)) for value in (0, 100, 200)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    frames = read_init(str(tmp_path / "a.gif"), frames=1, height=16, width=16)
    assert abs(frames.mean() - 200) < 3


def problem_of(path, **options):
    with pytest.raises(ConfigError) as caught:
        read_init(str(path), **({"frames": 5, "height": 16, "width": 16} | options))
    (problem,) = caught.value.problems
    assert problem.startswith(f"continuity.init is {str(path)!r}, which ")
    assert "\n" not in problem
    return problem


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "b.png").mkdir()
    for path in (tmp_path / "a.png", tmp_path / "a.mp4", tmp_path / "b.png", "a\0.png"):
        assert "is not a file here" in problem_of(path)


def test_only_files_in_the_operator_s_folders_are_read(tmp_path, monkeypatch):
    (tmp_path / "allowed").mkdir()
    inside = picture(tmp_path / "allowed/a.png"), clip(tmp_path / "allowed/a.mp4")
    outside = picture(tmp_path / "b.png"), clip(tmp_path / "b.mp4")
    (tmp_path / "allowed/link.png").symlink_to(outside[0])
    (tmp_path / "link.png").symlink_to(inside[0])
    monkeypatch.setenv("EDIT_RAY_PICTURE_ROOTS", f"{tmp_path}/none:{tmp_path}/allowed")
    for path in (*inside, str(tmp_path / "link.png")):
        assert len(read_init(path, frames=1, height=8, width=8)) == 1
    for path in (*outside, tmp_path / "allowed/link.png", tmp_path / "allowed/../b.png"):
        assert f"is not allowed here; pictures and clips are files in {tmp_path}/none:" in problem_of(path)
    with pytest.raises(ConfigError, match="is not allowed here"):
        pictures_digest([inside[0], outside[0]])


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n and no more", b"#EXTM3U\nother.mp4\n"])
@pytest.mark.parametrize(("name", "kind"), [("a.png", "picture"), ("a.mp4", "clip"), ("a.gif", "clip")])
def test_a_file_that_is_something_else(tmp_path, content, name, kind):
    (tmp_path / name).write_bytes(content)
    assert f"cannot be read as a {kind} (" in problem_of(tmp_path / name)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_that_is_cut_off(tmp_path, share):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.mp4").write_bytes(encode(noise[None].repeat(9, 0), fps=16, options=OutputOptions()))
    for name, kind in (("a.png", "picture"), ("a.mp4", "clip")):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        assert f"cannot be read as a {kind}" in problem_of(tmp_path / name)


def test_a_clip_that_is_something_else_or_too_short(tmp_path):
    path = clip(tmp_path / "other.mp4", 4)
    assert "has 4 frames; with this continuity.history_latents a clip must have 5 or more" in problem_of(path)
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    assert "cannot be read as a clip" in problem_of(tmp_path / "a.mp4"), "no other file is opened"
    sound = ("-loglevel", "error", "-f", "lavfi", "-i", "anullsrc", "-t", "1", str(tmp_path / "sound.mp4"))
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *sound], check=True)
    assert "cannot be read as a clip" in problem_of(tmp_path / "sound.mp4")


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(init_file, "MAX_PIXELS", 1000)
    monkeypatch.setattr(init_file, "MAX_CLIP_FRAMES", 8)
    assert "has 80x40 pixels; a picture must have at most 1000" in problem_of(picture(tmp_path / "a.png"))
    assert "cannot be read as a clip" in problem_of(clip(tmp_path / "a.mp4"))
    monkeypatch.setattr(init_file, "MAX_PIXELS", 10_000)
    assert "has more than 8 frames" in problem_of(tmp_path / "a.mp4")
