"""The GPU actor and the CacheStore actor as Ray starts them.

Torch and diffusers take seconds to import and hundreds of megabytes: each actor's own process does, and the segment
scheduler, which starts the actors and is to be there again at once when it has died, does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar


class _Shell:
    """One actor's process: the plain class of the same name, made there."""

    module: ClassVar[str]

    def __init__(self, *arguments: Any) -> None:
        self._plain = getattr(import_module(self.module), type(self).__name__)(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method of the plain class returns, or raises."""
        return getattr(self._plain, method)(*arguments)

    def describe(self) -> dict[str, str | int]:
        description: dict[str, str | int] = self._plain.describe()
        return description


class DenoiserActor(_Shell):
    """The GPU actor."""

    module = "edit_ray.actors.denoiser"


class CacheStoreActor(_Shell):
    """The CacheStore actor."""

    module = "edit_ray.actors.cache_store"
