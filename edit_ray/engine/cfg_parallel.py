"""The two branches of classifier-free guidance on two devices, at the same time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edit_ray.engine.caching import experts_of
from edit_ray.errors import ModelError


class CfgParallel:
    """Copies of a pipeline's transformers on another device, which compute the branch "uncond".

    One thread asks for their forwards, so both devices compute at the same time. On devices of one kind every bit is
    that of one device, since each branch is computed as it is there.
    """

    def __init__(self, transformers: Mapping[str, nn.Module], device: torch.device) -> None:
        """The copies share no weights with the originals: later changes there (LoRA, say) have no effect here."""
        self.device = device
        self.transformers = {name: _copied(transformer, device) for name, transformer in transformers.items()}
        self._copy_of = {transformers[name]: copied for name, copied in self.transformers.items()}
        self._thread = ThreadPoolExecutor(1, "uncond")

    @contextmanager
    def forward(
        self, transformer: nn.Module, encoder_hidden_states: Tensor, inputs: Mapping[str, Any], where: Mapping[str, Any]
    ) -> Iterator[Future[Tensor]]:
        """Start a forward of the transformer's copy; it has ended when the context ends.

        The future's result is the noise prediction [B, C, T, h, w], on the copy's device. `inputs` are the forward's
        other arguments, `where` those of its `cache_context`. Tensors are copied in the caller's thread, in order with
        its own work. Raises ValueError for a transformer that is not one of the originals.
        """
        model: Any = self._copy_of.get(transformer)
        if model is None:
            raise ValueError(
                "The pipeline has another transformer than enable_cfg_parallel() has copied; call "
                "disable_cfg_parallel(), and enable it again."
            )
        text = encoder_hidden_states.to(self.device, non_blocking=True)
        there = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

        @torch.no_grad()
        def predict() -> Tensor:
            with model.cache_context("uncond", **where):
                noise_pred: Tensor = model(encoder_hidden_states=text, **there)[0]
            return noise_pred

        begun = self._thread.submit(predict)
        try:
            yield begun
        finally:
            wait([begun])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


class CfgControl:
    """`enable_cfg_parallel` and `disable_cfg_parallel` for a pipeline of diffusers' components."""

    cfg_parallel: CfgParallel | None = None

    def enable_cfg_parallel(self, device: str | torch.device) -> None:
        """Compute the branch "uncond" on another device, at the same time as "cond", in all later calls.

        Takes as much of that device's memory as the transformers take. Change weights (LoRA, say) before it and enable
        a cache after it; two threads then call the cache's hooks and policy.

        Raises:
            ValueError: it is enabled already, or a cache is.
            ModelError: there is no such device.
        """
        pipe: Any = self
        if self.cfg_parallel is not None:
            raise ValueError("cfg_parallel is enabled already; call disable_cfg_parallel() first.")
        if pipe.cache is not None:
            raise ValueError("A cache is enabled; call disable_cache() first, and enable_cache() after this.")
        self.cfg_parallel = CfgParallel(experts_of(pipe), check_device(device))

    def disable_cfg_parallel(self) -> None:
        """Compute both branches on one device again and free the other; does nothing if it is not enabled.

        Raises:
            ValueError: a cache is enabled.
        """
        pipe: Any = self
        if self.cfg_parallel is None:
            return
        if pipe.cache is not None:
            raise ValueError("A cache is enabled; call disable_cache() first.")
        self.cfg_parallel.close()
        self.cfg_parallel = None


def check_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ModelError: torch knows no such name, or sees no such CUDA device.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ModelError(f"device is {device!r}; it must be 'cpu', 'cuda', or 'cuda:0' for the first GPU.") from None
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        there = f"'cpu' or 'cuda:0' to 'cuda:{count - 1}'" if count else "'cpu'"
        raise ModelError(f"device is {str(found)!r}, and torch sees {count} CUDA devices here; it must be {there}.")
    return found


def _copied(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy on another device, made without a second one on the first, which may lack the memory."""

    def moved(tensor: Tensor) -> Tensor:
        copied = tensor.detach().to(device, copy=True)
        return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied

    return copy.deepcopy(module, {id(tensor): moved(tensor) for tensor in (*module.parameters(), *module.buffers())})
