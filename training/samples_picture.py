"""The card's picture: samples of a model from unpicked captions, a strip of frames each, under their captions.

    python training/samples_picture.py --output edit_ray/assets/tiny_wan/samples.jpg
    python training/samples_picture.py --model DIR --size 96 160 --seeds 4 --output wide.jpg

Sample i has the scene, the wording and the noise of seed i, so nothing is chosen. On two cores of a CPU: 4 minutes.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

from edit_ray import EditWanPipeline
from training.captions import named, worded
from training.sampling import NUM_FRAMES, STEPS, decode, sample_latents
from training.world import draw_worlds

SHOWN = (0, 8, 16, 24, 32)  # frames of a strip
COLUMNS = 2  # of strips
GAP, LINE, LETTERS = 8, 13, 10  # pixels: between strips, of a line of a caption and of its letters
LINES = 2  # of a caption


def caption_of(seed: int) -> str:
    """The seed's caption, whole and reworded."""
    (content,) = named(draw_worlds(1, torch.Generator().manual_seed(seed)))
    return worded(content, random.Random(seed))


def strip(clip: Tensor) -> Image.Image:
    """Some frames of a clip [3, T, H, W] in [-1, 1], side by side."""
    frames = [clip[:, index] for index in SHOWN if index < clip.shape[1]]
    pixels = (torch.cat(frames, 2).clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def picture(strips: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Strips of one size in columns, read row by row, each under its caption."""
    width, height = strips[0].width + GAP, strips[0].height + GAP + LINES * LINE
    rows = -(-len(strips) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * width - GAP, rows * height - GAP), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(LETTERS)
    for index, (pixels, caption) in enumerate(zip(strips, captions, strict=True)):
        x, y = index % COLUMNS * width, index // COLUMNS * height
        for at, line in enumerate(lines_of(f"{index}: {caption}", font, pixels.width)):
            draw.text((x, y + at * LINE), line, "black", font)
        whole.paste(pixels, (x, y + LINES * LINE))
    return whole


def lines_of(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines that are no wider, as far as its words allow; what needs more than `LINES` is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:LINES]


def main() -> None:
    """Sample and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny_wan", help="what EditWanPipeline.from_pretrained takes")
    parser.add_argument("--output", type=Path, required=True, help="the picture; its suffix says the format")
    parser.add_argument("--seeds", type=int, default=16, help="how many, from 0 on")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--negative", help="a negative prompt")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    pipe = EditWanPipeline.from_pretrained(args.model, torch_dtype=torch.float32, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    captions, strips = [caption_of(seed) for seed in range(args.seeds)], []
    negative = [args.negative] if args.negative else None
    for seed, caption in enumerate(captions):  # one by one: a CPU gains nothing by a batch
        latents = sample_latents(
            pipe,
            [caption],
            [seed],
            num_inference_steps=args.steps,
            negative_prompts=negative,
            size=tuple(args.size),
            num_frames=NUM_FRAMES,
        )
        strips.append(strip(decode(pipe, latents)[0].cpu()))
        print(f"{seed}: {caption}", flush=True)
    picture(strips, captions).save(args.output, quality=90)


if __name__ == "__main__":
    main()
