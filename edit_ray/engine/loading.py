"""From `ModelOptions` to a pipeline that is ready on its device."""

import threading

import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from edit_ray.engine.model_files import locate_model
from edit_ray.engine.options import ModelOptions
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.errors import ModelError

# While a model is loaded its weights' places are empty by a patch of torch that holds for the whole process, so that of
# two loaded at once one may keep empty ones.
_ONE_AT_A_TIME = threading.Lock()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(options: ModelOptions) -> EditWanPipeline:
    """Load the model on its device, without progress bars, every part in `torch_dtype`, the VAE included.

    A text encoder that is offloaded stays in host memory.

    Raises `ModelError` where the path is no Wan model, the device is missing or it cannot run the dtype.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.torch_dtype, device)
    folder = locate_model(options.path)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with _ONE_AT_A_TIME:
            pipe = EditWanPipeline.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"model.path {options.path!r} ({folder}) cannot be loaded as a Wan model: {error}") from error
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and not (name == "text_encoder" and options.offload == "text_encoder"):
            part.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises `ModelError` for `cuda` without a GPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is 'cuda', but torch sees no CUDA device here; valid are 'auto' and 'cpu'.")
    return torch.device(device)


def second_gpu() -> torch.device:
    """The device of `engine.cfg_parallel`. Raises `ModelError` where there is none."""
    if torch.cuda.device_count() < 2:
        raise ModelError(
            f"engine.cfg_parallel is true, but torch sees {torch.cuda.device_count()} CUDA devices here; it needs two."
        )
    return torch.device("cuda", 1)


def choose_dtype(torch_dtype: str, device: torch.device) -> torch.dtype:
    """The torch type of that name. Raises `ModelError` where diffusers or the hardware do not run it."""
    if torch_dtype == "float16" and device.type == "cpu":
        raise ModelError(
            "model.torch_dtype is 'float16', which diffusers does not run on a CPU; valid are 'float32' and 'bfloat16'."
        )
    if torch_dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ModelError(
            f"model.torch_dtype is 'bfloat16', which {torch.cuda.get_device_name(device)} cannot run; "
            "valid are 'float32' and 'float16'."
        )
    return DTYPES[torch_dtype]


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
