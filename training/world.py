"""The small world: shaded solids on a ground under a sky, seen by a moving camera; drawn from seeds, with captions.

Solids are signed distances, found by sphere tracing. Lengths are in units of a typical solid's diameter, times in
seconds; y points up and the ground is y = 0. Frames are rendered in blocks of `BLOCK`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from training.scenes import COLOURS

FPS = 16
SOLIDS = 3  # the most of a scene
FORMS = ("ball", "cube", "cylinder", "cone", "ring")
MATERIALS = ("matte", "shiny", "striped", "chequered")
GROUNDS = ("grass", "sand", "snow", "stone", "wood", "water")
SKIES = ("noon", "sunset", "night", "overcast", "fog")
MOTIONS = ("rolling", "bouncing", "circling", "rising", "resting")
CAMERAS = ("still", "pan left", "pan right", "dolly in", "orbit")

BLOCK = 32  # frames rendered at once: one compiled kernel, whatever the length of the clips
OVERSAMPLED = 2  # rays a pixel, each way
MARCH_STEPS, SHADOW_STEPS = 18, 10
FAR = 40.0

_GROUND_COLOURS = (
    ((0.22, 0.50, 0.16), (0.30, 0.60, 0.22)),
    ((0.80, 0.68, 0.44), (0.88, 0.77, 0.54)),
    ((0.86, 0.90, 0.96), (0.96, 0.97, 1.00)),
    ((0.46, 0.46, 0.48), (0.60, 0.60, 0.61)),
    ((0.42, 0.25, 0.12), (0.55, 0.34, 0.18)),
    ((0.06, 0.26, 0.40), (0.12, 0.40, 0.54)),
)
# Horizon, zenith, light, ambient light; the direction of the light; how fast the distance fades.
_SKY_COLOURS = (
    ((0.74, 0.87, 0.98), (0.26, 0.52, 0.90), (1.00, 0.97, 0.90), (0.44, 0.48, 0.54)),
    ((0.99, 0.58, 0.28), (0.40, 0.22, 0.46), (1.00, 0.66, 0.40), (0.42, 0.32, 0.36)),
    ((0.10, 0.13, 0.28), (0.02, 0.03, 0.10), (0.52, 0.60, 0.80), (0.30, 0.32, 0.42)),
    ((0.72, 0.73, 0.75), (0.52, 0.54, 0.58), (0.46, 0.46, 0.47), (0.54, 0.55, 0.57)),
    ((0.84, 0.85, 0.86), (0.80, 0.81, 0.83), (0.36, 0.36, 0.36), (0.62, 0.62, 0.63)),
)
_LIGHTS = ((-0.45, 0.85, 0.35), (-0.80, 0.38, -0.40), (0.50, 0.60, -0.62), (-0.2, 0.95, 0.2), (-0.2, 0.95, 0.2))
_FADE = (0.012, 0.016, 0.016, 0.03, 0.16)


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
    """Draws scenes from a CPU generator, with exactly `solids` solids, or one to three (one in half of the scenes).

    Solids of one scene have different colours and stand side by side.
    """

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    drawn = torch.tensor([1, 1, 1, 2, 2, 3])[integers(6, number)]
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


def poses(worlds: Worlds, num_frames: int) -> tuple[Tensor, Tensor]:
    """Centres [B, T, 3, 3] of the solids, and the angles [B, T, 3] by which they have rolled about the z axis."""
    time = torch.arange(num_frames, device=worlds.size.device)[None, :, None] / FPS
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


def cameras(worlds: Worlds, num_frames: int) -> tuple[Tensor, Tensor]:
    """Where the camera stands [B, T, 3], and its axes right, up and forward as rows [B, T, 3, 3]."""
    time = torch.arange(num_frames, device=worlds.size.device)[None] / FPS
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


def render_worlds(worlds: Worlds, num_frames: int, height: int = 128, width: int = 128) -> Tensor:
    """Clips [B, 3, T, height, width] in [-1, 1] on the scenes' device."""
    centre, rolled = poses(worlds, num_frames)
    eye, axes = cameras(worlds, num_frames)
    device, number = centre.device, len(worlds.count)
    time = (torch.arange(num_frames, device=device) / FPS).expand(number, -1)
    colours = torch.tensor(list(COLOURS.values()), device=device)[worlds.colour] / 255
    there = torch.arange(SOLIDS, device=device) < worlds.count[:, None]

    def each_frame(values: Tensor) -> Tensor:
        return values[:, None].expand(-1, num_frames, *values.shape[1:]).flatten(0, 1)

    of_frames = [part.flatten(0, 1) for part in (time, eye, axes, centre, rolled)]
    of_clips = [worlds.size, worlds.yaw, worlds.form, worlds.material, colours, there, worlds.ground, worlds.sky]
    arguments = [*of_frames, *(each_frame(part) for part in of_clips)]
    frames = len(of_frames[0])
    missing = -frames % BLOCK if device.type == "cuda" else 0  # blocks of one size are compiled once
    padded = [torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) for part in arguments]
    blocks = zip(*(part.split(BLOCK) for part in padded), strict=True)
    picture = torch.cat([_shade(height, width, *block) for block in blocks])[:frames]
    clips: Tensor = (picture * 2 - 1).unflatten(0, (number, num_frames)).permute(0, 2, 1, 3, 4)
    return clips


