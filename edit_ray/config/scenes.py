"""From a configuration's `prompt_segments` to the scenes of its storyboard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from edit_ray.runs.run_plan import Pictures, Scene, Storyboard

if TYPE_CHECKING:
    from edit_ray.config.model import Config

_INHERITED = ("negative_prompt", "guidance_scale", "seed")


def storyboard_of(config: Config) -> Storyboard:
    """The scene of each segment: an entry holds from the segment of its start until the next entry's."""
    layout, entries = config.layout, config.prompt_segments
    defaults = {name: getattr(config.sampling, name) for name in _INHERITED}
    starts = [entry.first_segment(layout) for entry in entries]
    scenes = list[Scene]()
    for index, (entry, start, end) in enumerate(zip(entries, starts, [*starts[1:], config.num_segments], strict=True)):
        own = {name: value for name in _INHERITED if (value := getattr(entry, name)) is not None}
        image = entry.image or default_image(config, index)
        whole = Scene(
            start,
            entry.prompt,
            **defaults | own,
            lora_weights=entry.lora_weights or {},
            pictures=Pictures(image, None, entry.reference_images or ()),
            switch=entry.switch or "recache",
        )
        scenes += _parts(whole, end, entry.last_image, chained=config.continuity.mode == "image")
    return Storyboard(tuple(scenes), layout)


def picture_files(config: Config) -> list[str]:
    """The pictures that the run's segments are made from, each once, in order."""
    return list(dict.fromkeys(path for scene in config.storyboard.scenes for path in scene.pictures.paths))


def default_image(config: Config, entry: int) -> str | None:
    """The picture of an entry that has none: with `svi` that of the whole run, with `image` the run's first frame."""
    mode, init = config.continuity.mode, config.continuity.init
    return init if mode == "svi" or (mode == "image" and entry == 0) else None


def _parts(scene: Scene, end: int | None, last_image: str | None, chained: bool) -> Iterator[Scene]:
    """The scene, up to segment `end`, cut where its pictures change.

    Its last segment has the last frame. `chained`: only its first one has the image, which the others continue.
    """
    last = end - 1 if end is not None and last_image is not None else None
    starts = {scene.start} | ({scene.start + 1} if chained and scene.pictures.image else set())
    starts |= {last} if last is not None else set()
    for start in sorted(start for start in starts if end is None or start < end):
        first = start == scene.start
        image = scene.pictures.image if first or not chained else None
        pictures = replace(scene.pictures, image=image, last_image=last_image if start == last else None)
        yield replace(scene, start=start, pictures=pictures, cuts=chained and image is not None)
