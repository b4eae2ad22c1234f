"""One mistake in a configuration: where it is and what to say about it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """`text` is a whole sentence. `needs` are the other keys it was derived from: it says nothing if one is wrong."""

    path: KeyPath
    text: str
    needs: tuple[KeyPath, ...] = ()


class WrongKeys:
    """Keys that are known to be wrong, to tell what can still be said about the others."""

    def __init__(self, paths: Iterable[KeyPath] = ()) -> None:
        self.paths: set[KeyPath] = set()
        self._above: set[KeyPath] = set()
        for path in paths:
            self.add(path)

    def add(self, path: KeyPath) -> None:
        self.paths.add(path)
        self._above.update(_upwards(path))

    def touch(self, path: KeyPath) -> bool:
        """Whether the key, a part of it or one above it is wrong."""
        return path in self._above or any(above in self.paths for above in _upwards(path))

    def spoil(self, mistake: Mistake) -> bool:
        """Whether the mistake says nothing, because its key or one that it was derived from is wrong already."""
        return any(self.touch(path) for path in (mistake.path, *mistake.needs))


class Mistakes(ValueError):
    """Mistakes between the keys of a configuration whose every key is right by itself."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__(" ".join(mistake.text for mistake in self.mistakes))


def dotted(path: KeyPath) -> str:
    """The path as `--set` takes it: `prompt_segments.1.prompt`."""
    return ".".join(map(str, path))


def _upwards(path: KeyPath) -> Iterator[KeyPath]:
    return (path[:length] for length in range(len(path), -1, -1))
