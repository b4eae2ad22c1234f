"""What a call of a pipeline may rely on: that it is the only one, and that its device is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from edit_ray.errors import ModelError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_LOCK = threading.Lock()
_CALLED: set[int] = set()  # ids of the pipelines at work: one that is copied or pickled takes nothing of it along


def one_call_at_a_time(call: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A pipeline's method that refuses to begin while it is at work: scheduler, guidance and cache are the pipeline's.

    Raises:
        RuntimeError: in the call that comes second; the first one goes on undisturbed.
    """

    @wraps(call)
    def alone(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        pipe: Any = args[0]
        with _LOCK:
            if id(pipe) in _CALLED:
                raise RuntimeError(
                    f"This {type(pipe).__name__} is at work, in another thread or in a call that made this one; "
                    "a pipeline makes one call at a time. copy.deepcopy(pipe) is another pipeline."
                )
            _CALLED.add(id(pipe))
        try:
            return call(*args, **kwargs)
        finally:
            _CALLED.discard(id(pipe))

    return alone


def check_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ModelError: torch knows no such name, or sees no such CUDA device.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ModelError(f"device is {device!r}; valid are 'cpu', 'cuda', and 'cuda:0' for the first GPU.") from None
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        there = f"'cpu' and 'cuda:0' to 'cuda:{count - 1}'" if count else "'cpu'"
        raise ModelError(f"device is {str(found)!r}, and torch sees {count} CUDA devices here; valid is {there}.")
    return found
