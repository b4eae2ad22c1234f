"""The small world: shaded solids on a ground under a sky, seen by a moving camera; drawn from seeds.

Lengths are in units of a typical solid's diameter, times in seconds; y points up and the ground is y = 0.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from training.scenes import COLOURS

FPS = 16
LENS = 0.95  # focal length, in heights of the frame
SOLIDS = 3  # the most of a scene
FORMS = ("ball", "cube", "cylinder", "cone", "ring")
MATERIALS = ("matte", "shiny", "striped", "chequered")
GROUNDS = ("grass", "sand", "snow", "stone", "wood", "water")
SKIES = ("noon", "sunset", "night", "overcast", "fog")
MOTIONS = ("rolling", "bouncing", "circling", "rising", "resting")
CAMERAS = ("still", "pan left", "pan right", "dolly in", "orbit")


@dataclass(frozen=True)
class Worlds:
    """A batch of B scenes. [B] int64: `count`, `ground`, `sky`, `motion`, `camera`, indices into the tables above.

    [B, 3] int64: `colour`, `form`, `material`. [B, 3] float: `size` (radius), `yaw`, `phase` (radians). `place`, x and
    z: [B, 3, 2].
    """

    count: Tensor
    ground: Tensor
    sky: Tensor
    motion: Tensor
    camera: Tensor
    colour: Tensor
    form: Tensor
    material: Tensor
    size: Tensor
    yaw: Tensor
    phase: Tensor
    place: Tensor

    def to(self, device: torch.device | str) -> "Worlds":
        """The same scenes on another device."""
        return Worlds(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def __getitem__(self, index: slice | Tensor) -> "Worlds":
        """Some of the scenes."""
        return Worlds(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def draw_worlds(number: int, generator: torch.Generator, solids: int | None = None) -> Worlds:
    """Draws scenes from a CPU generator, with exactly `solids` solids, or one to three (two in half of the scenes).

    Solids of one scene have different colours and stand side by side.
    """

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    drawn = torch.tensor([1, 1, 2, 2, 2, 3])[integers(6, number)]
    count = drawn if solids is None else torch.full((number,), solids)
    colour = torch.stack([torch.randperm(len(COLOURS), generator=generator)[:SOLIDS] for _ in range(number)])
    order = torch.stack([torch.randperm(SOLIDS, generator=generator) for _ in range(number)])
    slots = torch.tensor([[0.0, 0.0, 0.0], [-0.85, 0.85, 0.0], [-1.35, 0.0, 1.35]])[count - 1]
    x = torch.where(count[:, None] == SOLIDS, slots.gather(1, order), slots) + uniform(-0.12, 0.12, number, SOLIDS)
    return Worlds(
        count=count,
        ground=integers(len(GROUNDS), number),
        sky=integers(len(SKIES), number),
        motion=integers(len(MOTIONS), number),
        camera=integers(len(CAMERAS), number),
        colour=colour,
        form=integers(len(FORMS), number, SOLIDS),
        material=integers(len(MATERIALS), number, SOLIDS),
        size=uniform(0.52, 0.66, number, SOLIDS) * (1 - 0.08 * (count[:, None] - 1)),
        yaw=uniform(-0.6, 0.6, number, SOLIDS),
        phase=uniform(0.0, 2 * math.pi, number, SOLIDS),
        place=torch.stack([x, uniform(-0.25, 0.25, number, SOLIDS)], -1),
    )


def times(num_frames: int, every: int, device: torch.device) -> Tensor:
    """The times [T] of every `every`-th frame of a clip."""
    return torch.arange(num_frames, device=device) * every / FPS


def changed_worlds(before: Worlds, generator: torch.Generator) -> Worlds:
    """What a changed prompt asks for: other skies and, in half of the scenes, another ground and other solids.

    Places, motion and camera stay, so that one shot runs through.
    """
    after = draw_worlds(len(before.count), generator)
    same = torch.rand(len(before.count), generator=generator) < 0.5
    solids = {
        name: torch.where(same[:, None], getattr(before, name), getattr(after, name))
        for name in ("colour", "form", "material")
    }
    return replace(before, sky=after.sky, ground=torch.where(same, before.ground, after.ground), **solids)


def poses(worlds: Worlds, num_frames: int, every: int = 1) -> tuple[Tensor, Tensor]:
    """Centres [B, T, 3, 3] of the solids, and the angles [B, T, 3] by which they have rolled about the z axis."""
    time = times(num_frames, every, worlds.size.device)[None, :, None]
    motion, size, phase = worlds.motion[:, None, None], worlds.size[:, None], worlds.phase[:, None]
    x, z = worlds.place[:, None, :, 0], worlds.place[:, None, :, 1]
    rest = size * torch.tensor([1.0, 0.75, 0.8, 0.8, 1.0], device=size.device)[worlds.form][:, None]
    sway = 0.55 * torch.sin(1.5 * time + phase)
    turn = 1.3 * time + phase[..., :1]  # all on one circle, so that none meets another
    around = 0.75 + 0.25 * worlds.count[:, None, None] / SOLIDS
    angle = turn + 2 * math.pi * torch.arange(SOLIDS, device=size.device) / worlds.count[:, None, None]
    x = torch.where(motion == 0, x + sway, torch.where(motion == 2, around * torch.cos(angle), x.expand_as(sway)))
    z = torch.where(motion == 2, around * torch.sin(angle), z.expand_as(sway))
    hop = 1.1 * torch.sin(2.4 * time + phase).abs()
    rise = 1.1 * (1 - torch.exp(-time / 2.5)).expand_as(sway)
    y = rest + torch.where(motion == 1, hop, torch.where(motion == 3, rise, torch.zeros_like(sway)))
    rolled = torch.where(motion == 0, -sway / size, torch.zeros_like(sway))
    return torch.stack([x, y, z], -1), rolled


def cameras(worlds: Worlds, num_frames: int, every: int = 1) -> tuple[Tensor, Tensor]:
    """Where the camera stands [B, T, 3], and its axes right, up and forward as rows [B, T, 3, 3]."""
    time = times(num_frames, every, worlds.size.device)[None]
    kind, zero = worlds.camera[:, None], torch.zeros_like(worlds.camera[:, None] * time)
    late = 1 - torch.exp(-time / 2.5)
    azimuth = torch.where(kind == 4, 0.45 * time, zero)
    distance = 4.5 - torch.where(kind == 3, 1.6 * late, zero)
    pan = torch.where(kind == 1, -0.36 * late, torch.where(kind == 2, 0.36 * late, zero))
    eye = torch.stack([distance * azimuth.sin(), 1.7 + zero, distance * azimuth.cos()], -1)
    target = torch.tensor([0.0, 0.75, 0.0], device=zero.device) - eye
    forward = torch.stack(
        [
            target[..., 0] * pan.cos() - target[..., 2] * pan.sin(),
            target[..., 1],
            target[..., 0] * pan.sin() + target[..., 2] * pan.cos(),
        ],
        -1,
    )
    forward = F.normalize(forward, dim=-1)
    right = F.normalize(torch.stack([-forward[..., 2], zero, forward[..., 0]], -1), dim=-1)
    return eye, torch.stack([right, torch.linalg.cross(right, forward), forward], -2)
