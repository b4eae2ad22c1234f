"""The two branches of classifier-free guidance on two devices, at the same time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edit_ray.engine.alone import check_device


class CfgParallel:
    """Copies of a pipeline's transformers on another device, on which the branch "uncond" is computed.

    One thread asks for its forwards, so that while one device is told what to compute the other one computes. On
    devices of one kind every bit is what it is on one device, since each branch is computed as it is there.
    """

    def __init__(self, transformers: Mapping[str, nn.Module], device: torch.device) -> None:
        """The copies share no weights with the originals: what is changed there later (LoRA, say) is not seen here."""
        self.device = device
        self.transformers = {name: _copied(transformer, device) for name, transformer in transformers.items()}
        self._copy_of = {transformers[name]: copied for name, copied in self.transformers.items()}
        self._thread = ThreadPoolExecutor(1, "uncond")

    @contextmanager
    def forward(
        self, transformer: nn.Module, encoder_hidden_states: Tensor, inputs: Mapping[str, Any], where: Mapping[str, Any]
    ) -> Iterator[Future[Tensor]]:
        """A forward of the transformer's copy, made while this is open; it is over when this is left.

        Its result is the noise prediction [B, C, T, h, w], on the copy's device. `inputs` are the forward's other
        arguments, `where` those of its `cache_context`. The arguments are copied here, after what the caller has
        computed. Raises ValueError for a transformer that is not one of the originals.
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

        Takes as much of that device's memory as the transformers take. LoRA and other changes of weights come before
        it, a cache after it; what a cache's hooks and policy are asked then comes from two threads.

        Raises:
            ValueError: it is enabled already, or a cache is.
            ModelError: there is no such device.
        """
        pipe: Any = self
        if self.cfg_parallel is not None:
            raise ValueError("cfg_parallel is enabled already; call disable_cfg_parallel() first.")
        if pipe.cache is not None:
            raise ValueError("A cache is enabled; call disable_cache() first, and enable_cache() after this.")
        names = ("transformer", "transformer_2")
        experts = {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}
        self.cfg_parallel = CfgParallel(experts, check_device(device))

    def disable_cfg_parallel(self) -> None:
        """Compute both branches on one device again, and free the other one; where it is not enabled, nothing happens.

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


def _copied(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy on another device, without one in between: the first device may have no room for two."""
    tensors = [*module.parameters(), *module.buffers()]
    moved: dict[int, Any] = {id(tensor): _moved(tensor, device) for tensor in tensors}
    return copy.deepcopy(module, moved)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    there = tensor.detach().to(device, copy=True)
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
