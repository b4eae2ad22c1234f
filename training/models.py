"""The parts of the embedded model, fresh, and the folder that stock diffusers loads."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from edit_ray.engine.causal_options import INDEX_KEY, CausalOptions
from training import captions, scenes
from training.recipe import Recipe

MAX_TEXT_TOKENS = 512  # WanPipeline's default `max_sequence_length`: cross-attention sees as many, mostly zeros
CAPTION_TOKENS = 48  # the longest caption has fewer than 40


def build_vae(recipe: Recipe) -> AutoencoderKLWan:
    """A fresh autoencoder whose distribution is as good as a point: sampling from it equals its mode.

    As Wan 2.2's, it has patches of 2×2 pixels and shortcuts past each change of resolution: through those, colours
    arrive from the first steps on.
    """
    vae = AutoencoderKLWan(
        base_dim=recipe.vae_base_dim,
        z_dim=recipe.vae_z_dim,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * recipe.vae_z_dim,
        latents_std=[1.0] * recipe.vae_z_dim,
    )
    with torch.no_grad():
        vae.quant_conv.weight[recipe.vae_z_dim :] = 0
        vae.quant_conv.bias[recipe.vae_z_dim :] = -20  # log variance; no loss reaches it
    return vae


def build_transformer(recipe: Recipe) -> WanTransformer3DModel:
    """A fresh transformer for the recipe's latents and text."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=recipe.heads,
        attention_head_dim=64,
        in_channels=recipe.vae_z_dim,
        out_channels=recipe.vae_z_dim,
        text_dim=recipe.text_dim,
        freq_dim=256,
        ffn_dim=recipe.ffn_dim,
        num_layers=recipe.layers,
    )


def build_text_encoder(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    """A fresh text encoder for the tokenizer's words."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=recipe.text_dim,
            d_kv=recipe.text_dim // 4,
            d_ff=2 * recipe.text_dim,
            num_layers=recipe.text_layers,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that knows the captions' words, a comma and a full stop, and nothing else."""
    words = ["<pad>", "</s>", "<unk>", ",", ".", *sorted({*scenes.vocabulary(), *captions.vocabulary()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TEXT_TOKENS,
    )


def save_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    recipe: Recipe,
) -> None:
    """Write the fp16 model in diffusers' layout, most of the transformer in 8 bits; the modules are left in fp16."""
    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=recipe.flow_shift,
    )
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
        expand_timesteps=True,
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder)
    _narrow(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for path in folder.glob("*/*config.json"):
        _forget_place(path)
        content = json.loads(path.read_text())
        if path.parent.name == "text_encoder":
            content["dtype"] = "float32"  # what transformers loads when nothing is asked for, as diffusers does
        if path.parent.name == "tokenizer":
            # transformers 5 writes its new name of the class, which transformers 4 does not know; both know the old.
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2) + "\n")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def save_causal_transformer(folder: Path, transformer: WanTransformer3DModel, recipe: Recipe) -> None:
    """Write the causal transformer and the index of its model into `folder / "causal"`; the module is left in fp16.

    The other parts are those of the model in `folder`.
    """
    transformer.half().save_pretrained(folder / "causal" / "transformer")
    _narrow(folder / "causal" / "transformer" / "diffusion_pytorch_model.safetensors")
    _forget_place(folder / "causal" / "transformer" / "config.json")
    options = CausalOptions(chunk_size=recipe.chunk_size, window=recipe.causal_window, sink=recipe.causal_sink)
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "EditCausalWanPipeline"}
    index |= {"expand_timesteps": False, INDEX_KEY: options.model_dump()}
    (folder / "causal" / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def compile_blocks(transformer: WanTransformer3DModel) -> None:
    """Compile the blocks on a GPU, with kernels of their own for each shape of the turns."""
    if transformer.device.type == "cuda":
        torch._dynamo.config.recompile_limit = 32
        for block in transformer.blocks:
            block.compile(dynamic=False)


def _forget_place(config: Path) -> None:
    """Remove where the model happened to be trained."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2) + "\n")


def _narrow(path: Path) -> None:
    """Store the matrices of the transformer's blocks as 8-bit floats: stock diffusers widens them as it loads."""
    weights = load_file(path)
    for name, weight in weights.items():
        if name.startswith("blocks.") and weight.ndim == 2:
            weights[name] = weight.to(torch.float8_e4m3fn)
    save_file(weights, path, metadata={"format": "pt"})
