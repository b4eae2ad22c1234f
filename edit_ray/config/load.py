"""Loads a configuration from YAML and `--set` options, or reports all its mistakes; finds the folder of runs."""

import os
import stat
import tempfile
from collections.abc import Mapping, Sequence, Set
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from edit_ray.config.mistakes import KeyPath, Mistake, WrongKeys, dotted, mistakes_of, printable
from edit_ray.config.model import Config
from edit_ray.config.model_checks import model_mistakes, texts_in
from edit_ray.config.strict_yaml import Document, parse, parse_scalar
from edit_ray.errors import ConfigError
from edit_ray.options import Schema

MAX_FILE_BYTES = 2**20
MAX_PROBLEMS = 100
OUTPUT_VARIABLE = "EDIT_RAY_OUTPUT"
DEFAULT_OUTPUT = "~/edit_ray_outputs"

# Ray unpacks a job's files below such a folder, and deletes it with the job.
_RAY_JOB_PARTS = ("runtime_resources", "working_dir_files")
_SWITCHED_OFF = (["cache", "policy"], "none")  # this override also removes the policy's options
_STAND_INS: dict[str, Any] = {"video": {"num_segments": 1}, "prompt_segments": [{"segment": 0, "prompt": "-"}]}


def load_config(path: Path | None, overrides: Sequence[str] = (), *, check_model: bool = True) -> Config:
    """The configuration of a YAML file with `overrides` such as `sampling.seed=7`.

    Args:
        path: the file, at most 1 MiB of UTF-8; None for defaults alone.
        overrides: dotted key and YAML scalar; the last one of a key wins.
        check_model: also check the sizes, words and precision against the model's JSON files.

    Raises:
        ConfigError: one sentence per mistake, with its file and line or its option.
    """
    source = Source(path, overrides)
    if source.data is None:
        source.stop()
    config, mistakes = validate(source.data, check_model)
    for mistake in mistakes:
        source.add(mistake.path, mistake.text)
    if config is None or source.problems:
        source.stop()
    return config


def config_of(data: Mapping[str, Any]) -> Config:
    """The configuration of a mapping with the keys and values of a YAML file; checked like one. Raises ConfigError."""
    config, mistakes = validate(dict(data), check_model=True)
    if config is None or mistakes:
        raise ConfigError([printable(mistake.text) for mistake in mistakes])
    return config


def validate(data: Any, check_model: bool = True) -> tuple[Config | None, list[Mistake]]:
    """The configuration of a mapping, and every mistake in it; with a wrong value, of what is left without it.

    Wrong values are replaced by stand-ins and everything is checked again, so that cross-field checks run as well.
    Mistakes that derive from a replaced value are dropped.
    """
    found: list[Mistake] = []
    wrong = WrongKeys()
    config: Config | None = None
    for _ in range(8):
        try:
            config = Config.model_validate(_without(wrong.paths, data) if wrong.paths else data)
            break
        except ValidationError as error:
            mistakes = mistakes_of(error, _schema())
        found += [mistake for mistake in mistakes if not wrong.spoil(mistake)]
        new = [mistake.path for mistake in mistakes if mistake.path not in wrong.paths]
        for path in new or [mistake.path[:1] for mistake in mistakes]:
            wrong.add(path)
    if config is not None and check_model and not wrong.touch(("model", "path")):
        # The words of a prompt are checked even if its start is out of order.
        known = WrongKeys(mistake.path for mistake in found)
        found += [mistake for mistake in model_mistakes(config, list(texts_in(data))) if not known.spoil(mistake)]
    return config, found


def _without(wrong: Set[KeyPath], value: Any, path: KeyPath = ()) -> Any:
    """The value at `path` without the wrong values below it; required ones are replaced."""
    if path in wrong:  # the whole document
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


