"""Feature caching of diffusion transformers: when to recompute, what one decision covers, where residuals live.

Importing this package loads nothing; its names load what they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edit_ray.cache.adapters import ModelAdapter as ModelAdapter
    from edit_ray.cache.adapters import register_adapter as register_adapter
    from edit_ray.cache.cache import Cache as Cache
    from edit_ray.cache.install import apply_cache_on_transformer as apply_cache_on_transformer
    from edit_ray.cache.install import remove_cache_from_transformer as remove_cache_from_transformer
    from edit_ray.cache.kv import KVWindow as KVWindow
    from edit_ray.cache.kv_retention import RetentionPolicy as RetentionPolicy
    from edit_ray.cache.kv_retention import register_retention as register_retention
    from edit_ray.cache.policies import CachePolicy as CachePolicy
    from edit_ray.cache.policies import PolicyContext as PolicyContext
    from edit_ray.cache.policies import register_policy as register_policy
    from edit_ray.cache.policies import relative_l1 as relative_l1
    from edit_ray.cache.stores.disk_store import DiskOffloadStore as DiskOffloadStore
    from edit_ray.cache.stores.memory import CPUOffloadStore as CPUOffloadStore
    from edit_ray.cache.stores.memory import GPUStore as GPUStore
    from edit_ray.cache.stores.spread import SpreadStore as SpreadStore
    from edit_ray.cache.stores.tiered import TieredStore as TieredStore

_NAMES = {
    "adapters": ("ModelAdapter", "register_adapter"),
    "cache": ("Cache",),
    "install": ("apply_cache_on_transformer", "remove_cache_from_transformer"),
    "kv": ("KVWindow",),
    "kv_retention": ("RetentionPolicy", "register_retention"),
    "policies": ("CachePolicy", "PolicyContext", "register_policy", "relative_l1"),
    "stores.disk_store": ("DiskOffloadStore",),
    "stores.memory": ("CPUOffloadStore", "GPUStore"),
    "stores.spread": ("SpreadStore",),
    "stores.tiered": ("TieredStore",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
