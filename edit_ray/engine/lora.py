"""LoRA on a pipeline: diffusers' own loading, fusing and weighing, and what depends on the weights follows them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers.loaders import WanLoraLoaderMixin
from safetensors import SafetensorError

from edit_ray.engine.caching import experts_of
from edit_ray.engine.lora_files import fit_problem, layers_of, loras_digest
from edit_ray.engine.model_files import allowed_file
from edit_ray.engine.options import LoraOptions, ModelOptions, adapter_names
from edit_ray.errors import ModelError


@contextmanager
def _changed_weights(pipe: Any, *, layers: bool) -> Iterator[None]:
    """Surrounds a change of what the transformers compute; `layers`: of their modules or weights, not only of scales.

    A fused LoRA is added to a weight behind torch's back: its version stays the same. What was computed from the weight
    (embeddings, 8-bit copies) is known by the version, so it is counted up here.
    """
    if pipe.cfg_parallel is not None:
        raise ValueError("cfg_parallel is enabled, whose copies would not change; call disable_cfg_parallel() first.")
    if pipe.block_offload is not None and layers:
        raise ValueError("The blocks are offloaded; call disable_block_offload() first, and enable it again after.")
    if pipe.has_target_speedup:
        raise ValueError("The cache's target_speedup was reached with other weights; call disable_cache() first.")
    pipe.lora_digest = None
    try:
        yield
    finally:
        if not pipe.had_fused_lora and not any(getattr(t, "peft_config", None) for t in experts_of(pipe).values()):
            pipe.lora_digest = ""
        for transformer in experts_of(pipe).values():
            torch.autograd.graph.increment_version([p for p in transformer.parameters() if not p.is_inference()])
        if pipe.cache is not None:
            pipe.cache.drop_residuals()


def _changing(name: str, *, layers: bool = True) -> Any:
    @wraps(getattr(WanLoraLoaderMixin, name))
    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _changed_weights(self, layers=layers):
            self.had_fused_lora |= name == "fuse_lora"
            return getattr(super(LoraControl, self), name)(*args, **kwargs)

    return changing


class LoraControl:
    """diffusers' methods for LoRA, after which nothing that was computed with other weights is used any more.

    Raises:
        ValueError: `cfg_parallel`, block offloading or a cache with `target_speedup` is enabled, which hold to the
            weights as they were; a LoRA matches nothing, or is of another model.
    """

    lora_digest: str | None = ""
    """The digest of the LoRAs that act, empty for none; None if that is not known."""
    had_fused_lora = False  # the weights are others then, even after it was unfused, by rounding

    load_lora_weights = _changing("load_lora_weights")
    fuse_lora = _changing("fuse_lora")
    unfuse_lora = _changing("unfuse_lora")
    unload_lora_weights = _changing("unload_lora_weights")
    delete_adapters = _changing("delete_adapters")
    set_adapters = _changing("set_adapters", layers=False)
    enable_lora = _changing("enable_lora", layers=False)
    disable_lora = _changing("disable_lora", layers=False)

    @classmethod
    def load_lora_into_transformer(cls, state_dict: Any, transformer: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers', but a LoRA that does not fit raises ValueError where diffusers warns or fails halfway."""
        problem = fit_problem({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, layers_of(transformer))
        if problem is not None:
            raise ValueError(f"The LoRA {problem}")
        super().load_lora_into_transformer(state_dict, transformer, *args, **kwargs)  # type: ignore[misc]


def load_loras(pipe: Any, model: ModelOptions) -> None:
    """Load the LoRAs of a configuration, and fuse them unless it says otherwise.

    Fused, their layers are gone afterwards: the transformers are as diffusers loads them, with other weights.

    Raises:
        ModelError: a file is missing, or does not fit.
    """
    if not model.loras:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of the LoRA before it
        for lora, name in zip(model.loras, adapter_names(model.loras), strict=True):
            file, second = str(allowed_file(lora.path)), lora.expert == "transformer_2"
            try:
                pipe.load_lora_weights(file, adapter_name=name, load_into_transformer_2=second)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                raise ModelError(f"The LoRA {file!r} cannot be loaded: {error}") from error
    weigh_loras(pipe, model.loras)
    if model.fuse_lora:
        pipe.fuse_lora(components=list(dict.fromkeys(lora.expert for lora in model.loras)))
        pipe.unload_lora_weights()
    pipe.lora_digest = loras_digest(model.loras)


def weigh_loras(pipe: Any, loras: Sequence[LoraOptions], weights: Mapping[str, float] | None = None) -> None:
    """Set the weights of LoRAs that are not fused: their own, or those in `weights`, by adapter."""
    names = adapter_names(loras)
    with _changed_weights(pipe, layers=False):
        for expert, transformer in experts_of(pipe).items():
            own = {name: lora.weight for lora, name in zip(loras, names, strict=True) if lora.expert == expert}
            scales = {name: (weights or {}).get(name, weight) for name, weight in own.items()}
            if scales:
                transformer.set_adapters(list(scales), list(scales.values()))
    if not weights:
        pipe.lora_digest = loras_digest(loras)