class Source:
    """A YAML file, or none, with overrides applied. `data` is None if the file cannot be read."""

    def __init__(self, path: Path | None, overrides: Sequence[str]) -> None:
        document = read_file(path) if path else Document(data={})
        self.data: Any = document.data
        self._name = str(path) if path else "(no file)"
        self.problems = [f"{self._name}{f':{line}' if line else ''}: {text}" for line, text in document.mistakes]
        self._places = {key: f"{self._name}:{line}" for key, line in document.lines.items()}
        # The syntax of the overrides is checked even if the file cannot be read.
        root = self.data if isinstance(self.data, dict) else {}
        for override in overrides:
            self._apply(override, f"--set {override if len(override) <= 100 else override[:99] + '…'}", root)

    def add(self, path: KeyPath, text: str) -> None:
        """Record a mistake at the nearest known place: the key, one above it, or an override of one below it."""
        place = next((at for n in range(len(path), 0, -1) if (at := self._places.get(path[:n]))), None)
        if place is None:
            below = [at for key, at in self._places.items() if path and path == key[: len(path)]]
            place = next((at for at in reversed(below) if at.startswith("--set ")), self._name)
        self.problems.append(f"{place}: {text}")

    def stop(self) -> NoReturn:
        """Raise ConfigError with every problem as one printable line."""
        lines = [printable(problem) for problem in self.problems]
        if len(lines) > MAX_PROBLEMS:
            lines[MAX_PROBLEMS:] = [f"{self._name}: there are {len(lines) - MAX_PROBLEMS} more mistakes."]
        raise ConfigError(lines)

    def _apply(self, override: str, place: str, root: dict[str, Any]) -> None:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        try:
            if not equals or "" in parts:
                raise ValueError("it must be KEY=VALUE with a dotted key, such as sampling.seed=7")
            value = parse_scalar(text)
            if (parts, value) == _SWITCHED_OFF:
                root["cache"] = {}
            self._places[_put(root, parts, value)] = place
        except ValueError as error:
            self.problems.append(f"{place}: {error}.")


def read_file(path: Path) -> Document:
    """The document in a file; an unreadable file is a mistake in the document."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
            if len(content) <= MAX_FILE_BYTES:
                return parse(content.decode("utf-8-sig"))
            wrong = f"this is larger than the {MAX_FILE_BYTES} bytes that a configuration may have"
        else:
            wrong = f"this is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}; it must be a YAML file"
    except FileNotFoundError:
        wrong = "there is no such file; it must be a YAML file"
    except OSError as error:
        wrong = f"this cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        wrong = f"this is not text: byte {error.start} is not UTF-8; it must be a YAML file"
    except ValueError as error:
        wrong = f"this is not a file name: {error}"
    return Document(mistakes=[(None, f"{wrong}.")])


def _put(root: dict[str, Any], parts: Sequence[str], value: object) -> KeyPath:
    """Write a value at a dotted key, with mappings and lists above it as needed; return the key's path."""
    path: list[str | int] = []
    container: Any = root
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        key = _key(container, part, tuple(path))
        path.append(key)
        if isinstance(container, list) and key == len(container):
            container.append(None)
        elif isinstance(container, dict):
            container.setdefault(key, None)
        if following is None:
            container[key] = value
        elif container[key] is None:
            container[key] = [] if following.isdecimal() else {}
        container = container[key]
    return tuple(path)


def _key(container: object, part: str, above: KeyPath) -> str | int:
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise ValueError(f"{dotted(above)} has no keys below it")
    if not part.isdecimal() or len(part) > 6 or int(part) > len(container):
        raise ValueError(f"{dotted(above)} is a list; below it comes the number of an entry, 0 to {len(container)}")
    return int(part)


def output_root(option: str | None, environ: Mapping[str, str]) -> Path:
    """The absolute folder of runs: `option`, else `$EDIT_RAY_OUTPUT`, else `~/edit_ray_outputs`.

    Creates the folder if needed, and checks that it can be written.

    Raises:
        ConfigError: it is a file, cannot be created or written, or lies in a Ray job's unpacked folder.
    """
    if option is not None:
        name, given = "--output", option
    elif environ.get(OUTPUT_VARIABLE):
        name, given = f"${OUTPUT_VARIABLE}", environ[OUTPUT_VARIABLE]
    else:
        name, given = "the default output folder", DEFAULT_OUTPUT
    if not given.strip():
        raise ConfigError([f"{name} is empty; it must be a folder that can be written."])
    try:
        home = environ.get("HOME")
        from_home = bool(home) and (given == "~" or given.startswith("~/"))
        root = Path(os.path.abspath(Path(home or "", given[2:]) if from_home else Path(given).expanduser()))
        if any(_in_ray_job(place.parts) for place in (root, Path(os.path.realpath(root)))):
            wrong = f"which is {root}, inside a Ray job's unpacked files, and those are deleted"
            raise ConfigError([f"{name} is {given!r}, {wrong}; it must be an absolute path elsewhere."])
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
        return root
    except ConfigError:
        raise
    except (FileExistsError, NotADirectoryError) as error:
        what = "a file" if isinstance(error, FileExistsError) else "below a file"
        text = f"{what}; it must be a folder that can be written"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        text = f"which cannot be written ({reason}); it must be a folder that can be"
    except (ValueError, RuntimeError) as error:
        text = f"which is not a valid path ({error}); it must be a folder"
    raise ConfigError([f"{name} is {given!r}, {text}."])


def _in_ray_job(parts: tuple[str, ...]) -> bool:
    return _RAY_JOB_PARTS in pairwise(parts)