@cache
def _compiled() -> Callable[..., Tensor]:
    # The whole of `_shade` is slow to compile: the distances are called some forty times a block.
    return torch.compile(_solid_distances, dynamic=False)


def _shade(
    height: int,
    width: int,
    time: Tensor,
    eye: Tensor,
    axes: Tensor,
    centre: Tensor,
    rolled: Tensor,
    size: Tensor,
    yaw: Tensor,
    form: Tensor,
    material: Tensor,
    colour: Tensor,
    there: Tensor,
    ground: Tensor,
    sky: Tensor,
) -> Tensor:
    """Frames [F, 3, height, width] in [0, 1]; each argument has F first, what a scene's three solids have then 3."""
    rows, columns = OVERSAMPLED * height, OVERSAMPLED * width
    across = (torch.arange(columns, device=eye.device) + 0.5 - columns / 2) / rows
    down = (torch.arange(rows, device=eye.device) + 0.5 - rows / 2) / rows
    lens = torch.stack(
        [
            across.expand(rows, -1),
            -down[:, None].expand(-1, columns),
            torch.full((rows, columns), 0.95, device=eye.device),
        ],
        -1,
    )
    ray = F.normalize(torch.einsum("hwi,fij->fhwj", lens, axes), dim=-1)
    solids = _Solids(centre, rolled, size, yaw, form, there)
    light = F.normalize(torch.tensor(_LIGHTS, device=eye.device), dim=-1)[sky][:, None, None]
    palette = torch.tensor(_SKY_COLOURS, device=eye.device)[sky][:, :, None, None]
    horizon, zenith, bright, ambient = palette.unbind(1)
    start = eye[:, None, None]

    def sky_colour(direction: Tensor) -> Tensor:
        share = direction[..., 1:2].clamp(min=0).sqrt()
        near = (direction * light).sum(-1, keepdim=True)
        disc = (
            torch.sigmoid((near - 0.992) * 900)
            * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], device=eye.device)[sky][:, None, None, None]
        )
        return torch.lerp(torch.lerp(horizon, zenith, share), torch.tensor([1.0, 0.97, 0.85], device=eye.device), disc)

    # The nearest of ground and solids.
    to_ground = torch.where(ray[..., 1] < -1e-4, -start[..., 1] / ray[..., 1].clamp(max=-1e-4), FAR)
    along, found = solids.march(start, ray)
    on_solid = found & (along < to_ground)
    depth = torch.where(on_solid, along, to_ground)[..., None]
    point = start + depth * ray
    normal_of_solid, which, local = solids.surface(point)
    normal = torch.where(on_solid[..., None], normal_of_solid, torch.tensor([0.0, 1.0, 0.0], device=eye.device))

    base, ripple = _ground_colour(point, ground, time)
    normal = torch.where((ground == GROUNDS.index("water"))[:, None, None, None] & ~on_solid[..., None], ripple, normal)
    chosen = F.one_hot(which, SOLIDS).to(ray.dtype)
    paint = torch.einsum("fhws,fsc->fhwc", chosen, colour)
    kind = (chosen * material[:, None, None].to(ray.dtype)).sum(-1)
    base = torch.where(on_solid[..., None], _painted(paint, kind, local), base)

    lit = (normal * light).sum(-1).clamp(min=0) * solids.shadow(point + 0.02 * normal, light)
    contact = 1 - 0.45 * torch.exp(-4 * solids.distance(point + 0.12 * normal).clamp(min=0)) * (~on_solid)
    colour_seen = base * (ambient * contact[..., None] + bright * 0.75 * lit[..., None])
    mirrored = ray - 2 * (ray * normal).sum(-1, keepdim=True) * normal
    glint = (mirrored * light).sum(-1).clamp(min=0) ** 24
    shiny = on_solid & (kind == MATERIALS.index("shiny"))
    wet = ~on_solid & (ground == GROUNDS.index("water"))[:, None, None]
    strength = 0.18 * shiny.to(ray.dtype) + 0.35 * wet.to(ray.dtype)
    colour_seen = torch.lerp(colour_seen, sky_colour(mirrored), strength[..., None])
    colour_seen = colour_seen + bright * (0.8 * shiny * glint * (lit > 0))[..., None]
    fade = 1 - torch.exp(-torch.tensor(_FADE, device=eye.device)[sky][:, None, None, None] * (depth - 3).clamp(min=0))
    seen = torch.where((depth < FAR), torch.lerp(colour_seen, horizon.expand_as(colour_seen), fade), sky_colour(ray))
    return F.avg_pool2d(seen.clamp(0, 1).permute(0, 3, 1, 2), OVERSAMPLED)


