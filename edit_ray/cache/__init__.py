"""Feature caching of diffusion transformers: when to recompute, what one decision covers, where residuals live.

Importing this package loads nothing; its names load what they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edit_ray.cache.adapters import ModelAdapter, register_adapter
    from edit_ray.cache.cache import Cache
    from edit_ray.cache.install import apply_cache_on_transformer, remove_cache_from_transformer
    from edit_ray.cache.policies import CachePolicy, PolicyContext, register_policy, relative_l1
    from edit_ray.cache.stores.device import GPUStore
    from edit_ray.cache.stores.disk import DiskOffloadStore
    from edit_ray.cache.stores.host import CPUOffloadStore, HostStore
    from edit_ray.cache.stores.spread import SpreadStore
    from edit_ray.cache.stores.tiered import TieredStore

_MODULES = {
    "CPUOffloadStore": "stores.host",
    "Cache": "cache",
    "CachePolicy": "policies",
    "DiskOffloadStore": "stores.disk",
    "GPUStore": "stores.device",
    "HostStore": "stores.host",
    "ModelAdapter": "adapters",
    "PolicyContext": "policies",
    "SpreadStore": "stores.spread",
    "TieredStore": "stores.tiered",
    "apply_cache_on_transformer": "install",
    "register_adapter": "adapters",
    "register_policy": "policies",
    "relative_l1": "policies",
    "remove_cache_from_transformer": "install",
}

__all__ = [
    "CPUOffloadStore",
    "Cache",
    "CachePolicy",
    "DiskOffloadStore",
    "GPUStore",
    "HostStore",
    "ModelAdapter",
    "PolicyContext",
    "SpreadStore",
    "TieredStore",
    "apply_cache_on_transformer",
    "register_adapter",
    "register_policy",
    "relative_l1",
    "remove_cache_from_transformer",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
