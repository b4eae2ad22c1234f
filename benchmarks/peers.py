"""Caches of others under diffusers' own pipeline, told which steps to skip, so that all skip the same ones."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported

from diffusers import FirstBlockCacheConfig, MagCacheConfig, WanPipeline

from benchmarks.gpu_results import LeftOut

Mask = Sequence[bool]
Enable = Callable[[WanPipeline, Mask], AbstractContextManager[dict[str, Any]]]
"""Entered to turn the cache on; yields what the pipeline's call takes beside."""

_FIRST_BLOCK_HOOK = "fbc_leader_block_hook"


@contextmanager
def first_block_cache(pipe: WanPipeline, mask: Mask) -> Iterator[dict[str, Any]]:
    """diffusers' FirstBlockCache: its threshold is everything before a step to skip, and nothing before the others."""
    transformer = pipe.transformer
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    hook = transformer.blocks[0]._diffusers_hook.get_hook(_FIRST_BLOCK_HOOK)

    def before(step: int) -> None:
        hook.threshold = -1.0 if step >= len(mask) or mask[step] else float("inf")

    def after_step(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        before(step + 1)
        return tensors

    before(0)
    try:
        yield {"callback_on_step_end": after_step}
    finally:
        transformer.disable_cache()


@contextmanager
def mag_cache(pipe: WanPipeline, mask: Mask) -> Iterator[dict[str, Any]]:
    """diffusers' MagCache: a ratio of 1 predicts no error, one of 1000 more than is allowed."""
    ratios = [1000.0 if compute else 1.0 for compute in mask]
    steps = len(mask)
    config = MagCacheConfig(
        threshold=0.5, max_skip_steps=steps, retention_ratio=0.0, num_inference_steps=steps, mag_ratios=ratios
    )
    pipe.transformer.enable_cache(config)
    try:
        yield {}
    finally:
        pipe.transformer.disable_cache()


def db_cache(first_blocks: int) -> Enable:
    """cache-dit's DBCache with its own mask of steps; with a threshold that lets each of the others be skipped."""

    @contextmanager
    def enable(pipe: WanPipeline, mask: Mask) -> Iterator[dict[str, Any]]:
        try:
            import cache_dit  # of the extra `bench`
        except ImportError as error:
            raise LeftOut(f"cache-dit is not installed ({error})") from error
        held = set(pipe.transformer.__dict__)
        config = cache_dit.DBCacheConfig(
            num_inference_steps=len(mask),
            Fn_compute_blocks=first_blocks,
            Bn_compute_blocks=0,
            residual_diff_threshold=1e9,
            steps_computation_mask=[int(compute) for compute in mask],
        )
        cache_dit.enable_cache(pipe, cache_config=config)
        try:
            yield {}
        finally:
            cache_dit.disable_cache(pipe)
            for left in set(pipe.transformer.__dict__) - held:  # it leaves a `forward` on the object
                del pipe.transformer.__dict__[left]

    return enable


PEERS: Mapping[str, Enable] = {
    "diffusers MagCache": mag_cache,
    "diffusers FirstBlockCache": first_block_cache,
    "cache-dit DBCache F1B0": db_cache(1),
    "cache-dit DBCache F8B0": db_cache(8),
}
