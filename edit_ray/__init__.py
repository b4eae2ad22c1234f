"""EDiT on Ray: an editable engine for video diffusion transformers; importing it loads neither torch nor ray.

It sets how torch allocates GPU memory, unless the environment already says so.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edit_ray.client import LongVideoClient
    from edit_ray.engine.causal_pipeline import EditCausalWanPipeline
    from edit_ray.engine.pipeline import EditWanPipeline

# torch reads the first of these that is set when it first allocates on a GPU. Without expandable segments, free memory
# between two tensors cannot be joined: a run whose blocks are offloaded had a tenth of a small card in such fragments.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
if not any(name in os.environ for name in _ALLOCATOR):
    os.environ[_ALLOCATOR[-1]] = "expandable_segments:True"

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
