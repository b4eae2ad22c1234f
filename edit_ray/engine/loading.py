"""From `ModelOptions` to a pipeline that is ready on its device, with a text encoder that may stay in host memory."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as AttentionBackends
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from edit_ray.engine.caching import experts_of
from edit_ray.engine.card_memory import Run, card_problem, needs_of
from edit_ray.engine.lora import load_loras
from edit_ray.engine.model_files import locate_model
from edit_ray.engine.model_info import dtype_problem, read_configs
from edit_ray.engine.options import Mode, ModelOptions, Sampler, SamplingOptions
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.engine.stored_weights import load_transformers, storing
from edit_ray.errors import ModelError

# While a model is loaded a patch of torch, which holds for the whole process, leaves its weights empty: of two models
# loaded at once, one could keep empty weights.
_ONE_AT_A_TIME = threading.Lock()
SAMPLERS: dict[Sampler, str] = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "renoise": "FlowMatchLCMScheduler",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(options: ModelOptions, kind: type[EditWanPipeline] = EditWanPipeline) -> EditWanPipeline:
    """Load the model on its device, without progress bars, every part in `torch_dtype`, the VAE included.

    It becomes a pipeline of this `kind`, which must be that of the model. An offloaded text encoder stays in host
    memory, and so do offloaded blocks.

    Raises `ModelError` if the path is not a Wan model, a LoRA does not fit it, the device is missing or cannot run the
    dtype, a package is missing, the GPU cannot hold the weights, and if `device_bytes` is too little.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.torch_dtype, device)
    folder = locate_model(options.path)
    if device.type == "cuda":
        _check_card(options, torch.cuda.get_device_properties(device).total_memory)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with _ONE_AT_A_TIME:
            pipe = _read_parts(options, folder, dtype, kind)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model.path {options.path!r} ({folder}) cannot be loaded as a Wan model: {error}") from error
    load_loras(pipe, options)
    if options.storage == "fp8":
        for transformer in experts_of(pipe).values():
            transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
    stays = {"none": (), "text_encoder": ("text_encoder",), "blocks": ("text_encoder", *experts_of(pipe))}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in stays[options.offload]:
            part.to(device)
    if options.offload == "blocks":
        try:
            pipe.enable_block_offload(device, options.device_bytes or 0)
        except ValueError as error:
            raise ModelError(f"model.device_bytes: {error}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_card(options: ModelOptions, card: int) -> None:
    """Raise `ModelError` for weights that the GPU cannot hold, before they are read."""
    configs, per_token = read_configs(options.path)
    stored: dict[str, Any] = {"storage": options.storage, "torch_dtype": options.torch_dtype}
    run = Run(height=16, width=16, num_frames=1, branches=1, file_bytes=options.gguf_bytes, **stored)
    if problem := card_problem(needs_of(configs, run, per_token=per_token), card, options.device_bytes):
        raise ModelError(f"model.path is {options.path!r}: {problem}")


def _read_parts(
    options: ModelOptions, location: str, dtype: torch.dtype, kind: type[EditWanPipeline]
) -> EditWanPipeline:
    """The model's parts in host memory, those in single files from these."""
    given = load_transformers(options, location, dtype)
    own = [name for name in ("transformer", "transformer_2") if name not in given]
    return kind.from_pretrained(location, torch_dtype=dtype, **given, **storing(options, own))


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA if there is a GPU, else the CPU. Raises `ModelError` for `cuda` without a GPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is 'cuda', but torch sees no CUDA device here; it must be 'auto' or 'cpu'.")
    return torch.device(device)


def second_gpu() -> torch.device:
    """The device of `engine.cfg_parallel`. Raises `ModelError` if there is none."""
    if torch.cuda.device_count() < 2:
        raise ModelError(
            f"engine.cfg_parallel is true, but torch sees {torch.cuda.device_count()} CUDA devices here; it needs two."
        )
    return torch.device("cuda", 1)


def choose_dtype(torch_dtype: str, device: torch.device) -> torch.dtype:
    """The torch type of that name. Raises `ModelError` if diffusers or the hardware do not run it."""
    if problem := dtype_problem(torch_dtype, device.type):
        raise ModelError(f"model.torch_dtype {problem}")
    if torch_dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ModelError(
            f"model.torch_dtype is 'bfloat16', which {torch.cuda.get_device_name(device)} cannot run; "
            "it must be 'float32' or 'float16'."
        )
    return DTYPES[torch_dtype]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def provenance_of(device: torch.device, threads: int, mode: Mode, fp8: bool = False) -> dict[str, str | int]:
    """What a run's bits depend on besides its configuration: processes that agree on it make the same frames.

    In the mode `fast` frames may differ all the same.
    """
    on_cpu = device.type == "cpu"
    return {
        "device": f"cpu {torch.backends.cpu.get_cpu_capability()}" if on_cpu else torch.cuda.get_device_name(device),
        "torch": str(torch.__version__),  # a plain str: torch's own class can only be unpickled with torch
        "diffusers": diffusers.__version__,
        "threads": threads,
        "attention": AttentionBackends.get_active_backend()[0].value,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "mode": f"{mode}, fp8" if fp8 else mode,
    }


def noise_scheduler_for(own: SchedulerMixin, sampling: SamplingOptions) -> SchedulerMixin:
    """The noise scheduler of `sampling`: of its `sampler`, by default the model's `own`, with its `flow_shift`.

    Raises `ModelError` for an own one without a flow shift, or without noise levels where `sigmas` are given.
    """
    cls = type(own) if sampling.sampler is None else getattr(diffusers, SAMPLERS[sampling.sampler])
    if cls is not type(own):
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        settings = flow if "use_flow_sigmas" in inspect.signature(cls).parameters else {}
        own = cls(num_train_timesteps=own.config.num_train_timesteps, **settings)
    if sampling.sigmas is not None and "sigmas" not in inspect.signature(own.set_timesteps).parameters:
        raise ModelError(f"sampling.sigmas are given, but the noise scheduler, {cls.__name__}, takes no noise levels.")
    return with_flow_shift(own, sampling.flow_shift)


def with_flow_shift(noise_scheduler: SchedulerMixin, flow_shift: float) -> SchedulerMixin:
    """The same noise scheduler if it has this `flow_shift` (`shift` in FlowMatchEuler's config), else a rebuilt one.

    Raises `ModelError` for a noise scheduler that knows neither.
    """
    name = next((name for name in ("flow_shift", "shift") if name in noise_scheduler.config), None)
    if name is None:
        raise ModelError(
            f"sampling.flow_shift is {flow_shift}, but the model's noise scheduler, {type(noise_scheduler).__name__}, "
            "has no flow shift; UniPCMultistepScheduler and FlowMatchEulerDiscreteScheduler have one."
        )
    if noise_scheduler.config[name] == flow_shift:
        return noise_scheduler
    return type(noise_scheduler).from_config(noise_scheduler.config, **{name: flow_shift})


@contextmanager
def streamed(text_encoder: Any, device: torch.device) -> Iterator[None]:
    """The text encoder computes on `device`, which has its inputs and one block's weights at a time.

    Each block encodes the prompts of a call one by one, so that the bits of one do not depend on the others. The
    weights are copied once for all of them.
    """
    stack = text_encoder.encoder
    parts: list[nn.Module] = [*stack.block, stack.final_layer_norm]
    embedding: nn.Module = stack.embed_tokens
    embed = embedding.forward
    for part in parts:
        part.forward = partial(_compute_on, device, part, part.forward)
    embedding.forward = lambda ids: embed(ids.cpu()).to(device)
    try:
        yield
    finally:
        for part in (*parts, embedding):
            del part.forward


def _compute_on(device: torch.device, part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward` for each element of the first argument's batch [B, L, D]; the results as one batch."""
    rows = len(args[0])

    def row_of(value: Any, row: int) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows
        return value[row : row + 1] if batched else value

    home = [(parameter, parameter.data) for parameter in part.parameters()]
    for parameter, data in home:
        parameter.data = data.to(device, non_blocking=True)
    try:
        results = [
            forward(*(row_of(value, row) for value in args), **{name: row_of(kwargs[name], row) for name in kwargs})
            for row in range(rows)
        ]
    finally:
        for parameter, data in home:
            parameter.data = data
    if isinstance(results[0], Tensor):
        return torch.cat(results)
    return tuple(torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*results, strict=True))
