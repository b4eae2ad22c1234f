"""The models that a door offers, each as a configuration that requests change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edit_ray.config import Config, config_of, load_config
from edit_ray.engine.model_info import read_model_info
from edit_ray.errors import ConfigError
from edit_ray.server.video_request import Offer


def offers_of(models: Sequence[tuple[str, Config]]) -> list[Offer]:
    """The models with their sizes. Raises ModelError."""
    found = [(name, base, read_model_info(base.model.path)) for name, base in models]
    return [Offer(name, base, info.height_step, info.width_step) for name, base, info in found]


def models_of(paths: Sequence[Path], overrides: Sequence[str] = ()) -> tuple[tuple[str, Config], ...]:
    """The configurations of files with `overrides`, named as the files are; without any, that of the embedded model.

    Raises ConfigError for a mistake in a file, and for two of one name.
    """
    if overrides and not paths:
        raise ConfigError([f"overrides has {overrides[0]!r}, and there is no configuration for it; name one."])
    if not paths:
        tiny = {
            "model": {"path": "builtin:tiny_wan"},
            "video": {"duration": "4s"},
            "prompt_segments": [{"segment": 0, "prompt": "a red circle"}],
            "continuity": {"mode": "history"},
        }
        return (("tiny_wan", config_of(tiny)),)
    names = [path.stem for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError([f"--config names {twice[0]!r} twice; each file must have a name of its own."])
    return tuple((name, load_config(path, overrides)) for name, path in zip(names, paths, strict=True))
