"""A text encoder at work on a device with no room for all of it: the weights of one block are there at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def streamed(text_encoder: Any, device: torch.device) -> Iterator[None]:
    """The encoder's calls in here compute on `device`, where their inputs are; its weights stay where they are.

    Of several prompts in one call each goes through each block alone, so that its bits do not depend on the others,
    and the weights make the way once for all of them.
    """
    stack = text_encoder.encoder
    parts: list[nn.Module] = [*stack.block, stack.final_layer_norm]
    embedding: nn.Module = stack.embed_tokens
    for part in parts:
        part.forward = partial(_compute_on, device, part, part.forward)
    embedding.forward = partial(_embed, device, embedding.forward)
    try:
        yield
    finally:
        for part in (*parts, embedding):
            del part.forward


def _compute_on(device: torch.device, part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    home = [(parameter, parameter.data) for parameter in part.parameters()]
    for parameter, data in home:
        parameter.data = data.to(device, non_blocking=True)
    try:
        return _row_by_row(forward, args, kwargs)
    finally:
        for parameter, data in home:
            parameter.data = data


def _row_by_row(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`forward` for each element of the batch [B, L, D] that it is given first, and all results together."""
    rows = len(args[0])

    def of(value: Any, row: int) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows
        return value[row : row + 1] if batched else value

    results = [
        forward(*(of(value, row) for value in args), **{name: of(value, row) for name, value in kwargs.items()})
        for row in range(rows)
    ]
    if isinstance(results[0], Tensor):
        return torch.cat(results)
    return tuple(torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*results, strict=True))


def _embed(device: torch.device, forward: Callable[..., Tensor], ids: Tensor) -> Tensor:
    return forward(ids.cpu()).to(device)
