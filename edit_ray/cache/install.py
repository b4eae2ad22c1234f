"""Install a cache on a transformer and remove it.

Transformer and blocks get a subclass of their own class that intercepts their calls: parameters, buffers, hooks and
`state_dict` stay as they are, LoRA loading finds the same names, a compiled block stays compiled (the cache acts
outside of it), and taking the cache off restores the class. A copy or a pickle has the original class and no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache as memoised
from numbers import Integral
from typing import Any, SupportsIndex

from torch import nn

from edit_ray.cache.adapters import adapter_of
from edit_ray.cache.blocks import Expert, check_not_compiled, split_blocks
from edit_ray.cache.cache import Cache
from edit_ray.cache.cfg_gate import CfgGate
from edit_ray.cache.loop_position import LoopStep
from edit_ray.cache.policies import check_granularity, make_policy
from edit_ray.cache.policies.policy import CachePolicy
from edit_ray.cache.stores.base import CacheStore
from edit_ray.cache.stores.memory import GPUStore

_LINK = "_edit_ray_link"


def apply_cache_on_transformer(
    transformer: nn.Module | Mapping[str, nn.Module],
    policy: str | CachePolicy = "teacache",
    num_inference_steps: int = 50,
    granularity: str | int = "stack",
    store: CacheStore | None = None,
    history_len: int | None = None,
    schedule: Callable[[], Sequence[LoopStep]] | None = None,
    copies: Mapping[str, nn.Module] | None = None,
    cfg_gate: float | None = None,
    **policy_kwargs: Any,
) -> Cache:
    """Cache a transformer's block stack; works under any pipeline that sets diffusers' `cache_context` with steps.

    Args:
        transformer: A diffusers transformer; or several that share the steps of one loop, by the name of the expert
            ("transformer", "transformer_2").
        policy: When to recompute: a registered name with its options in `policy_kwargs`, or a policy.
        num_inference_steps: Steps of the loop: for a noise scheduler such as Heun's twice the call's number less one. A
            later call may have another number if the policy supports it.
        granularity: What one decision covers: "stack", "per_block", or the number of blocks in a group.
        store: Of the residuals; by default a `GPUStore`.
        history_len: The number of computed residuals kept of each unit, at least as many as the policy reads.
        copies: Copies of these transformers on another device, by the same names: they count as the same expert.
        cfg_gate: The share of the steps, from the first, after which "uncond" is not computed but is "cond" minus their
            last difference; None or 1 computes both to the end. Such a forward asks neither policy nor hooks.

    Raises:
        ValueError, TypeError: unknown or incomplete policy, wrong options or granularity, an unsupported model.
    """
    transformers = {"transformer": transformer} if isinstance(transformer, nn.Module) else dict(transformer)
    if not transformers:
        raise ValueError("There is no transformer to cache: the pipeline has neither transformer nor transformer_2.")
    check_steps(num_inference_steps)
    made = make_policy(policy, policy_kwargs)
    check_granularity(made, granularity)
    if history_len is not None and history_len < made.history_len:
        raise ValueError(f"history_len is {history_len}; this policy reads the last {made.history_len} residuals.")
    if copies and (cfg_gate is not None or made.uncond_follows):
        who = "cfg_gate" if cfg_gate is not None else type(made).__name__
        raise ValueError(f"{who} needs each step's cond before its uncond, and cfg_parallel computes both at once.")
    experts = [_expert(name, module, granularity) for name, module in transformers.items()]
    cache = Cache(
        made,
        num_inference_steps=num_inference_steps,
        store=GPUStore() if store is None else store,
        history_len=history_len or made.history_len,
        schedule=schedule,
        cfg_gate=None if cfg_gate is None else CfgGate(cfg_gate),
    )
    beside = [_expert(name, module, granularity) for name, module in (copies or {}).items()]
    for expert in experts:
        cache.experts[expert.name] = expert
    for expert in (*experts, *beside):
        _install(cache, expert)
    cache.reset(clear_store=False)
    return cache


def check_steps(num_inference_steps: int) -> None:
    """Raises ValueError for anything but a whole number from 1."""
    if (
        isinstance(num_inference_steps, bool)
        or not isinstance(num_inference_steps, Integral)
        or num_inference_steps < 1
    ):
        raise ValueError(f"num_inference_steps is {num_inference_steps!r}; it must be a whole number from 1.")


def cache_on(transformer: nn.Module) -> Cache | None:
    """The cache of a transformer, also if it was compiled later; None without a cache."""
    link = getattr(transformer, _LINK, None)
    return None if link is None else link[0]


def remove_cache_from_transformer(transformer: nn.Module) -> None:
    """Remove the cache, if there is one, from all transformers that share it."""
    cache = cache_on(transformer)
    if cache is not None:
        cache.remove()


def _expert(name: str, transformer: nn.Module, granularity: str | int) -> Expert:
    """A transformer with its adapter and units.

    Raises:
        ValueError: it cannot be cached, or is cached already.
    """
    kind = type(transformer).__name__
    if _LINK in transformer.__dict__:
        raise ValueError(f"This {kind} has a cache already; disable that first.")
    check_not_compiled(transformer)
    adapter = adapter_of(transformer)
    if not hasattr(transformer, "cache_context"):
        raise ValueError(f"{kind} has no cache_context: the branch and the step of a forward cannot be known.")
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(f"This {kind} has one of diffusers' own caches; disable that first.")
    return Expert(name, transformer, adapter, split_blocks(len(adapter.blocks(transformer)), granularity))


def _install(cache: Cache, expert: Expert) -> None:
    _listen(cache, expert.transformer, _listening_transformer, (cache, expert))
    for position, block in enumerate(expert.adapter.blocks(expert.transformer)):
        _listen(cache, block, _listening_block, (cache, position))
    for block in getattr(expert.transformer, "vace_blocks", ()):
        _listen(cache, block, _listening_control, (cache,))


def _listen(cache: Cache, module: nn.Module, listening: Callable[[type], Any], link: tuple[Any, ...]) -> None:
    original = type(module)
    module.__dict__[_LINK] = link
    module.__class__ = listening(original)

    def restore() -> None:
        module.__class__ = original
        del module.__dict__[_LINK]

    cache.on_remove.append(restore)


# One subclass per class of blocks: compiled code is specialised on it, and the blocks share that code only then.
@memoised
def _listening_block(cls: Any) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        cache, position = self.__dict__[_LINK]
        return cache.block(position, super(listening, self).__call__, args, kwargs)

    listening = _subclass(cls, {"__call__": __call__})
    return listening


@memoised
def _listening_control(cls: Any) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        (cache,) = self.__dict__[_LINK]
        return cache.control(super(listening, self).__call__, args, kwargs)

    listening = _subclass(cls, {"__call__": __call__})
    return listening


@memoised
def _listening_transformer(cls: Any) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        cache, expert = self.__dict__[_LINK]
        return cache.forward(expert, super(listening, self).__call__, args, kwargs)

    @contextmanager
    def cache_context(self: nn.Module, name: str, **where: Any) -> Iterator[None]:
        cache, _ = self.__dict__[_LINK]
        steps = (where.get("step_index"), where.get("num_inference_steps"), where.get("sigma"))
        with super(listening, self).cache_context(name, **where), cache.context(name, *steps):
            yield

    listening = _subclass(cls, {"__call__": __call__, "cache_context": cache_context})
    return listening


class _Listening(type):
    """Classes that equal their base class: diffusers compares a component's class with the known ones, and `from_pipe`
    would otherwise leave out a transformer with a cache.
    """

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    def __hash__(cls) -> int:
        return hash(cls.__base__)


def _subclass(cls: Any, methods: dict[str, Any]) -> Any:
    """A subclass of the same name and module, so that saving a model writes its own class."""

    def __reduce_ex__(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:  # noqa: N807
        return _new, (cls,), {name: value for name, value in self.__dict__.items() if name != _LINK}

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return _Listening(cls.__name__, (cls,), names | methods | {"__reduce_ex__": __reduce_ex__})


def _new(cls: Any) -> Any:
    return cls.__new__(cls)
