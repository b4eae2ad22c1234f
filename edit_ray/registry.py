"""`Registry`: finds classes by name, registered with a decorator or offered by an installed package (entry point)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name. A registered class hides one that a package offers in the entry-point group `group`."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """A decorator that registers a class under a name.

        Raises:
            ValueError: another class has the name. A class of the same module and name replaces its earlier definition.
        """

        def give_name(cls: type[T]) -> type[T]:
            taken = self._classes.get(name)
            if taken is not None and (taken.__module__, taken.__name__) != (cls.__module__, cls.__name__):
                raise ValueError(f"The {self.kind} name {name!r} is taken by {taken.__module__}.{taken.__qualname__}.")
            self._classes[name] = cls
            return cls

        return give_name

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._classes, *entry_points(group=self.group).names})

    def find(self, name: str) -> type[T]:
        """The class of a name.

        Raises:
            ValueError: no class has the name; the message lists the names.
        """
        if name not in self._classes:
            for entry_point in entry_points(group=self.group, name=name):
                self._classes.setdefault(name, entry_point.load())
        if name not in self._classes:
            raise ValueError(f"There is no {self.kind} named {name!r}; there are {', '.join(self.names())}.")
        return self._classes[name]
