"""A disk that records what is done to it, and what a loss of power may leave of that.

What a file holds is durable once it was synced, the names in a folder once that was. Of everything else any subset may
be there: whole, cut short, or with zeros where bytes should be.
"""

import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

from edit_ray import files

ROOT = 0  # folders have numbers below it, files above


@dataclass(frozen=True)
class Names:
    """Changes of names in a folder: what each stands for from now on, None if it is gone."""

    node: int
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Data:
    """Bytes written to a file at an offset, or its new size."""

    node: int
    offset: int
    data: bytes | None


@dataclass(frozen=True)
class Sync:
    """A file or a folder became durable."""

    node: int


@dataclass(frozen=True)
class Told:
    """From here on somebody outside relies on something."""

    what: object


class Recorder(files.Disk):
    """Carries everything out, without syncing anything, and records what happens under `root`.

    What is in a folder that was there before is not recorded.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.operations = root, []
        self._nodes, self._contents, self._open = {root: ROOT}, {}, {}
        self._count, self._lock = 0, threading.RLock()

    def tell(self, what):
        with self._lock:
            self.operations.append(Told(what))

    def _made(self, path, sign):
        self._count += 1
        node = self._nodes[path] = sign * self._count
        self.operations.append(Names(self._nodes[path.parent], ((path.name, node),)))
        return node

    def open(self, path, flags):
        with self._lock:
            descriptor = super().open(path, flags)
            if path in self._nodes or path.parent in self._nodes:
                if path not in self._nodes:
                    self._contents[self._made(path, 1)] = bytearray()
                self._open[descriptor] = (self._nodes[path], flags)
            return descriptor

    def close(self, descriptor):
        with self._lock:
            self._open.pop(descriptor, None)
            super().close(descriptor)

    def write(self, descriptor, parts, offset):
        with self._lock:
            node, flags = self._open.get(descriptor, (None, 0))
            at = os.fstat(descriptor).st_size if flags & os.O_APPEND else offset
            count = super().write(descriptor, parts, offset)
            if node is not None:
                self._changed(Data(node, at, b"".join(parts)[:count]))
            return count

    def truncate(self, descriptor, size):
        with self._lock:
            super().truncate(descriptor, size)
            if descriptor in self._open:
                self._changed(Data(self._open[descriptor][0], size, None))

    def fsync(self, descriptor):
        with self._lock:
            if descriptor not in self._open:
                return
            node = self._open[descriptor][0]
            if node in self._contents:
                there = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
                if there != self._contents[node]:  # another process has written it
                    self._changed(Data(node, 0, None))
                    self._changed(Data(node, 0, there))
            self.operations.append(Sync(node))

    def replace(self, source, target):
        with self._lock:
            super().replace(source, target)
            if source not in self._nodes:
                return
            moved = {path: node for path, node in self._nodes.items() if path == source or source in path.parents}
            for path, node in moved.items():
                del self._nodes[path]
                self._nodes[target / path.relative_to(source)] = node
            names = ((source.name, None), (target.name, moved[source]))
            self.operations.append(Names(self._nodes[target.parent], names))

    def link(self, source, target):
        """What was there before the recording is durable."""
        with self._lock:
            super().link(source, target)
            node = self._nodes.get(source)
            if node is None:
                self._count += 1
                node = self._nodes[source] = self._count
                self._contents[node] = bytearray()
                self._changed(Data(node, 0, source.read_bytes()))
                self.operations.append(Sync(node))
            self._nodes[target] = node
            self.operations.append(Names(self._nodes[target.parent], ((target.name, node),)))

    def unlink(self, path):
        with self._lock:
            super().unlink(path)
            self._gone(path)

    def rmdir(self, path):
        with self._lock:
            super().rmdir(path)
            self._gone(path)

    def mkdir(self, path):
        with self._lock:
            super().mkdir(path)
            if path.parent in self._nodes:
                self._made(path, -1)

    def _gone(self, path):
        if self._nodes.pop(path, None) is not None:
            self.operations.append(Names(self._nodes[path.parent], ((path.name, None),)))

    def _changed(self, data):
        apply_data(self._contents[data.node], data)
        self.operations.append(data)


def apply_data(content: bytearray, change: Data) -> None:
    if change.data is None:
        del content[change.offset :]
        content.extend(bytes(change.offset - len(content)))
    else:
        content.extend(bytes(max(0, change.offset - len(content))))
        content[change.offset : change.offset + len(change.data)] = change.data


@dataclass
class Power:
    """What is durable of the operations so far, and what may be lost."""

    names: dict[int, dict[str, int]] = field(default_factory=dict)
    data: dict[int, bytearray] = field(default_factory=dict)
    pending: list[Names | Data] = field(default_factory=list)

    def follow(self, operation: Names | Data | Sync | Told) -> None:
        if isinstance(operation, Names | Data):
            self.pending.append(operation)
        elif isinstance(operation, Sync):
            for change in [change for change in self.pending if change.node == operation.node]:
                self._apply(change, self.names, self.data)
            self.pending = [change for change in self.pending if change.node != operation.node]

    def lost(
        self, luck: random.Random, share: float | None = None
    ) -> tuple[tuple[object, ...], dict[str, bytes | None]]:
        """Which of the pending changes are there, and the files by path; folders have None.

        `share` of the changes are there, drawn at random; so is the share, if it is None.
        """
        names = {node: dict(of) for node, of in self.names.items()}
        data = {node: bytearray(self.data[node]) for node in self.data}
        share = luck.choice((0.0, 0.1, 0.5, 0.9, 1.0)) if share is None else share
        choices = []
        for change in self.pending:
            choice = self._choose(change, share, luck)
            choices.append(choice)
            if choice:
                self._apply(change if choice is True else choice, names, data)
        found: dict[str, bytes | None] = {}
        self._walk("", ROOT, names, data, found)
        return tuple(choices), found

    @staticmethod
    def _choose(change, share, luck):
        """True for all of a change, False for nothing of it, or what is there of its bytes."""
        if luck.random() >= share:
            return False
        if isinstance(change, Names) or not change.data or luck.random() < 0.6:
            return True
        cut = luck.randrange(len(change.data) + 1)
        part = {
            "torn": change.data[:cut],
            "hole": bytes(cut) + change.data[cut:],
            "zeros": bytes(len(change.data)),
        }[luck.choice(("torn", "torn", "hole", "zeros"))]
        return Data(change.node, change.offset, part)

    @staticmethod
    def _apply(change, names, data):
        if isinstance(change, Data):
            apply_data(data.setdefault(change.node, bytearray()), change)
            return
        folder = names.setdefault(change.node, {})
        for name, node in change.names:
            if node is None:
                folder.pop(name, None)
            else:
                folder[name] = node

    def _walk(self, path, node, names, data, found):
        for name, inner in names.get(node, {}).items():
            where = f"{path}{name}"
            if inner <= ROOT:
                found[where] = None
                self._walk(f"{where}/", inner, names, data, found)
            else:
                found[where] = bytes(data.get(inner, b""))
