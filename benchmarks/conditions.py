"""What the embedded model makes of a picture and of a video: four rows of frames in one picture.

    python benchmarks/conditions.py docs/conditions.png

Rows: a video from its prompt alone; another that begins with that video's last frame (`image`); and that video again
with another prompt, half and most of the steps made anew (`video`, `strength`).
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import numpy as np
import torch
from PIL import Image

from edit_ray import EditWanPipeline

CALL: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 12, "guidance_scale": 4.0}
SHOWN, EDGE = range(0, 17, 2), 2


def main() -> None:
    """Make the videos, and save some frames of each."""
    torch.set_num_threads(1)
    pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    red, blue = (f"a {colour} circle bouncing on a black background" for colour in ("red", "blue"))

    def make(prompt: str, seed: int = 7, **given: Any) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(seed)
        frames: list[Image.Image] = pipe(prompt, **CALL, **given, output_type="pil", generator=generator)[0]
        return frames

    first = make(red)
    rows = [first, make(red, image=first[-1])]
    rows += [make(blue, video=first, strength=strength) for strength in (0.5, 0.8)]
    edge = ((EDGE, EDGE), (EDGE, EDGE), (0, 0))
    framed = [[np.pad(np.asarray(row[at]), edge, constant_values=255) for at in SHOWN] for row in rows]
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in framed])).save(sys.argv[1])


if __name__ == "__main__":
    main()
