"""Models with the sizes of a published Wan and random weights, on which speed does not depend."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel, WanVACETransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from edit_ray.engine.causal_options import INDEX_KEY, causal_options
from edit_ray.engine.conditioning import SAVED_AS, kind_of
from edit_ray.testing.wan import SPECIAL_TOKENS, UNKNOWN, fast_tokenizer, image_processor, name_tokenizer_class

TextEncoder = Literal["full", "tiny", "none"]
Config = Mapping[str, Any]
FILE_BYTES = 2 * 2**30

# The published 48 means and deviations do not affect speed.
_WAN22_VAE: Config = {
    **{"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12},
    **{"out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
    **{"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
}
_UMT5_XXL: Config = {
    **{"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Variant:
    """The configs of a Wan model's parts, without what diffusers' classes take by default.

    With a `boundary_ratio` there are two experts of one size; `image_encoder` is CLIP's config, of models that take its
    features; a transformer with `vace_layers` is VACE's.
    """

    transformer: Config
    flow_shift: float
    vae: Config = field(default_factory=dict)
    text_encoder: Config = field(default_factory=lambda: _UMT5_XXL)
    expand_timesteps: bool = False
    boundary_ratio: float | None = None
    image_encoder: Config | None = None
    causal: Config | None = None  # the options of a causal model

    def text_encoder_config(self, size: TextEncoder) -> Config | None:
        """UMT5's config: as published, one narrow layer that gives embeddings of the same width, or None."""
        if size == "none":
            return None
        narrow = {"vocab_size": 512, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        return {**self.text_encoder, **(narrow if size == "tiny" else {}), "dropout_rate": 0.0}


_CLIP_VIT_H: Config = {
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16},
    **{"image_size": 224, "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu"},
}


def _transformer(heads: int, ffn_dim: int, num_layers: int, channels: int = 16, **more: Any) -> Config:
    sizes = {"num_attention_heads": heads, "ffn_dim": ffn_dim, "num_layers": num_layers}
    return sizes | {"in_channels": channels, "out_channels": channels, **more}


_SMALL, _LARGE = (12, 8960, 30), (40, 13824, 40)
_IMAGE: Config = {"in_channels": 36}
_CLIP: Config = {**_IMAGE, "image_dim": 1280, "added_kv_proj_dim": 5120}

