"""The raw data of a configuration, and where each key of it came from."""

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from edit_ray.config.messages import KeyPath, dotted
from edit_ray.config.strict_yaml import Document, parse, parse_scalar
from edit_ray.errors import ConfigError

MAX_FILE_BYTES = 2**20
MAX_PROBLEMS = 100
_SWITCHED_OFF = (["cache", "policy"], "none")  # an override that leaves nothing of its section, the policy's options


class Source:
    """A YAML file with options written over it. `data` is None where nothing can be read from it.

    Args:
        path: the file, None for no file.
        overrides: dotted key and YAML scalar, such as `sampling.seed=7`; a later one of the same key wins.
    """

    def __init__(self, path: Path | None, overrides: Sequence[str]) -> None:
        document = read_file(path) if path else Document(data={})
        self.data: Any = document.data
        self.problems: list[str] = []
        self._name = str(path) if path else "(no file)"
        self._lines = document.lines
        self._options: dict[KeyPath, str] = {}
        for line, text in document.mistakes:
            self.problems.append(f"{self._name}{f':{line}' if line else ''}: {text}")
        # Of a file that cannot be read the options are still checked for their own form.
        root = self.data if isinstance(self.data, dict) else {}
        for override in overrides:
            self._apply(override, root)

    def add(self, path: KeyPath, text: str) -> None:
        """Notes a mistake at a key, with the place of the key, or of the nearest one above it that has a place."""
        for prefix in (path[:length] for length in range(len(path), 0, -1)):
            if prefix in self._options:
                self.problems.append(f"--set {_short(self._options[prefix])}: {text}")
                return
            if prefix in self._lines:
                self.problems.append(f"{self._name}:{self._lines[prefix]}: {text}")
                return
        below = [option for key, option in self._options.items() if path and key[: len(path)] == path]
        self.problems.append(f"--set {_short(below[-1])}: {text}" if below else f"{self._name}: {text}")

    def stop(self) -> NoReturn:
        """Raises ConfigError with every problem; each is one line that any terminal can print."""
        lines = [printable(problem) for problem in self.problems]
        if len(lines) > MAX_PROBLEMS:
            lines[MAX_PROBLEMS:] = [f"{self._name}: there are {len(lines) - MAX_PROBLEMS} more mistakes."]
        raise ConfigError(lines)

    def _apply(self, override: str, root: dict[str, Any]) -> None:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        try:
            if not equals or "" in parts:
                raise ValueError("it must be KEY=VALUE with a dotted key, such as sampling.seed=7")
            value = parse_scalar(text)
            if (parts, value) == _SWITCHED_OFF:
                root["cache"] = {}
            self._options[_put(root, parts, value)] = override
        except ValueError as error:
            self.problems.append(f"--set {_short(override)}: {error}.")


def read_file(path: Path) -> Document:
    """The document in a file; what is wrong with the file itself is a mistake of the document."""
    document = Document()
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
            if len(content) <= MAX_FILE_BYTES:
                return parse(content.decode("utf-8-sig"))
            wrong = f"is larger than the {MAX_FILE_BYTES} bytes that a configuration may have"
        else:
            wrong = f"is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; it must be a YAML file"
    except FileNotFoundError:
        document.mistakes.append((None, "there is no such file; it must be a YAML file."))
        return document
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        wrong = f"is no text: byte {error.start} is not UTF-8; it must be a YAML file"
    except ValueError as error:
        wrong = f"is no file's name: {error}"
    document.mistakes.append((None, f"this {wrong}."))
    return document


def _put(root: dict[str, Any], parts: Sequence[str], value: object) -> KeyPath:
    """Writes the value at the dotted key, making mappings and lists on the way; returns the key's path."""
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


def printable(text: str) -> str:
    """The text as one line that any terminal can print."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _short(override: str) -> str:
    return override if len(override) <= 100 else f"{override[:99]}…"
