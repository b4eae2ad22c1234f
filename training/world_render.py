"""The small world in pixels: solids are signed distances, found by sphere tracing, in blocks of `BLOCK` frames."""

import math
from collections.abc import Callable, Iterable
from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.scenes import COLOURS
from training.world import FORMS, GROUNDS, LENS, MATERIALS, SOLIDS, Worlds, cameras, poses, times

BLOCK = 32  # frames rendered at once: one compiled kernel, whatever the length of the clips
OVERSAMPLED = 2  # rays a pixel, each way
MARCH_STEPS, SHADOW_STEPS = 18, 10
STRIDE = 2  # of these steps are one kernel
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
_DISC, _DISC_COLOUR = (1.0, 1.0, 1.0, 0.0, 0.0), (1.0, 0.97, 0.85)  # under which skies sun or moon are seen
_FADE = (0.012, 0.016, 0.016, 0.03, 0.16)


@cache
def _table(values: tuple[Any, ...], device: torch.device) -> Tensor:
    # Copied to the device once: each copy would wait for all that runs there.
    return torch.tensor(values, device=device)


@torch.no_grad()
def render_worlds(worlds: Worlds, num_frames: int, height: int = 128, width: int = 128, every: int = 1) -> Tensor:
    """Clips [B, 3, T, height, width] in [-1, 1] on the scenes' device: every `every`-th frame, so many of them."""
    centre, rolled = poses(worlds, num_frames, every)
    eye, axes = cameras(worlds, num_frames, every)
    device, number = centre.device, len(worlds.count)
    time = times(num_frames, every, device).expand(number, -1)
    colours = _table(tuple(COLOURS.values()), device)[worlds.colour] / 255
    there = torch.arange(SOLIDS, device=device) < worlds.count[:, None]

    def each_frame(values: Tensor) -> Tensor:
        return values[:, None].expand(-1, num_frames, *values.shape[1:]).flatten(0, 1)

    of_frames = [part.flatten(0, 1) for part in (time, eye, axes, centre, rolled)]
    sky = [_table(table, device)[worlds.sky] for table in (_LIGHTS, _SKY_COLOURS, _DISC, _FADE)]
    paints = _table(_GROUND_COLOURS, device)[worlds.ground]
    of_clips = [worlds.size, worlds.yaw, worlds.form, worlds.material, colours, there, worlds.ground, paints, *sky]
    arguments = [*of_frames, *(each_frame(part) for part in of_clips)]
    frames = len(of_frames[0])
    missing = -frames % BLOCK if device.type == "cuda" else 0  # blocks of one size are compiled once
    padded = [torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) for part in arguments]
    blocks = zip(*(part.split(BLOCK) for part in padded), strict=True)
    picture = torch.cat([_shade(height, width, *block) for block in blocks])[:frames]
    clips: Tensor = (picture * 2 - 1).unflatten(0, (number, num_frames)).permute(0, 2, 1, 3, 4)
    return clips


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # The whole of `_shade` is slow to compile: the distances are called some forty times a block.
    return torch.compile(function, dynamic=False)


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
    paints: Tensor,
    *sky: Tensor,
) -> Tensor:
    """Frames [F, 3, height, width] in [0, 1]; each argument has F first, what a scene's three solids have then 3."""

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        return (_compiled(function) if eye.is_cuda else function)(*arguments)

    forms = (form == index for index in range(len(FORMS)))
    solids = (centre, size, there, rolled.cos(), rolled.sin(), yaw.cos(), yaw.sin(), *forms)
    start, light = eye[:, None, None], F.normalize(sky[0], dim=-1)[:, None, None]
    ray = run(_rays, axes, OVERSAMPLED * height, OVERSAMPLED * width)
    along = torch.full_like(ray[..., 0], 1.5)
    for _ in range(MARCH_STEPS // STRIDE):
        along = run(_marched, start, along, ray, *solids)
    surface = run(_surface, start, along, ray, ground, time, paints, material, colour, *solids)
    lifted = surface[0] + 0.02 * surface[1]
    along, lit = torch.full_like(along, 0.05), torch.ones_like(along)
    for _ in range(SHADOW_STEPS // STRIDE):
        along, lit = run(_shadowed, lifted, along, lit, light, *solids)
    tables = (*sky, _table(_DISC_COLOUR, eye.device))
    picture: Tensor = run(_coloured, ray, lit, ground, light, tables, *surface)
    return picture


def _rays(axes: Tensor, rows: int, columns: int) -> Tensor:
    """Directions [F, rows, columns, 3] of length 1."""
    across = (torch.arange(columns, device=axes.device) + 0.5 - columns / 2) / rows
    down = (torch.arange(rows, device=axes.device) + 0.5 - rows / 2) / rows
    right, up, ahead = axes[:, None, None].unbind(-2)
    return F.normalize(across[:, None] * right - down[:, None, None] * up + LENS * ahead, dim=-1)


def _marched(start: Tensor, along: Tensor, ray: Tensor, *solids: Tensor) -> Tensor:
    """How far along each ray a few steps lead towards the first solid."""
    for _ in range(STRIDE):
        along = along + _distance_ahead(start, along, ray, *solids).clamp(max=1.5)
    return along


def _shadowed(point: Tensor, along: Tensor, lit: Tensor, light: Tensor, *solids: Tensor) -> tuple[Tensor, Tensor]:
    """How far a few steps lead towards the light, and how much of it, from 0 to 1, reaches the points."""
    for _ in range(STRIDE):
        distance = _distance_ahead(point, along, light, *solids)
        lit = torch.minimum(lit, 6 * distance / along)
        along = along + distance.clamp(0.05, 0.6)
    return along, lit


def _surface(
    start: Tensor,
    along: Tensor,
    ray: Tensor,
    ground: Tensor,
    time: Tensor,
    paints: Tensor,
    material: Tensor,
    colour: Tensor,
    *solids: Tensor,
) -> tuple[Tensor, ...]:
    """What rays meet first, ground or solids: point, normal, own colour, what contact leaves of the ambient light,
    depth, whether it is a solid, and whether that is shiny."""

    def total(parts: Iterable[Tensor]) -> Tensor:
        return reduce(torch.add, parts)

    to_ground = torch.where(ray[..., 1] < -1e-4, -start[..., 1] / ray[..., 1].clamp(max=-1e-4), FAR)
    found = _distance_ahead(start, along, ray, *solids) < 0.02
    on_solid = found & (along < to_ground)
    depth = torch.where(on_solid, along, to_ground)[..., None]
    point = start + depth * ray
    distances = _distance_of_each(point, *solids)
    which = distances.argmin(-1)
    axis = torch.arange(3, device=point.device)
    steps = [(axis == index) * 0.01 for index in range(3)]
    slope = torch.stack([_distance_of_each(point + step, *solids).amin(-1) - distances.amin(-1) for step in steps], -1)
    base, ripple = _ground_colour(point, ground, time, paints)
    wet = (ground == GROUNDS.index("water"))[:, None, None, None]
    flat = torch.where(wet, ripple, (axis == 1).to(ray.dtype))
    normal = torch.where(on_solid[..., None], F.normalize(slope, dim=-1), flat)
    centre, size, _, cos, sin, cos_yaw, sin_yaw, *_ = solids
    places = (_local(point, centre, size, cos, sin, cos_yaw, sin_yaw, solid) for solid in range(SOLIDS))
    chosen = [(which == solid).to(ray.dtype)[..., None] for solid in range(SOLIDS)]
    local = total(one * torch.stack(place, -1) for one, place in zip(chosen, places, strict=True))
    paint = total(one * colour[:, None, None, solid] for solid, one in enumerate(chosen))
    kind = total(one[..., 0] * material[:, None, None, solid].to(ray.dtype) for solid, one in enumerate(chosen))
    base = torch.where(on_solid[..., None], _painted(paint, kind, local), base)
    near = _distance_of_each(point + 0.12 * normal, *solids).amin(-1).clamp(min=0)
    contact = 1 - 0.45 * torch.exp(-4 * near) * (~on_solid)
    return point, normal, base, contact, depth, on_solid, on_solid & (kind == MATERIALS.index("shiny"))


def _coloured(
    ray: Tensor,
    lit: Tensor,
    ground: Tensor,
    light: Tensor,
    sky: tuple[Tensor, ...],
    point: Tensor,
    normal: Tensor,
    base: Tensor,
    contact: Tensor,
    depth: Tensor,
    on_solid: Tensor,
    shiny: Tensor,
) -> Tensor:
    """Frames [F, 3, height, width] in the light that reaches them."""
    _, palette, disc, haze, disc_colour = sky
    horizon, zenith, bright, ambient = palette[:, :, None, None].unbind(1)

    def sky_colour(direction: Tensor) -> Tensor:
        share = direction[..., 1:2].clamp(min=0).sqrt()
        near = (direction * light).sum(-1, keepdim=True)
        seen = torch.sigmoid((near - 0.992) * 900) * disc[:, None, None, None]
        plain = torch.lerp(horizon, zenith, share)
        return torch.lerp(plain, disc_colour, seen)

    lit = (normal * light).sum(-1).clamp(min=0) * lit.clamp(0, 1)
    colour_seen = base * (ambient * contact[..., None] + bright * 0.75 * lit[..., None])
    mirrored = ray - 2 * (ray * normal).sum(-1, keepdim=True) * normal
    glint = (mirrored * light).sum(-1).clamp(min=0) ** 24
    wet = ~on_solid & (ground == GROUNDS.index("water"))[:, None, None]
    strength = 0.18 * shiny.to(ray.dtype) + 0.35 * wet.to(ray.dtype)
    colour_seen = torch.lerp(colour_seen, sky_colour(mirrored), strength[..., None])
    colour_seen = colour_seen + bright * (0.8 * shiny * glint * (lit > 0))[..., None]
    fade = 1 - torch.exp(-haze[:, None, None, None] * (depth - 3).clamp(min=0))
    seen = torch.where((depth < FAR), torch.lerp(colour_seen, horizon.expand_as(colour_seen), fade), sky_colour(ray))
    return F.avg_pool2d(seen.clamp(0, 1).permute(0, 3, 1, 2), OVERSAMPLED)


def _local(
    point: Tensor, centre: Tensor, size: Tensor, cos: Tensor, sin: Tensor, cos_yaw: Tensor, sin_yaw: Tensor, solid: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Points [F, H, W, 3] as a solid sees them that stands upright at 0 with radius 1: x, y, z."""
    x, y, z = ((point[..., i] - centre[:, None, None, solid, i]) / size[:, None, None, solid] for i in range(3))
    cos, sin, cos_yaw, sin_yaw = (part[:, solid, None, None] for part in (cos, sin, cos_yaw, sin_yaw))
    x, y = cos * x + sin * y, cos * y - sin * x
    return cos_yaw * x + sin_yaw * z, y, cos_yaw * z - sin_yaw * x


def _distances(
    point: Tensor,
    centre: Tensor,
    size: Tensor,
    there: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_yaw: Tensor,
    sin_yaw: Tensor,
    *form: Tensor,
) -> list[Tensor]:
    found = []
    for solid in range(SOLIDS):
        distances = _of_forms(*_local(point, centre, size, cos, sin, cos_yaw, sin_yaw, solid))
        distance = torch.full_like(point[..., 0], FAR)
        for is_form, of_form in zip(form, distances, strict=True):
            distance = torch.where((is_form & there)[:, solid, None, None], of_form, distance)
        found.append(distance * size[:, None, None, solid])
    return found


def _distance_of_each(point: Tensor, *solids: Tensor) -> Tensor:
    return torch.stack(_distances(point, *solids), -1)


def _distance_ahead(start: Tensor, along: Tensor, ray: Tensor, *solids: Tensor) -> Tensor:
    return reduce(torch.minimum, _distances(start + along[..., None] * ray, *solids))


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()  # lengths of scenes do not overflow: torch's takes care of that, and is slow


def _of_forms(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Signed distances of local points from each of `FORMS`, of radius 1; no axis is stacked, so that all fuses."""
    flat = _hypot(x, z)
    ball = _hypot(flat, y) - 1
    beyond = [part.abs() - 0.68 for part in (x, y, z)]
    outside = reduce(_hypot, [part.clamp(min=0) for part in beyond])
    cube = outside + reduce(torch.maximum, beyond).clamp(max=0) - 0.07
    side, lid = flat - 0.68, y.abs() - 0.75
    cylinder = torch.maximum(side, lid).clamp(max=0) + _hypot(side.clamp(min=0), lid.clamp(min=0)) - 0.05
    slant = flat * 0.894 + (y - 0.95) * 0.447  # a tip at 0.95, an opening of one to two
    cone = torch.maximum(slant, -0.8 - y)
    ring = _hypot(_hypot(x, y) - 0.70, z) - 0.30
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


def _ground_colour(point: Tensor, ground: Tensor, time: Tensor, paints: Tensor) -> tuple[Tensor, Tensor]:
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
    pairs = paints[:, :, None, None]
    colour = torch.lerp(pairs[:, 0], pairs[:, 1], (0.5 + 0.5 * pattern * far)[..., None])
    ripple = torch.stack(
        [0.10 * far * torch.cos(2.3 * x + wave), torch.ones_like(x), 0.10 * far * torch.cos(1.7 * z + 0.7 * wave)], -1
    )
    return colour, F.normalize(ripple, dim=-1)
