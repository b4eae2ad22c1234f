"""A model folder with the configuration of a published Wan and random weights, on which its speed does not depend."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from edit_ray.testing.random_weights import FILE_BYTES, fill_random, save_random_weights
from edit_ray.testing.variants import VARIANTS, TextEncoder, Variant
from edit_ray.testing.wan import END, PAD, UNKNOWN, name_tokenizer_class


def make_model(
    directory: Path,
    variant: str | Variant,
    *,
    text_encoder: TextEncoder = "full",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    seed: int = 0,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a model of the variant's real sizes in diffusers' folder layout; returns `directory`.

    Args:
        directory: Made where it is missing.
        variant: One of `VARIANTS` by name, or sizes of one's own.
        text_encoder: UMT5-XXL as published, a small one that gives embeddings of the same width, or none.
        dtype: The weights' type in the files.
        device: Where they are drawn, which is fastest on a GPU; one file's worth at a time.
        seed: The same seed gives the same weights, on the same kind of device.
        file_bytes: Bytes of weights in one file.

    Raises:
        OSError: the folder cannot be written.
    """
    sizes = VARIANTS[variant] if isinstance(variant, str) else variant
    drawing: dict[str, Any] = {"seed": seed, "dtype": dtype, "device": device or torch.device("cpu")}
    parts: dict[str, list[str | None]] = {}
    for name, part in _parts(sizes, text_encoder).items():
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        is_text = name == "text_encoder"
        part.config.save_pretrained(folder) if is_text else part.save_config(folder)
        stem = folder / ("model" if is_text else "diffusion_pytorch_model")
        save_random_weights(part, stem, **drawing, file_bytes=file_bytes)
        parts[name] = ["transformers" if is_text else "diffusers", type(part).__name__]
    _noise_scheduler(sizes).save_pretrained(directory / "scheduler")
    parts["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    has_text = text_encoder != "none"
    parts.setdefault("text_encoder", [None, None])
    parts["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"] if has_text else [None, None]
    parts["transformer_2"] = [None, None]
    index = {"_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__, **parts}
    index |= {"boundary_ratio": None, "expand_timesteps": sizes.expand_timesteps}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if has_text:
        byte_tokenizer().save_pretrained(directory / "tokenizer")
        name_tokenizer_class(directory)
    return directory


def meta_transformer(variant: str | Variant) -> WanTransformer3DModel:
    """The transformer of a variant without memory for its weights."""
    sizes = VARIANTS[variant] if isinstance(variant, str) else variant
    with torch.device("meta"):
        return WanTransformer3DModel(**sizes.transformer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte of any text, an end token last."""
    vocabulary = {token: index for index, token in enumerate((PAD, END, UNKNOWN, *sorted(ByteLevel.alphabet())))}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, vocabulary[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )


def _parts(sizes: Variant, text_encoder: TextEncoder) -> dict[str, Any]:
    """The models of the folder, on the device "meta"."""
    parts = {"transformer": meta_transformer(sizes)}
    text_config = sizes.text_encoder_config(text_encoder)
    with torch.device("meta"):
        parts["vae"] = AutoencoderKLWan(**sizes.vae)
        if text_config is not None:
            parts["text_encoder"] = UMT5EncoderModel(UMT5Config(**text_config))
    return parts


def _noise_scheduler(sizes: Variant) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sizes.flow_shift)


def random_transformer(
    variant: str | Variant, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> WanTransformer3DModel:
    """The transformer of a variant as `from_pretrained` would give it, made in place, without files."""
    sizes = VARIANTS[variant] if isinstance(variant, str) else variant
    with torch.device(device), torch.random.fork_rng(devices=[]):
        model = WanTransformer3DModel(**sizes.transformer).eval()
    fill_random(model, seed)
    wide = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in wide for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model
