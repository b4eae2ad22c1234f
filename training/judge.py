"""A judge of clips that is a program: which colours, forms and background are seen, frame by frame and over a clip.

Colour: every pixel is given to the nearest colour of the palette, if that is near. Form: the template, of the mask's
own area at its own centre, that overlaps a colour's mask best. Nothing in it is learned, and it knows no caption.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.scenes import BACKGROUNDS, COLOURS, FORMS, MARGIN, SIZE, Scenes, signed_distance

NEAR = 60.0  # a pixel's largest distance from its colour, in 8-bit RGB; the palette keeps over 80 between two
LEAST_PIXELS = 120  # of a colour to be seen: blended edges give fewer, the smallest object over 300
# Area in radii squared, in the order of FORMS.
AREAS = {
    "circle": math.pi,
    "square": 3.24,
    "triangle": 0.75 * math.sqrt(3) * MARGIN**2,
    "ring": math.pi * (1.21 - 0.3025),
}


@dataclass(frozen=True)
class Verdict:
    """What is right, at frame 0 and over the clip; `forms` has one entry a named object, the others one a clip.

    Colours are right if exactly the named ones are seen. Over a clip, what most of its frames say counts; a form is
    read only where no other object touches it, if there is such a frame.
    """

    colours: Tensor
    forms: Tensor
    background: Tensor
    colours_first: Tensor
    forms_first: Tensor
    background_first: Tensor

    def everything(self) -> Tensor:
        """Clips [B] of which all is right, at frame 0 and over the clip."""
        named = self.forms.flatten(1).all(1) & self.forms_first.flatten(1).all(1)
        single = self.colours & self.background & self.colours_first & self.background_first
        return named & single


def judge(clip: Tensor, scenes: Scenes) -> Verdict:
    """Judge clips [B, 3, T, 128, 128] in [-1, 1] against the captions' content, on the clips' device.

    `forms` and `forms_first` are [B, 2] bool; the second is true where a scene has one object.
    """
    scenes = scenes.to(clip.device)
    labels = torch.stack([_labels(frames) for frames in clip])
    counts = torch.stack([(labels == index).sum((-1, -2)) for index in range(len(COLOURS) + len(BACKGROUNDS))], -1)
    seen = counts[..., : len(COLOURS)] >= LEAST_PIXELS
    background = counts[..., len(COLOURS) :].argmax(-1)
    named = torch.zeros_like(seen[:, 0]).scatter_(1, scenes.colour[:, :1], True)
    two = scenes.count == 2
    named[two] = named[two].scatter(1, scenes.colour[two, 1:], True)

    masks = labels[:, :, None] == scenes.colour[:, None, :, None, None]  # [B, T, 2, H, W]
    votes = torch.nn.functional.one_hot(_forms(masks), len(FORMS))
    votes = votes * (masks.sum((-1, -2)) >= LEAST_PIXELS)[..., None]
    clear = (votes * (~_touching(masks) | ~two[:, None])[..., None, None]).sum(1)
    over_clip = torch.where(clear.sum(-1, keepdim=True) > 0, clear, votes.sum(1))
    absent = torch.tensor([False, True], device=clip.device) & ~two[:, None]

    def form_right(vote: Tensor) -> Tensor:
        return (vote.argmax(-1) == scenes.form) & (vote.sum(-1) > 0) | absent

    most = clip.shape[2] / 2
    return Verdict(
        colours=((seen.sum(1) > most) == named).all(-1),
        forms=form_right(over_clip),
        background=background.mode(1).values == scenes.background,
        colours_first=(seen[:, 0] == named).all(-1),
        forms_first=form_right(votes[:, 0]),
        background_first=background[:, 0] == scenes.background,
    )


def background_colour(frames: Tensor) -> Tensor:
    """Mean background colour, [3] in 0 to 255, of frames [3, T, H, W] in [-1, 1]: of what is near each frame's median.

    The background fills more than half of every frame, so the median lies in it, whatever it has drifted to.
    """
    pixels = (frames.flatten(2) + 1) * 127.5
    median = pixels.median(-1, keepdim=True).values
    near = (pixels - median).abs().amax(0) < 40
    return (pixels * near).sum((1, 2)) / near.sum()


def _labels(frames: Tensor) -> Tensor:
    """Palette index of each pixel of [3, T, H, W], or -1; backgrounds come after the colours."""
    palette = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()], device=frames.device, dtype=torch.float32)
    pixels = (frames.float().permute(1, 2, 3, 0) + 1) * 127.5
    distance, label = torch.cdist(pixels.reshape(-1, 3), palette).min(-1)
    return torch.where(distance < NEAR, label, -1).view(pixels.shape[:3])


def _forms(masks: Tensor) -> Tensor:
    """Index into FORMS of the best template for each mask of [..., H, W]."""
    pixels = torch.arange(SIZE, device=masks.device) + 0.5
    area = masks.sum((-1, -2)).clamp(min=1)
    x = pixels - ((masks.sum(-2) * pixels).sum(-1) / area)[..., None, None]
    y = pixels[:, None] - ((masks.sum(-1) * pixels).sum(-1) / area)[..., None, None]
    overlaps = []
    for form, unit_area in AREAS.items():
        template = signed_distance(form, x, y, (area / unit_area).sqrt()[..., None, None]) < 0
        overlaps.append((template & masks).sum((-1, -2)) / (template | masks).sum((-1, -2)).clamp(min=1))
    return torch.stack(overlaps, -1).argmax(-1)


def _touching(masks: Tensor) -> Tensor:
    """Frames [B, T] in which the boxes around the two masks of [B, T, 2, H, W], two pixels wider, overlap."""
    overlap = torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)
    for dim in (-1, -2):
        extent = masks.any(dim)  # along the other axis
        index = torch.arange(SIZE, device=masks.device)
        low = torch.where(extent, index, SIZE).amin(-1) - 2
        high = torch.where(extent, index, -1).amax(-1) + 2
        overlap &= (low[..., 0] <= high[..., 1]) & (low[..., 1] <= high[..., 0])
    return overlap
