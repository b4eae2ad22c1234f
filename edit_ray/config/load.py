"""From a YAML file and `--set` options to a configuration, or to every mistake in them at once."""

from collections.abc import Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edit_ray.config.messages import KeyPath, Mistake, WrongKeys, mistakes_of
from edit_ray.config.model import Config
from edit_ray.config.model_checks import model_mistakes, texts_in
from edit_ray.config.source import Source, printable
from edit_ray.errors import ConfigError
from edit_ray.options import Schema

_STAND_INS: dict[str, Any] = {"video": {"num_segments": 1}, "prompt_segments": [{"segment": 0, "prompt": "-"}]}


def load_config(path: Path | None, overrides: Sequence[str] = (), *, check_model: bool = True) -> Config:
    """The configuration of a YAML file, with `overrides` such as `sampling.seed=7` written over it.

    Args:
        path: the file, at most 1 MiB of UTF-8; None for defaults alone.
        overrides: dotted key and YAML scalar; a later one of the same key wins.
        check_model: also check what depends on the model, from its JSON files: sizes, words, precision.

    Raises:
        ConfigError: one sentence for every mistake, each with the file and line, or the option, that it is in.
    """
    source = Source(path, overrides)
    if source.data is None:
        source.stop()
    config, mistakes = _validate(source.data, check_model)
    for mistake in mistakes:
        source.add(mistake.path, mistake.text)
    if config is None or source.problems:
        source.stop()
    return config


def config_of(data: Mapping[str, Any]) -> Config:
    """The configuration that a mapping holds, with the keys and values that a YAML file would have; checked like one.

    Raises:
        ConfigError: one sentence for every mistake.
    """
    config, mistakes = _validate(dict(data), check_model=True)
    if config is None or mistakes:
        raise ConfigError([printable(mistake.text) for mistake in mistakes])
    return config


def _validate(data: Any, check_model: bool) -> tuple[Config | None, list[Mistake]]:
    """The configuration and every mistake; with mistakes it is the one that stand-ins for wrong values make.

    What has been found wrong is replaced and all is checked again, so that the checks that need a whole
    configuration run as well. What they say about a replaced value is dropped.
    """
    found: list[Mistake] = []
    wrong = WrongKeys()
    config: Config | None = None
    for _ in range(8):
        try:
            config = Config.model_validate(_without(wrong.paths, data))
            break
        except ValidationError as error:
            mistakes = mistakes_of(error, _schema())
        found += [mistake for mistake in mistakes if not wrong.spoil(mistake)]
        new = [mistake.path for mistake in mistakes if mistake.path not in wrong.paths]
        for path in new or [mistake.path[:1] for mistake in mistakes]:
            wrong.add(path)
    if config is not None and check_model and not wrong.touch(("model", "path")):
        # Not what stand-ins have spoiled, but what is known: the words of an ill-placed prompt are still its own.
        known = WrongKeys(mistake.path for mistake in found)
        found += [mistake for mistake in model_mistakes(config, list(texts_in(data))) if not known.spoil(mistake)]
    return config, found


def _without(wrong: Set[KeyPath], value: Any, path: KeyPath = ()) -> Any:
    """The value at `path` with the wrong values taken out, or replaced where something has to be."""
    if path in wrong:  # nothing at all is right
        return _STAND_INS
    if isinstance(value, list):
        return [_without(wrong, entry, (*path, index)) for index, entry in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept = {key: _without(wrong, below, (*path, key)) for key, below in value.items() if (*path, key) not in wrong}
    stand_ins = {0: _STAND_INS, 2: {"prompt": "-"}}.get(len(path), {})
    return kept | {key: stand_in for key, stand_in in stand_ins.items() if (*path, key) in wrong}


@cache
def _schema() -> Schema:
    return Config.model_json_schema()
