"""What unit hooks answer, and how it acts: checked before it touches the model's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from edit_ray.cache.policies.policy import PolicyContext

Edit = Callable[[Tensor], Tensor]
Answer = str | Tensor | Edit | None
UnitHook = Callable[[PolicyContext], Answer]


def checked(given: object, like: Tensor, source: str) -> Tensor:
    """`given`, if it is a tensor of the shape, dtype and device of `like`; broadcasting would hide a mistake.

    Raises:
        TypeError, ValueError: it is something else; names what `source` returned and what is valid.
    """
    valid = f"{list(like.shape)} of {like.dtype} on {like.device}, as the unit's input"
    if not isinstance(given, Tensor):
        raise TypeError(
            f"{source} returned {given if given is None else type(given).__name__}; valid is a tensor {valid}."
        )
    if (given.shape, given.dtype, given.device) != (like.shape, like.dtype, like.device):
        raise ValueError(
            f"{source} returned a tensor {list(given.shape)} of {given.dtype} on {given.device}; valid is {valid}."
        )
    return given


def with_edits(output: Tensor, residual: Tensor, edits: Sequence[Edit]) -> Tensor:
    """The unit's output [B, N, D] with its residual as the edits change it, each given what the one before returned.

    `residual` stays as it is, also where an edit works in place; edits that change nothing change no bit.
    """
    if not edits:
        return output
    changed = residual.clone()
    for edit in edits:
        changed = checked(edit(changed), residual, "The function of a unit hook")
    return output + (changed - residual)
