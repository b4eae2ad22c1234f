"""The card's picture has a strip of frames for each seed, under its caption, and nothing chosen."""

import torch
from PIL import Image, ImageFont

from training.captions import read_caption
from training.samples_picture import COLUMNS, GAP, LINE, LINES, SHOWN, caption_of, lines_of, picture, strip


def test_the_caption_of_a_seed_is_whole_and_always_the_same():
    captions = [caption_of(seed) for seed in range(16)]
    assert captions == [caption_of(seed) for seed in range(16)]
    assert len(set(captions)) == 16
    for caption in captions:
        content = read_caption(caption)
        assert content.solids
        assert None not in (content.motion, content.ground, content.sky, content.camera), caption


def test_a_strip_shows_frames_side_by_side():
    clip = torch.linspace(-1, 1, 33)[None, :, None, None].expand(3, 33, 8, 16)
    pixels = strip(clip)
    assert pixels.size == (16 * len(SHOWN), 8)
    shown = [pixels.getpixel((16 * index + 5, 5)) for index in range(len(SHOWN))]
    assert shown == [(value,) * 3 for value in (0, 64, 128, 191, 255)]


def test_a_picture_has_every_strip_under_its_caption():
    colours = ("red", "lime", "blue")
    strips = [Image.new("RGB", (100, 20), colour) for colour in colours]
    whole = picture(strips, ["a long caption that needs two lines of the picture", "short", "another"])
    cell = 20 + LINES * LINE + GAP
    assert whole.size == (COLUMNS * (100 + GAP) - GAP, 2 * cell - GAP)
    for index, pixels in enumerate(strips):
        x, y = index % COLUMNS * (100 + GAP), index // COLUMNS * cell
        assert whole.getpixel((x + 50, y + LINES * LINE + 10)) == pixels.getpixel((0, 0))
        caption = whole.crop((x, y, x + 100, y + LINES * LINE)).convert("L")
        assert min(caption.tobytes()) < 128  # letters


def test_a_caption_is_broken_between_words():
    font = ImageFont.load_default(10)
    lines = lines_of("several words that do not fit into one line at all", font, 120)
    assert len(lines) == LINES
    assert all(font.getlength(line) <= 120 for line in lines)
    assert lines_of("one", font, 120) == ["one"]
