"""The README's picture is made of a run's video: all of it, at the video's speed, again and again."""

import runpy

import numpy as np
from PIL import Image

from edit_ray.video.encode import OutputOptions, encode
from tests.documented import ROOT


def test_a_gif_shows_the_whole_video(tmp_path):
    frames = np.zeros((32, 32, 48, 3), np.uint8)
    frames[:16, ..., 0] = 230  # red, then blue
    frames[16:, ..., 2] = 230
    (tmp_path / "final.mp4").write_bytes(encode(frames, fps=16, options=OutputOptions(crf=1)))
    script = runpy.run_path(str(ROOT / "docs" / "demo_gif.py"))
    script["make_gif"](tmp_path / "final.mp4", tmp_path / "demo.gif")
    with Image.open(tmp_path / "demo.gif") as picture:
        assert picture.size == (script["HEIGHT"] * 48 // 32, script["HEIGHT"])
        assert picture.info["loop"] == 0
        assert picture.n_frames == 2 * script["FPS"]
        assert picture.info["duration"] == 1000 // script["FPS"]
        for index, colour in ((0, (0, "red")), (picture.n_frames - 1, (2, "blue"))):
            picture.seek(index)
            pixel = picture.convert("RGB").getpixel((picture.width // 2, picture.height // 2))
            assert np.argmax(pixel) == colour[0], colour[1]
