"""Wan at its real size with random weights, made where they are used: what it takes does not depend on their values."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from edit_ray import EditWanPipeline
from edit_ray.engine.fast_vae import fast_decoder
from edit_ray.engine.options import SamplingOptions
from edit_ray.testing import VARIANTS, Variant, fill_random, make_model, random_transformer
from edit_ray.testing.made_model import TextEncoder, byte_tokenizer

PROMPT = "a red circle bouncing on a black background"
SEED = 7


@dataclass(frozen=True)
class Task:
    """A model's configuration, and what is generated with it."""

    model: str
    variant: Variant
    torch_dtype: str = "bfloat16"
    height: int = 480
    width: int = 832
    num_frames: int = 33
    num_inference_steps: int = 30
    guidance_scale: float = 5.0

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.torch_dtype)
        return dtype

    @property
    def size(self) -> dict[str, int]:
        return {"height": self.height, "width": self.width, "num_frames": self.num_frames}

    @property
    def sampling(self) -> SamplingOptions:
        """The same as the actors are told it."""
        return SamplingOptions.model_validate(
            {
                **self.size,
                "num_inference_steps": self.num_inference_steps,
                "guidance_scale": self.guidance_scale,
                "seed": SEED,
            }
        )

    def told(self) -> dict[str, Any]:
        """What a result says of it."""
        steps = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {"model": self.model, "torch_dtype": self.torch_dtype, **self.size, **steps}


_TOY = Variant(
    transformer={
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 48,
        "num_layers": 10,
        "text_dim": 32,
        "freq_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "rope_max_seq_len": 64,
    },
    flow_shift=3.0,
    vae={
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    },
    text_encoder={"d_model": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
)
TASKS = {
    "t2v-1.3B": Task("Wan2.1 t2v-1.3B, random weights", VARIANTS["t2v-1.3B"]),
    "tiny": Task("a toy Wan, random weights", _TOY, torch_dtype="float32", height=32, width=32, num_frames=9),
}


def task_for(quick: bool, **changes: Any) -> Task:
    """The real size, or a toy one for `--quick`; `changes` that are not None replace its values."""
    return replace(TASKS["tiny" if quick else "t2v-1.3B"], **{k: v for k, v in changes.items() if v is not None})


def make_pipe(task: Task, device: str) -> EditWanPipeline:
    """A pipeline with weights drawn on the device; in its types it is what `from_pretrained` would load.

    Its text encoder is a small one that gives embeddings of the real width, and there is no image encoder: a call is
    given `conditions`.
    """
    variant = task.variant
    experts = ("transformer",) if variant.boundary_ratio is None else ("transformer", "transformer_2")
    with torch.device(device):
        vae = AutoencoderKLWan(**variant.vae).eval()
        text_encoder = UMT5EncoderModel(UMT5Config(**variant.text_encoder_config("tiny") or {})).eval()
    for part in (vae, text_encoder):
        fill_random(part)
    pipe = EditWanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=text_encoder.to(task.dtype),
        vae=nn.Module.to(vae, task.dtype),  # diffusers' own `to` warns, of nothing
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=variant.flow_shift
        ),
        **{
            name: random_transformer(variant, device=torch.device(device), dtype=task.dtype, seed=seed)
            for seed, name in enumerate(experts)
        },
        boundary_ratio=variant.boundary_ratio,
        expand_timesteps=variant.expand_timesteps,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditions(task: Task, device: str) -> dict[str, Any]:
    """What a model of this kind is given beside its prompt; what is computed does not depend on the values."""
    sizes, picture = task.variant.transformer, Image.new("RGB", (task.width, task.height), "gray")
    if "vace_layers" in sizes:
        return {"reference_images": [picture]}
    if sizes.get("in_channels") == sizes.get("out_channels"):
        return {}
    embeds = torch.zeros(1, 257, sizes.get("image_dim") or 1, device=device)
    return {"image": picture} | ({"image_embeds": embeds} if sizes.get("image_dim") else {})


def save_model(task: Task, device: str, folder: Path, text_encoder: TextEncoder = "tiny") -> Path:
    """The same in diffusers' layout, for actors to load; returns `folder`."""
    return make_model(folder, task.variant, text_encoder=text_encoder, dtype=task.dtype, device=torch.device(device))


def stock_pipe(pipe: EditWanPipeline) -> WanPipeline:
    """diffusers' own pipeline over the same components."""
    stock = WanPipeline(**pipe.components, expand_timesteps=pipe.config.expand_timesteps)
    stock.set_progress_bar_config(disable=True)
    return stock


@torch.no_grad()
def embeds(pipe: EditWanPipeline) -> dict[str, Tensor]:
    """The prompt's embeddings, made once: they are no part of the loop."""
    pipe.text_encoder.to(pipe.transformer.device)  # it may be offloaded
    found = pipe.encode_prompt(PROMPT, "", max_sequence_length=512, device=pipe.transformer.device)
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), found, strict=True))


def generate(pipe: Any, task: Task, given: Mapping[str, Tensor], seed: int = SEED, **changes: Any) -> Tensor:
    """The latents of one call of a pipeline, ours or diffusers'."""
    steps = {"num_inference_steps": task.num_inference_steps, "guidance_scale": task.guidance_scale}
    call: dict[str, Any] = {**given, **task.size, **steps, "output_type": "latent", "return_dict": False} | changes
    latents: Tensor = pipe(generator=torch.Generator().manual_seed(seed), **call)[0]
    return latents


def mask_of(steps: int, skipped: int) -> list[bool]:
    """Which steps compute where so many are skipped, evenly spread; the first and the last always do."""
    places = steps - 2
    if not 0 <= skipped <= places:
        raise ValueError(f"{skipped} of {steps} steps cannot be skipped where the first and the last compute.")
    return [True, *((place + 1) * skipped // places == place * skipped // places for place in range(places)), True]


MODES = ("exact", "fast", "fp8")  # the last is `fast` with linear layers in 8 bits


def use(pipe: EditWanPipeline, mode: str) -> None:
    """From now on the pipeline works in this mode."""
    pipe.precompute.mode, pipe.precompute.fp8 = "exact" if mode == "exact" else "fast", mode == "fp8"


def decoding(pipe: EditWanPipeline, mode: str) -> AbstractContextManager[None]:
    """What the pipeline's VAE decodes in here is decoded in this mode."""
    return nullcontext() if mode == "exact" else fast_decoder(pipe.vae)


def compiled_graphs() -> int:
    """How many graphs torch has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory_peak(device: str, *, reset: bool = False) -> int | None:
    """Bytes that torch had allocated at most since it was last reset; None on a CPU."""
    if device != "cuda":
        return None
    peak = int(torch.cuda.max_memory_allocated())
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peak
