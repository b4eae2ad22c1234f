"""A real model at toy size: tests need no mocks and no download."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel, WanVACETransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from edit_ray.engine.causal_pipeline import EditCausalWanPipeline
from edit_ray.engine.pipeline import EditWanPipeline

SPECIAL_TOKENS = PAD, END, UNKNOWN = ("<pad>", "</s>", "<unk>")
WORDS = ("a", "red", "green", "blue", "circle", "square", "and", "bouncing", "on", "black", "white", "background")
TEXT_DIM = 32
Z_DIM = 4
CLIP_DIM, CLIP_TOKENS = 16, 5
Layout = Literal["text", "image", "image_clip", "first_last_clip", "vace"]


def save_random_wan(
    directory: Path,
    *,
    seed: int = 0,
    expand_timesteps: bool = False,
    two_experts: bool = False,
    boundary_ratio: float | None = None,
    num_layers: int = 2,
    layout: Layout = "text",
    causal: Mapping[str, Any] | None = None,
) -> Path:
    """Write a complete Wan model with random weights in diffusers' folder layout; returns `directory`.

    Latents have 4 channels at 1/8 of the pixel size and 1/4 of the frame rate, as Wan's; everything together is about
    a megabyte. `two_experts` adds a `transformer_2`, used below `boundary_ratio` (0.5 unless given). The same seed
    gives the same weights; the caller's random state stays as it is. `layout` is what the model takes besides text:
    an image as Wan2.2 ("image") or Wan2.1 ("image_clip", and with a last image "first_last_clip"), or VACE's controls.
    With `causal` it is a causal model of these options (`CausalOptions`).
    """
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    text = {"vocab_size": len(WORDS) + 3, "d_model": TEXT_DIM, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with_clip = layout.endswith("clip")
        parts: dict[str, Any] = {} if causal is None else {"causal": causal}
        pipe = (EditWanPipeline if causal is None else EditCausalWanPipeline)(
            tokenizer=_word_tokenizer(),
            text_encoder=UMT5EncoderModel(UMT5Config(**text, dropout_rate=0.0)).eval(),
            vae=random_vae(),
            scheduler=UniPCMultistepScheduler(**flow),
            transformer=_transformer(num_layers, layout),
            transformer_2=_transformer(num_layers, layout) if two_experts else None,
            image_processor=image_processor(16) if with_clip else None,
            image_encoder=_image_encoder() if with_clip else None,
            boundary_ratio=(boundary_ratio or 0.5) if two_experts else None,
            expand_timesteps=expand_timesteps,
            **parts,
        )
    pipe.save_pretrained(directory)
    name_tokenizer_class(directory)
    return directory


def random_vae(**config: object) -> AutoencoderKLWan:
    """A Wan VAE with random weights, 4 latent channels and a few thousand parameters; `config` overrides its config."""
    defaults: dict[str, Any] = {"base_dim": 4, "z_dim": Z_DIM, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    defaults |= {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.9, 1.1, 1.3, 0.7]}
    return AutoencoderKLWan(**(defaults | config)).eval()


def _transformer(num_layers: int, layout: Layout) -> WanTransformer3DModel | WanVACETransformer3DModel:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "freq_dim": 32}
    sizes |= {"text_dim": TEXT_DIM, "num_layers": num_layers, "rope_max_seq_len": 64}
    sizes |= {"in_channels": Z_DIM if layout in ("text", "vace") else 2 * Z_DIM + 4, "out_channels": Z_DIM}
    if layout == "vace":
        # Wan's control: both halves of a video, and a mask of 8 x 8 pixels for each place.
        return WanVACETransformer3DModel(**sizes, vace_layers=[0], vace_in_channels=2 * Z_DIM + 64).eval()
    if layout.endswith("clip"):
        sizes |= {"image_dim": CLIP_DIM, "added_kv_proj_dim": 24}
    if layout == "first_last_clip":
        sizes["pos_embed_seq_len"] = 2 * CLIP_TOKENS
    return WanTransformer3DModel(**sizes).eval()


def image_processor(size: int) -> Any:
    """CLIP's, for pictures of so many pixels a side."""
    # transformers 5 keeps the processor that needs no torchvision under a name of its own.
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    return getattr(transformers, name)(size={"shortest_edge": size}, crop_size=size)


def _image_encoder() -> CLIPVisionModel:
    sizes = {"hidden_size": CLIP_DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval()


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of `WORDS`, lower-cased, an end token last; other words become `<unk>`."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    return fast_tokenizer(tokenizer)


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with an end token last, as transformers loads it."""
    tokens = [(END, tokenizer.token_to_id(END))]
    tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )


def name_tokenizer_class(directory: Path) -> None:
    """Name a class that transformers 4.57 and 5 both know; 5 writes one that 4.57 does not know."""
    for name, key, value in (
        ("model_index.json", "tokenizer", ["transformers", "PreTrainedTokenizerFast"]),
        ("tokenizer/tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
    ):
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}, indent=2) + "\n")