VARIANTS: Mapping[str, Variant] = {
    "t2v-1.3B": Variant(_transformer(*_SMALL), flow_shift=3.0),
    "t2v-14B": Variant(_transformer(*_LARGE), flow_shift=3.0),
    "causal-1.3B": Variant(_transformer(*_SMALL), flow_shift=5.0, causal={"window": 12, "sink": 3}),
    "causal-14B": Variant(_transformer(*_LARGE), flow_shift=5.0, causal={"window": 12, "sink": 3}),
    "i2v-14B": Variant(_transformer(*_LARGE, **_CLIP), flow_shift=3.0, image_encoder=_CLIP_VIT_H),
    "vace-1.3B": Variant(_transformer(*_SMALL, vace_layers=list(range(0, 30, 2))), flow_shift=3.0),
    "vace-14B": Variant(_transformer(*_LARGE, vace_layers=list(range(0, 40, 5))), flow_shift=5.0),
    "t2v-A14B": Variant(_transformer(*_LARGE), flow_shift=3.0, boundary_ratio=0.875),
    "i2v-A14B": Variant(_transformer(*_LARGE, **_IMAGE), flow_shift=5.0, boundary_ratio=0.9),
    "ti2v-5B": Variant(_transformer(24, 14336, 30, 48), flow_shift=5.0, vae=_WAN22_VAE, expand_timesteps=True),
}


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

    `variant` is one of `VARIANTS` by name, or other sizes; `text_encoder` is UMT5-XXL as published, a small one that
    gives embeddings of the same width, or none. `device` draws the weights, at most `file_bytes` at a time, fastest on
    a GPU, and `dtype` is their type in the files. The same `seed` gives the same weights on the same kind of device.

    Raises:
        OSError: the folder cannot be written.
    """
    sizes = VARIANTS[variant] if isinstance(variant, str) else variant
    drawing: dict[str, Any] = {"seed": seed, "dtype": dtype, "device": device or torch.device("cpu")}
    parts: dict[str, list[str | None]] = {"text_encoder": [None, None], "transformer_2": [None, None]}
    models = _parts(sizes, text_encoder)
    kind = kind_of(models["transformer"], sizes.expand_timesteps)
    for name, part in models.items():
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        of_transformers = name.endswith("_encoder")
        part.config.save_pretrained(folder) if of_transformers else part.save_config(folder)
        stem = folder / ("model" if of_transformers else "diffusion_pytorch_model")
        save_random_weights(part, stem, **drawing, file_bytes=file_bytes)
        parts[name] = ["transformers" if of_transformers else "diffusers", type(part).__name__]
    if kind == "image":
        for name in ("image_encoder", "image_processor"):
            parts.setdefault(name, [None, None])
    if sizes.image_encoder is not None:
        image_processor(sizes.image_encoder["image_size"]).save_pretrained(directory / "image_processor")
        parts["image_processor"] = ["transformers", "CLIPImageProcessor"]
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": sizes.flow_shift}
    UniPCMultistepScheduler(**scheduler).save_pretrained(directory / "scheduler")
    parts["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    has_text = text_encoder != "none"
    parts["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"] if has_text else [None, None]
    index = {"_class_name": SAVED_AS[kind], "_diffusers_version": diffusers.__version__, **parts}
    index |= {"boundary_ratio": sizes.boundary_ratio}
    if kind != "vace":
        index["expand_timesteps"] = sizes.expand_timesteps
    if sizes.causal is not None:
        index |= {"_class_name": "EditCausalWanPipeline", INDEX_KEY: causal_options(sizes.causal).model_dump()}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if has_text:
        byte_tokenizer().save_pretrained(directory / "tokenizer")
        name_tokenizer_class(directory)
    return directory


def meta_transformer(variant: str | Variant) -> WanTransformer3DModel | WanVACETransformer3DModel:
    """The transformer of a variant without memory for its weights."""
    sizes = VARIANTS[variant] if isinstance(variant, str) else variant
    with torch.device("meta"):
        return _class_of(sizes)(**sizes.transformer)


def random_transformer(
    variant: str | Variant, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> WanTransformer3DModel | WanVACETransformer3DModel:
    """The transformer of a variant as `from_pretrained` would give it, made in place, without files."""
    sizes = VARIANTS[variant] if isinstance(variant, str) else variant
    with torch.device(device), torch.random.fork_rng(devices=[]):
        model = _class_of(sizes)(**sizes.transformer).eval()
    fill_random(model, seed)
    wide = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in wide for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte of any text, an end token last."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())))}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return fast_tokenizer(tokenizer)


def _class_of(sizes: Variant) -> Any:
    return WanVACETransformer3DModel if "vace_layers" in sizes.transformer else WanTransformer3DModel


def _parts(sizes: Variant, text_encoder: TextEncoder) -> dict[str, Any]:
    """The models of the folder, on the device "meta"."""
    parts: dict[str, Any] = {"transformer": meta_transformer(sizes)}
    if sizes.boundary_ratio is not None:
        parts["transformer_2"] = meta_transformer(sizes)
    text_config = sizes.text_encoder_config(text_encoder)
    with torch.device("meta"):
        parts["vae"] = AutoencoderKLWan(**sizes.vae)
        if sizes.image_encoder is not None:
            parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**sizes.image_encoder))
        if text_config is not None:
            parts["text_encoder"] = UMT5EncoderModel(UMT5Config(**text_config))
    return parts


def save_random_weights(
    model: nn.Module, stem: Path, *, seed: int, dtype: torch.dtype, device: torch.device, file_bytes: int = FILE_BYTES
) -> None:
    """Write weights for `model`, which may be on the device "meta", as `stem`.safetensors, or as several with an index.

    A tensor depends only on its name, `seed` and the type of `device`, which draws it. No more than one file's weights
    are in memory at a time.
    """
    like = {name: torch.empty(each.shape, dtype=dtype, device="meta") for name, each in model.named_parameters()}
    pattern = f"{stem.name}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(like, filename_pattern=pattern, max_shard_size=file_bytes)
    for file, names in split.filename_to_tensors.items():
        drawn = {name: _draw(name, like[name].shape, seed, device).to(dtype).cpu() for name in names}
        save_file(drawn, stem.with_name(file), {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def fill_random(model: nn.Module, seed: int = 0) -> None:
    """Give the parameters of `model` the values that `save_random_weights` writes for its device, in its types."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, seed, parameter.device))


def _draw(name: str, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Float32 values that keep activations of order one: matrices by their inputs, norms one, biases small."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "gamma" or (kind == "weight" and len(shape) == 1):
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    scale = 0.02 if kind == "bias" else math.prod(shape[1:]) ** -0.5
    if kind == "scale_shift_table":
        scale = shape[-1] ** -0.5
    return torch.randn(shape, generator=generator, device=device).mul_(scale)
