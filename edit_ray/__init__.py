"""EDiT on Ray: an editable engine for video diffusion transformers; importing it loads neither torch nor ray."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edit_ray.client import LongVideoClient
    from edit_ray.engine.causal_pipeline import EditCausalWanPipeline
    from edit_ray.engine.pipeline import EditWanPipeline

__version__ = "0.1.0"
__all__ = ["EditCausalWanPipeline", "EditWanPipeline", "LongVideoClient", "__version__"]

_HOME = {
    "EditCausalWanPipeline": "edit_ray.engine.causal_pipeline",
    "EditWanPipeline": "edit_ray.engine.pipeline",
    "LongVideoClient": "edit_ray.client",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    exported: object = getattr(import_module(_HOME[name]), name)
    return exported


def __dir__() -> list[str]:
    return sorted(__all__)
