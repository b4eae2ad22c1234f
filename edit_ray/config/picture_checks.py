"""Checks of a configuration's pictures: whether they can be read, and whether its modes and its model take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from edit_ray.config.mistakes import KeyPath, Mistake, dotted, mistake_at
from edit_ray.config.scenes import default_image
from edit_ray.engine.init_file import read_init, read_picture
from edit_ray.engine.model_info import Kind, ModelInfo
from edit_ray.engine.options import frames_of, is_clip
from edit_ray.errors import ConfigError

if TYPE_CHECKING:
    from edit_ray.config.model import Config, PromptSegment

_ALONE = ("none", "warm_start")
_MODES: Mapping[Kind, tuple[str, ...]] = {
    "text": (*_ALONE, "overlap"),
    "first frame": (*_ALONE, "history", "overlap", "image"),
    "image": (*_ALONE, "image", "svi"),
    "vace": _ALONE,
}
_TAKES: Mapping[Kind, tuple[str, ...]] = {
    "text": (),
    "first frame": ("image", "last_image"),
    "image": ("image", "last_image"),
    "vace": ("reference_images",),
}
_IS: Mapping[Kind, str] = {
    "text": "a text-to-video model",
    "first frame": "a text- and image-to-video model",
    "image": "an image-to-video model",
    "vace": "a VACE model",
}
_WHY = {
    "history": "history needs per-token timesteps (expand_timesteps: true in its model_index.json)",
    "image": "image needs a model that begins with a picture",
    "svi": "svi needs an image-to-video model",
}


def mode_mistakes(config: Config) -> Iterator[Mistake]:
    """What does not fit `continuity.mode`, whatever the model."""
    continuity, mode, entries = config.continuity, config.continuity.mode, config.prompt_segments
    if mode in ("image", "svi") and continuity.init is not None and is_clip(continuity.init):
        said = f"is {continuity.init!r}, a clip; it must be a picture where continuity.mode is {mode}."
        yield mistake_at("continuity.init", said, "continuity.mode")
    if mode == "svi" and entries[0].image is None and continuity.init is None:
        said = "is 'svi', which needs a picture to hold on to: continuity.init, or an image of the first prompt."
        yield mistake_at("continuity.mode", said, "continuity.init")
    for index, entry in enumerate(entries):
        at: KeyPath = ("prompt_segments", index)
        if entry.image is not None and mode in ("history", "overlap"):
            begins = f"with {mode} the picture that a video begins with is continuity.init"
            said = f"is {entry.image!r}; it needs continuity.mode none, warm_start, image or svi ({begins})."
            yield mistake_at((*at, "image"), said, "continuity.mode")
        if entry.reference_images and config.cache.reuse_window:
            said = f"are given and cache.reuse_window is {config.cache.reuse_window}; with references it must be 0."
            yield mistake_at((*at, "reference_images"), said, "cache.reuse_window")
    if entries[-1].last_image is not None and config.video.endless:
        said = f"is {entries[-1].last_image!r}, and this video has no end; it needs video.num_segments or duration."
        yield mistake_at(("prompt_segments", len(entries) - 1, "last_image"), said, "video")


def file_mistakes(config: Config) -> Iterator[Mistake]:
    """Reads every picture as the run does, at a smaller size."""
    continuity = config.continuity
    if continuity.init is not None:
        read = partial(read_init, continuity.init, frames=frames_of(max(1, continuity.init_latents)))
        yield from _reading(("continuity", "init"), read, ("continuity", "history_latents"))
    known = set[str]()
    for path, file in _pictures_of(config.prompt_segments):
        if file not in known:
            known.add(file)
            yield from _reading(path, partial(read_picture, file, key=dotted(path)))


def model_takes(config: Config, info: ModelInfo) -> Iterator[Mistake]:
    """What the model is not made for, or misses."""
    mode, kind = config.continuity.mode, info.kind
    if config.continuity.causal or info.causal is not None:
        return  # such a run takes no pictures, and has said so
    if mode not in _MODES[kind]:
        valid = f"{', '.join(_MODES[kind][:-1])} or {_MODES[kind][-1]}"
        why = _WHY[mode] if kind in ("text", "first frame") or mode == "svi" else f"it is {_IS[kind]}"
        yield mistake_at("continuity.mode", f"is {mode!r}; it must be {valid} for this model, because {why}.")
    elif kind == "image":
        yield from _of_image_model(config, info)
    for path, file in _pictures_of(config.prompt_segments):
        if path[2] not in _TAKES[kind]:
            takes = " and ".join(_TAKES[kind]) or "no picture"
            yield mistake_at(path, f"is {file!r}, and this model is {_IS[kind]}; it takes {takes}.", "model.path")


def _of_image_model(config: Config, info: ModelInfo) -> Iterator[Mistake]:
    """Each segment begins with a picture; a model with CLIP must also see, or not see, a last one."""
    mode, entries = config.continuity.mode, config.prompt_segments
    if config.continuity.picture_as == "still":
        said = "is 'still'; it must be first_frame for an image-to-video model, which holds no latents."
        yield mistake_at("continuity.picture_as", said, "model.path")
    for index, entry in enumerate(entries):
        if (entry.image or default_image(config, index)) is None and (mode in _ALONE or index == 0):
            said = "is missing; this model is an image-to-video model, whose segments begin with a picture."
            yield mistake_at(("prompt_segments", index, "image"), said, "model.path", "continuity")
        if entry.last_image is not None and info.first_and_last is False:
            said = f"is {entry.last_image!r}, and this model sees one picture; it takes image."
            yield mistake_at(("prompt_segments", index, "last_image"), said, "model.path")
    both = all(scene.pictures.image and scene.pictures.last_image for scene in config.storyboard.scenes)
    if info.first_and_last and not both:
        said = (
            f"is {config.model.path!r}, a model of first and last frames; each of its segments must have an image and "
        )
        yield mistake_at(
            "model.path", f"{said}a last_image, as with one prompt for each.", "prompt_segments", "continuity"
        )


def _pictures_of(entries: tuple[PromptSegment, ...]) -> Iterator[tuple[KeyPath, str]]:
    for index, entry in enumerate(entries):
        for name in ("image", "last_image"):
            if (file := getattr(entry, name)) is not None:
                yield ("prompt_segments", index, name), file
        for at, file in enumerate(entry.reference_images or ()):
            yield ("prompt_segments", index, "reference_images", at), file


def _reading(path: KeyPath, read: Callable[..., object], *needs: KeyPath) -> Iterator[Mistake]:
    try:
        read(height=16, width=16)
    except ConfigError as error:
        for problem in error.problems:
            yield Mistake(path, problem, needs=needs)
