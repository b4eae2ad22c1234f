"""From a YAML file and `--set` options to a configuration, or to every mistake in them at once."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edit_ray.config.mistakes import KeyPath, Mistake, WrongKeys, mistakes_of
from edit_ray.config.model import Config
from edit_ray.config.model_checks import model_mistakes
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
            config = Config.model_validate(_without(data, wrong.paths))
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
        found += [mistake for mistake in model_mistakes(config, list(_texts(data))) if not known.spoil(mistake)]
    return config, found


def _texts(data: Any) -> Iterator[tuple[KeyPath, str]]:
    """Every text in the raw data that the model's tokenizer will see, wherever it can be told."""
    if not isinstance(data, dict):
        return
    entries, sampling = data.get("prompt_segments"), data.get("sampling")
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        for name in ("prompt", "negative_prompt"):
            if isinstance(entry, dict) and isinstance(entry.get(name), str):
                yield ("prompt_segments", index, name), entry[name]
    if isinstance(sampling, dict) and isinstance(sampling.get("negative_prompt"), str):
        yield ("sampling", "negative_prompt"), sampling["negative_prompt"]


def _without(data: Any, wrong: Collection[KeyPath]) -> Any:
    """The data with the wrong values taken out, or replaced where something has to be."""
    if not wrong:
        return data
    if not isinstance(data, dict):
        return copy.deepcopy(_STAND_INS)
    data = copy.deepcopy(data)
    for path in sorted(wrong, key=len, reverse=True):
        container: Any = data
        for part in path[:-1]:
            container = _below(container, part)
        if isinstance(container, dict):
            container.pop(path[-1], None)
            if path[-1] == "prompt" and len(path) == 3:
                container["prompt"] = "-"
            elif len(path) == 1 and path[0] in _STAND_INS:
                container[path[0]] = copy.deepcopy(_STAND_INS[str(path[0])])
    return data


def _below(container: Any, part: str | int) -> Any:
    if isinstance(container, dict):
        return container.get(part)
    if isinstance(container, list) and isinstance(part, int):
        return container[part]
    return None


@cache
def _schema() -> Schema:
    return Config.model_json_schema()
