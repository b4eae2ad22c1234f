"""The differences between models: the blocks, their arguments, and the embedding of a timestep."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from edit_ray.registry import Registry


class ModelAdapter(Protocol):
    """Reads a transformer and the arguments of its calls; holds no state.

    Each block takes the hidden states [B, N, D] and returns them, nothing else, changed.
    """

    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """The stack, in the order of their calls."""

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The hidden states [B, N, D] in the arguments of a block."""

    def encoder_hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The text [B, L, D] in the arguments of a block."""

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Latents [B, C, T, h, w] and timestep, [B] or [B, tokens], in the arguments of the transformer."""

    def embed_timestep(self, transformer: nn.Module, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """`e` [1, D] and `e0` [1, 6, D] of a timestep [1], in float32: bfloat16 would blur their small changes."""


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """An argument, passed by position or by name; None if it was not passed."""
    return args[position] if position < len(args) else kwargs.get(name)


ADAPTERS: Registry[ModelAdapter] = Registry("model adapter", "edit_ray.adapters")
register_adapter = ADAPTERS.register


@register_adapter("WanTransformer3DModel")
class WanAdapter:
    """diffusers' Wan2.1 and Wan2.2, text-to-video and image-to-video."""

    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        return list(transformer.blocks)  # type: ignore[arg-type]

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        hidden: Tensor = argument(args, kwargs, 0, "hidden_states")
        return hidden

    def encoder_hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        text: Tensor | None = argument(args, kwargs, 1, "encoder_hidden_states")
        return text

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return argument(args, kwargs, 0, "hidden_states"), argument(args, kwargs, 1, "timestep")

    def embed_timestep(self, transformer: nn.Module, timestep: Tensor) -> tuple[Tensor, Tensor]:
        embedder: Any = transformer.condition_embedder
        linear = embedder.time_embedder.linear_1.weight
        e = embedder.time_embedder(embedder.timesteps_proj(timestep).to(linear.dtype)).float()
        project = embedder.time_proj
        if hasattr(project, "base_layer"):  # under a LoRA, which its own forward adds
            e0 = copy.deepcopy(project).float()(embedder.act_fn(e))
        else:
            e0 = F.linear(embedder.act_fn(e), project.weight.float(), project.bias.float())
        return e, e0.unflatten(1, (6, -1))


@register_adapter("WanVACETransformer3DModel")
class WanVACEAdapter(WanAdapter):
    """Wan VACE: the hints of its control blocks are added between the cached blocks, and belong to the residuals."""


def adapter_of(transformer: nn.Module) -> ModelAdapter:
    """The adapter registered for the class of a transformer, or for one of its bases. Raises ValueError."""
    known = ADAPTERS.names()
    for cls in type(transformer).__mro__:
        if cls.__name__ in known:
            return ADAPTERS.find(cls.__name__)()
    raise ValueError(
        f"The cache knows no {type(transformer).__name__}; it knows {', '.join(known)}. "
        "Another model needs an adapter: edit_ray.cache.register_adapter."
    )