class _Solids:
    """The three solids of each of F frames as one signed distance."""

    def __init__(self, centre: Tensor, rolled: Tensor, size: Tensor, yaw: Tensor, form: Tensor, there: Tensor) -> None:
        self.centre, self.size, self.there = centre, size, there
        self.form = [form == index for index in range(len(FORMS))]
        self.rolled, self.yaw = (rolled.cos(), rolled.sin()), (yaw.cos(), yaw.sin())

    def local(self, point: Tensor, solid: int) -> Tensor:
        """Points [F, H, W, 3] as a solid sees them that stands upright at 0 with radius 1."""
        return _local(point, self.centre, self.size, *self.rolled, *self.yaw, solid)

    def of_each(self, point: Tensor) -> Tensor:
        """Distances [F, H, W, 3]."""
        distances = _compiled() if point.is_cuda else _solid_distances
        return distances(point, self.centre, self.size, self.there, *self.rolled, *self.yaw, *self.form)

    def distance(self, point: Tensor) -> Tensor:
        return self.of_each(point).amin(-1)

    def march(self, start: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
        """How far along each ray the first solid lies, and whether there is one."""
        along = torch.full_like(ray[..., 0], 1.5)
        for _ in range(MARCH_STEPS):
            along = along + self.distance(start + along[..., None] * ray).clamp(max=1.5)
        left = self.distance(start + along[..., None] * ray)
        return along, left < 0.02

    def shadow(self, point: Tensor, light: Tensor) -> Tensor:
        """How much of the light reaches a point, from 0 to 1."""
        along, open_ = torch.full_like(point[..., 0], 0.05), torch.ones_like(point[..., 0])
        for _ in range(SHADOW_STEPS):
            distance = self.distance(point + along[..., None] * light)
            open_ = torch.minimum(open_, 6 * distance / along)
            along = along + distance.clamp(0.05, 0.6)
        return open_.clamp(0, 1)

    def surface(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normals, the nearest solid, and where on it the points lie in its own frame."""
        distances = self.of_each(point)
        which = distances.argmin(-1)
        steps = torch.eye(3, device=point.device) * 0.01
        slope = torch.stack([self.distance(point + step) - distances.amin(-1) for step in steps], -1)
        local = torch.stack([self.local(point, solid) for solid in range(SOLIDS)], -2)
        return (
            F.normalize(slope, dim=-1),
            which,
            local.gather(-2, which[..., None, None].expand(*which.shape, 1, 3))[..., 0, :],
        )


def _local(
    point: Tensor, centre: Tensor, size: Tensor, cos: Tensor, sin: Tensor, cos_yaw: Tensor, sin_yaw: Tensor, solid: int
) -> Tensor:
    p = (point - centre[:, None, None, solid]) / size[:, None, None, solid, None]
    cos, sin, cos_yaw, sin_yaw = (part[:, solid, None, None] for part in (cos, sin, cos_yaw, sin_yaw))
    x, y, z = p.unbind(-1)
    x, y = cos * x + sin * y, cos * y - sin * x
    return torch.stack([cos_yaw * x + sin_yaw * z, y, cos_yaw * z - sin_yaw * x], -1)


def _solid_distances(
    point: Tensor,
    centre: Tensor,
    size: Tensor,
    there: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_yaw: Tensor,
    sin_yaw: Tensor,
    *form: Tensor,
) -> Tensor:
    found = []
    for solid in range(SOLIDS):
        distances = _distances(_local(point, centre, size, cos, sin, cos_yaw, sin_yaw, solid))
        distance = torch.full_like(point[..., 0], FAR)
        for is_form, of_form in zip(form, distances, strict=True):
            distance = torch.where((is_form & there)[:, solid, None, None], of_form, distance)
        found.append(distance * size[:, None, None, solid])
    return torch.stack(found, -1)


def _distances(p: Tensor) -> tuple[Tensor, ...]:
    """Signed distances of local points from each of `FORMS`, of radius 1."""
    x, y, z = p.unbind(-1)
    flat = torch.hypot(x, z)
    ball = p.norm(dim=-1) - 1
    beyond = p.abs() - 0.68
    cube = beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0) - 0.07
    side, lid = flat - 0.68, y.abs() - 0.75
    cylinder = torch.maximum(side, lid).clamp(max=0) + torch.hypot(side.clamp(min=0), lid.clamp(min=0)) - 0.05
    slant = flat * 0.894 + (y - 0.95) * 0.447  # a tip at 0.95, an opening of one to two
    cone = torch.maximum(slant, -0.8 - y)
    ring = torch.hypot(torch.hypot(x, y) - 0.70, z) - 0.30
    return ball, cube, cylinder, cone, ring


def _painted(paint: Tensor, kind: Tensor, local: Tensor) -> Tensor:
    """The solid's colour, striped or chequered where that is its material."""
    stripes = torch.sigmoid(14 * torch.sin(6.5 * local[..., 1] + 0.8))
    cells = torch.sigmoid(
        22
        * (torch.sin(4.6 * local[..., 0] + 0.8) * torch.sin(4.6 * local[..., 1] + 0.8) * torch.cos(3.0 * local[..., 2]))
    )
    second = torch.where((kind == MATERIALS.index("striped"))[..., None], torch.full_like(paint, 0.93), paint * 0.28)
    share = torch.where(
        kind == MATERIALS.index("striped"),
        stripes,
        torch.where(kind == MATERIALS.index("chequered"), cells, torch.ones_like(cells)),
    )
    return torch.lerp(second, paint, share[..., None])


def _ground_colour(point: Tensor, ground: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The ground's own colour, and the normals of its ripple."""
    x, z = point[..., 0], point[..., 2]
    far = torch.exp(-0.09 * (x.square() + z.square()).sqrt())  # patterns fade before they are finer than pixels
    wave = 2.2 * time[:, None, None]
    blades = torch.sin(5.1 * x + 1.3 * torch.sin(2.9 * z)) * torch.sin(4.3 * z + 1.7 * torch.sin(2.1 * x))
    dunes = torch.sin(3.2 * x + 0.9 * torch.sin(1.1 * z))
    drifts = torch.sin(1.1 * x + 0.4) * torch.sin(1.3 * z)
    flags = torch.tanh(9 * (torch.cos(math.pi * x).abs().minimum(torch.cos(math.pi * z).abs()) - 0.12))
    planks = torch.tanh(10 * (torch.sin(2.6 * x).abs() - 0.16)) * 0.7 + 0.3 * torch.sin(
        0.9 * z + 5 * torch.floor(x * 0.83)
    )
    swell = torch.sin(2.3 * x + wave) * torch.sin(1.7 * z + 0.7 * wave)
    pattern = torch.zeros_like(x)
    for index, one in enumerate((blades, dunes, drifts, flags, planks, swell)):
        pattern = torch.where((ground == index)[:, None, None], one, pattern)
    pairs = torch.tensor(_GROUND_COLOURS, device=point.device)[ground][:, :, None, None]
    colour = torch.lerp(pairs[:, 0], pairs[:, 1], (0.5 + 0.5 * pattern * far)[..., None])
    ripple = torch.stack(
        [0.10 * far * torch.cos(2.3 * x + wave), torch.ones_like(x), 0.10 * far * torch.cos(1.7 * z + 0.7 * wave)], -1
    )
    return colour, F.normalize(ripple, dim=-1)
