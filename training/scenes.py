"""The flat training data: bouncing coloured forms, rendered from a seed on any device, with a caption for each clip."""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SIZE = 128  # pixels, both ways
EDGE = 2.0  # pixels over which an edge runs from outside to inside: an 8x autoencoder cannot carry sharper ones
MARGIN = 1.2  # an object's largest reach from its centre, in radii

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 40),
    "green": (40, 170, 60),
    "cyan": (50, 215, 230),
    "blue": (50, 100, 255),
    "purple": (150, 50, 200),
    "pink": (255, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "white": (242, 242, 242),
    "gray": (128, 128, 128),
    "navy": (15, 25, 95),
}
# Each form with its other names.
FORMS: dict[str, tuple[str, ...]] = {"circle": ("ball",), "square": ("box",), "triangle": (), "ring": ()}
VERBS = ("bouncing", "moving")
PLACES = ("on", "over", "in front of")


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes of one or two objects; where `count` is 1 the second object is not drawn.

    `background`, `count`: [B] int64. `colour`, `form`: [B, 2] int64, indices into the tables above. `radius`: [B, 2]
    in pixels. `start`: [B, 2, 2] in pixels (x, y). `velocity`: [B, 2, 2] in pixels a frame.
    """

    background: Tensor
    count: Tensor
    colour: Tensor
    form: Tensor
    radius: Tensor
    start: Tensor
    velocity: Tensor

    def to(self, device: torch.device | str) -> "Scenes":
        """The same scenes on another device."""
        return Scenes(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def __getitem__(self, index: slice | Tensor) -> "Scenes":
        """Some of the scenes."""
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def draw_scenes(number: int, generator: torch.Generator, objects: int | None = None) -> Scenes:
    """Draw `number` scenes from a CPU generator, with exactly `objects` objects, or two in two scenes of three.

    Two objects have different colours and start apart.
    """

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    first = integers(len(COLOURS), number)
    second = (first + 1 + integers(len(COLOURS) - 1, number)) % len(COLOURS)
    radius = uniform(14.0, 22.0, number, 2)
    low = (MARGIN * radius)[..., None]
    start = low + uniform(0.0, 1.0, number, 2, 2) * (SIZE - 2 * low)
    # Of 64 candidate places for the second object, the first that is far enough away, else the farthest.
    candidates = low[:, 1, None] + uniform(0.0, 1.0, number, 64, 2) * (SIZE - 2 * low[:, 1, None])
    distance = (candidates - start[:, :1]).norm(dim=-1)
    apart = MARGIN * radius.sum(1, keepdim=True) + 12
    choice = torch.where(distance >= apart, distance.new_tensor(1e6), distance).argmax(1)
    start[:, 1] = candidates[torch.arange(number), choice]
    speed, angle = uniform(1.0, 3.0, number, 2), uniform(0.0, 2 * math.pi, number, 2)
    return Scenes(
        background=integers(len(BACKGROUNDS), number),
        count=torch.full((number,), objects) if objects else 2 - (integers(3, number) == 0).long(),
        colour=torch.stack([first, second], 1),
        form=integers(len(FORMS), number, 2),
        radius=radius,
        start=start,
        velocity=torch.stack([speed * angle.cos(), speed * angle.sin()], -1),
    )


def changed_scenes(before: Scenes, generator: torch.Generator) -> Scenes:
    """Other colours, forms, backgrounds and counts on the paths of `before`: what a changed prompt asks for."""
    after = draw_scenes(len(before.count), generator)
    return replace(after, radius=before.radius, start=before.start, velocity=before.velocity)


def positions(scenes: Scenes, num_frames: int) -> Tensor:
    """Centres [B, 2, T, 2] in pixels: straight paths, reflected so that no object leaves the frame."""
    low = (MARGIN * scenes.radius)[:, :, None, None]
    span = SIZE - 2 * low
    time = torch.arange(num_frames, device=low.device, dtype=low.dtype)[:, None]
    unfolded = scenes.start[:, :, None] - low + scenes.velocity[:, :, None] * time
    return low + span - (unfolded.remainder(2 * span) - span).abs()


def signed_distance(form: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels (negative inside) of the points (x, y) from the edge of a form centred at 0."""
    if form == "circle":
        return torch.hypot(x, y) - radius
    if form == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * radius
    if form == "triangle":  # equilateral, tip up; image rows grow downwards
        return torch.maximum(y, 0.5 * math.sqrt(3) * x.abs() - 0.5 * y) - 0.5 * MARGIN * radius
    return (torch.hypot(x, y) - 0.825 * radius).abs() - 0.275 * radius


def render(scenes: Scenes, num_frames: int) -> Tensor:
    """Render clips [B, 3, T, 128, 128] in [-1, 1] on the scenes' device; the first object covers the second."""
    device = scenes.radius.device
    colours = torch.tensor(list(COLOURS.values()), device=device) / 127.5 - 1
    backgrounds = torch.tensor(list(BACKGROUNDS.values()), device=device) / 127.5 - 1
    pixels = torch.arange(SIZE, device=device) + 0.5
    centres = positions(scenes, num_frames)
    clip = backgrounds[scenes.background][:, :, None, None, None].expand(-1, -1, num_frames, SIZE, SIZE)
    for item in (1, 0):
        x = pixels - centres[:, item, :, 0, None, None]
        y = pixels[:, None] - centres[:, item, :, 1, None, None]
        radius, form = scenes.radius[:, item, None, None, None], scenes.form[:, item, None, None, None]
        distance = torch.zeros((), device=device)
        for index, name in enumerate(FORMS):
            distance = torch.where(form == index, signed_distance(name, x, y, radius), distance)
        cover = (0.5 - distance / EDGE).clamp(0, 1) * (scenes.count > item)[:, None, None, None]
        clip = clip + cover[:, None] * (colours[scenes.colour[:, item]][:, :, None, None, None] - clip)
    return clip


def captions(scenes: Scenes, generator: torch.Generator | None = None) -> list[str]:
    """One caption a scene: "a red circle and a blue ring bouncing on a black background"; with a generator, reworded.

    Half of the reworded captions keep that wording; the others draw a form's other name, the verb and the place.
    """
    colours, backgrounds, forms = list(COLOURS), list(BACKGROUNDS), list(FORMS)
    number = len(scenes.count)
    wording = torch.zeros(number, 4) if generator is None else torch.rand(number, 4, generator=generator)
    texts = []
    rows = (scenes.background, scenes.count, scenes.colour, scenes.form, wording)
    for background, count, colour, form, (keep, *choices) in zip(*(row.tolist() for row in rows), strict=True):
        form_choice, verb_choice, place_choice = choices if keep > 0.5 else (0.0, 0.0, 0.0)
        items = []
        for item in range(count):
            names = (forms[form[item]], *FORMS[forms[form[item]]])
            article = "an" if colours[colour[item]] == "orange" else "a"
            items.append(f"{article} {colours[colour[item]]} {names[int(form_choice * len(names))]}")
        verb, place = VERBS[int(verb_choice * len(VERBS))], PLACES[int(place_choice * len(PLACES))]
        texts.append(f"{' and '.join(items)} {verb} {place} a {backgrounds[background]} background")
    return texts


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = {"a", "an", "and", "background", *COLOURS, *BACKGROUNDS, *FORMS, *VERBS}
    words.update(name for names in FORMS.values() for name in names)
    words.update(word for place in PLACES for word in place.split())
    return sorted(words)
