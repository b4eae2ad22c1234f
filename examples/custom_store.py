"""A custom store: residuals compressed in memory, below a device tier that is too small for all of them.

python examples/custom_store.py
"""

import zlib
from collections.abc import Iterable

import torch

from edit_ray import EditWanPipeline
from edit_ray.cache import GPUStore, TieredStore
from edit_ray.testing import check_store

Key = tuple[str | int | None, ...]


class CompressedStore:
    """Keeps every tensor as compressed bytes; what comes back is equal, bit for bit."""

    def __init__(self) -> None:
        self._entries: dict[Key, tuple[bytes, torch.dtype, torch.Size]] = {}

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().flatten()
        data = zlib.compress(flat.view(torch.uint8).numpy().tobytes(), level=1)
        self._entries[key] = data, tensor.dtype, tensor.shape

    def get(self, key: Key) -> torch.Tensor | None:
        if key not in self._entries:
            return None
        data, dtype, shape = self._entries[key]
        raw = bytearray(zlib.decompress(data))
        return torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)

    def prefetch(self, keys: Key | Iterable[Key]) -> None:
        """Nothing is faster for being announced."""

    def drop(self, key: Key) -> None:
        self._entries.pop(key, None)

    def clear(self) -> None:
        self._entries.clear()

    @property
    def compressed_bytes(self) -> int:
        return sum(len(data) for data, _, _ in self._entries.values())


def main() -> None:
    check_store(CompressedStore)  # everything that a store has to keep
    steps, compressed = 20, CompressedStore()
    store = TieredStore([(GPUStore(), 1 << 20), (compressed, None)])
    pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan")
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_cache("taylorseer", num_inference_steps=steps, granularity="per_block", store=store, cache_interval=3)
    pipe(
        "a purple ring bouncing on a navy background",
        height=128,
        width=128,
        num_frames=33,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(3),
    )
    held = store.tier_bytes
    print(f"bytes by tier: {held}, the last in {compressed.compressed_bytes}")
    print(pipe.cache.stats["cond"])


if __name__ == "__main__":
    main()
