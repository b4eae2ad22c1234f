"""The small world in words: captions of many wordings, and what a caption names.

What a caption leaves out is left open. Now and then one is a mere fragment, such as "at night": negative prompts are.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from training.scenes import COLOURS
from training.world import CAMERAS, FORMS, GROUNDS, MATERIALS, MOTIONS, SKIES, Worlds

# Each entry's wordings, the plain one first.
FORM_WORDS: Mapping[str, tuple[str, ...]] = {
    "ball": ("ball", "sphere"),
    "cube": ("cube", "block"),
    "cylinder": ("cylinder", "drum"),
    "cone": ("cone",),
    "ring": ("ring", "hoop"),
}
MATERIAL_WORDS: Mapping[str, tuple[str, ...]] = {
    "matte": ("matte", "plain"),
    "shiny": ("shiny", "glossy"),
    "striped": ("striped",),
    "chequered": ("chequered", "checkered"),
}
PART_WORDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "motion": {
        "rolling": ("rolling", "rolling to and fro"),
        "bouncing": ("bouncing", "hopping"),
        "circling": ("circling", "going round in circles"),
        "rising": ("rising", "floating up"),
        "resting": ("resting", "standing"),
    },
    "ground": {
        "grass": ("on grass", "on the grass", "on a meadow"),
        "sand": ("on sand", "on the sand", "on a beach"),
        "snow": ("on snow", "on the snow", "in the snow"),
        "stone": ("on stone", "on a stone floor", "on flagstones"),
        "wood": ("on wood", "on a wooden floor", "on planks"),
        "water": ("on water", "on the water", "on a lake"),
    },
    "sky": {
        "noon": ("at noon", "under a noon sky", "by day"),
        "sunset": ("at sunset", "under a sunset sky", "at dusk"),
        "night": ("at night", "under a night sky", "by moonlight"),
        "overcast": ("under an overcast sky", "under a cloudy sky", "under clouds"),
        "fog": ("in fog", "in the fog", "in mist"),
    },
    "camera": {
        "still": ("the camera is still", "still camera"),
        "pan left": ("the camera pans left", "the camera pans to the left", "pan left"),
        "pan right": ("the camera pans right", "the camera pans to the right", "pan right"),
        "dolly in": ("the camera moves in", "the camera dollies in", "dolly in"),
        "orbit": ("the camera orbits", "the camera orbits around", "orbit"),
    },
}
# Phrases, joined by commas, of parts; the plain order first.
ORDERS = (
    (("solids", "motion", "ground", "sky"), ("camera",)),
    (("sky",), ("solids", "motion", "ground"), ("camera",)),
    (("camera",), ("solids", "motion", "ground", "sky")),
    (("ground", "sky"), ("solids", "motion"), ("camera",)),
)
Choice = TypeVar("Choice")
PLAIN, LEFT_OUT, FRAGMENTS = 0.5, 0.1, 0.1  # shares: of the captions, of the parts, of the captions


@dataclass(frozen=True)
class Named:
    """What a caption names: (colour, form, material) of each solid, and the rest; None is left open."""

    solids: tuple[tuple[str, str, str | None], ...] = ()
    motion: str | None = None
    ground: str | None = None
    sky: str | None = None
    camera: str | None = None


def named(worlds: Worlds) -> list[Named]:
    """All that can be said of each scene."""
    colours, rows = list(COLOURS), []
    solids = (worlds.count, worlds.colour, worlds.form, worlds.material)
    parts = (worlds.motion, worlds.ground, worlds.sky, worlds.camera)
    for count, colour, form, material, *rest in zip(*(part.tolist() for part in (*solids, *parts)), strict=True):
        tables = zip((MOTIONS, GROUNDS, SKIES, CAMERAS), rest, strict=True)
        each = ((colours[colour[i]], FORMS[form[i]], MATERIALS[material[i]]) for i in range(count))
        rows.append(Named(tuple(each), *(table[index] for table, index in tables)))
    return rows


def thinned(whole: Named, draw: random.Random) -> Named:
    """The same with some parts left open, or a fragment of it."""
    if draw.random() < FRAGMENTS:
        part = draw.choice(["solids", *PART_WORDS])
        return Named(**{part: getattr(whole, part)})
    solids = tuple((c, f, m if draw.random() >= 2 * LEFT_OUT else None) for c, f, m in whole.solids)
    return replace(whole, solids=solids, **{part: None for part in PART_WORDS if draw.random() < LEFT_OUT})


def worded(content: Named, draw: random.Random | None = None) -> str:
    """A caption: "a shiny red ball rolling on grass at noon, the camera is still"; with `draw`, half are reworded."""
    reword = draw if draw is not None and draw.random() >= PLAIN else None

    def one(options: tuple[Choice, ...]) -> Choice:
        return options[0] if reword is None else reword.choice(options)

    parts = {}
    if content.solids:
        nouns = []
        for colour, form, material in content.solids:
            words = [*([one(MATERIAL_WORDS[material])] if material else []), colour, one(FORM_WORDS[form])]
            nouns.append(" ".join(["an" if words[0] == "orange" else "a", *words]))
        parts["solids"] = " and ".join([*([", ".join(nouns[:-1])] if nouns[1:] else []), nouns[-1]])
    for part, wordings in PART_WORDS.items():
        if value := getattr(content, part):
            parts[part] = one(wordings[value])
    phrases = (" ".join(parts[part] for part in phrase if part in parts) for phrase in one(ORDERS))
    return ", ".join(phrase for phrase in phrases if phrase)


def world_captions(worlds: Worlds, generator: torch.Generator | None = None) -> list[str]:
    """One caption a scene, plain and whole; with a generator, reworded and thinned."""
    if generator is None:
        return [worded(content) for content in named(worlds)]
    draw = random.Random(int(torch.randint(2**31, (), generator=generator)))
    return [worded(thinned(content, draw), draw) for content in named(worlds)]


def read_caption(text: str) -> Named:
    """What a caption of this grammar names; solids are those of a known colour and form."""

    def either(wordings: Mapping[str, tuple[str, ...]]) -> str:
        return "|".join(word for words in wordings.values() for word in words)

    def meaning(wordings: Mapping[str, tuple[str, ...]], word: str | None) -> str | None:
        return next((entry for entry, words in wordings.items() if word in words), None)

    text = text.lower()
    solid = rf"\b(?:({either(MATERIAL_WORDS)}) )?({'|'.join(COLOURS)}) ({either(FORM_WORDS)})\b"
    solids = tuple(
        (colour, meaning(FORM_WORDS, form) or "", meaning(MATERIAL_WORDS, material))
        for material, colour, form in re.findall(solid, text)
    )
    parts = {}
    for part, wordings in PART_WORDS.items():
        found = re.search(rf"\b({either(wordings)})\b", text)
        parts[part] = meaning(wordings, found[1] if found else None)
    return Named(solids, **parts)


def vocabulary() -> list[str]:
    """Every word that a caption of the small world can hold, sorted."""
    wordings = [*FORM_WORDS.values(), *MATERIAL_WORDS.values(), *(w for p in PART_WORDS.values() for w in p.values())]
    words = {word for texts in wordings for text in texts for word in text.split()}
    return sorted({"a", "an", "and", *COLOURS, *words})
