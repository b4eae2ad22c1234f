"""How much GPU memory a run takes, counted from configs alone, and what of it fits on a card. Pure; loads no torch.

Weights are counted exactly. Activations are those of the largest moment of diffusers' forward, tensor by tensor; of the
decoder, of one latent frame at its highest resolution. Both grow linearly with tokens and pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

PartConfig = Mapping[str, Any]

FLOAT = 4
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LEAST_SLOTS = 3  # blocks on the device while blocks are offloaded
ALIGNMENT = 10_000  # bytes of a block
FREE = 0.08  # of a card, for what the allocator cannot join
CUDA_LIBRARIES = 100_000_000  # workspaces of cuBLAS and cuDNN, and small tensors
TILE = 256  # pixels of a side, where frames are decoded in tiles
TEXT_TOKENS = 512
# Of Wan's decoder, in channels for each pixel: what one latent's frames take at most, and what of it stays between two
# latents. Residual (`is_residual`) is Wan2.2's, which works at a quarter of the pixels.
DECODER_CHANNELS, STATE_CHANNELS = {False: 52.7, True: 21.0}, {False: 24.7, True: 7.0}
CONVOLUTIONS = 1.11  # of the decoder's tensors: with the workspaces of its convolutions, as measured on an H200
VAE_PARAMETERS = {False: 126_892_531, True: 704_688_668}  # of the published ones
VAE_CHANNELS = {False: 96, True: 256}


@dataclass(frozen=True)
class TransformerBytes:
    """A transformer's weights: those of all blocks, of one, and of what is around them."""

    blocks: int
    largest_block: int
    around: int

    @property
    def whole(self) -> int:
        return self.blocks + self.around


@dataclass(frozen=True)
class Needs:
    """Bytes of a run on the GPU: `weights` besides the transformers', what denoising and decoding add, and the states
    that stay of each while the other runs. `tiled` is decoding in tiles, whose states are in host memory. `kv` is the
    window of a causal model.
    """

    transformers: Mapping[str, TransformerBytes]
    weights: int
    forward: int
    residuals: int
    decoder: int
    decoder_state: int
    tiled: int
    kv: int = 0

    @property
    def whole(self) -> int:
        """Of all transformers' weights."""
        return sum(each.whole for each in self.transformers.values())

    @property
    def largest_block(self) -> int:
        """And the place that the alignment of its tensors takes."""
        return max(each.largest_block for each in self.transformers.values()) + ALIGNMENT

    @property
    def least(self) -> int:
        """That the transformers' weights take at least, with their blocks in host memory."""
        return sum(each.around for each in self.transformers.values()) + LEAST_SLOTS * self.largest_block

    def beside(self, *, tiled: bool) -> int:
        """At most, besides the transformers' weights: denoising and decoding take turns, step by step."""
        decoding = self.tiled if tiled else self.decoder
        denoising = self.forward + (0 if tiled else self.decoder_state)
        return self.weights + self.residuals + self.kv + max(denoising, decoding) + CUDA_LIBRARIES


@dataclass(frozen=True)
class Placement:
    """What fits on a card: `device_bytes` of the transformers' weights, or None if all of them do."""

    device_bytes: int | None
    tiled: bool
    peak: int


def place(needs: Needs, card: int, free: float = FREE) -> Placement | None:
    """How a run fits on a card of so many bytes: whole, else with blocks in host memory, else also decoded in tiles."""
    usable = int(card * (1 - free))
    if needs.whole + needs.beside(tiled=False) <= usable:
        return Placement(None, False, needs.whole + needs.beside(tiled=False))
    for tiled in (False, True):
        beside = needs.beside(tiled=tiled)
        if needs.least + beside <= usable:
            most = needs.least + max(0, usable - beside - needs.least) // needs.largest_block * needs.largest_block
            return Placement(min(most, needs.whole), tiled, min(most, needs.whole) + beside)
    return None


@dataclass(frozen=True)
class Run:
    """What of a run's configuration its memory depends on; sizes in pixels and frames, `entries` of residuals."""

    height: int
    width: int
    num_frames: int
    branches: int
    entries: int = 0
    hidden: int = 0  # tensors of a residual's size that policies keep besides
    latents: int = 0  # and of the size of the transformer's input
    tier_bytes: int = 0  # of the device tier, for residuals of other segments
    torch_dtype: str = "bfloat16"
    storage: str = "torch_dtype"
    fast: bool = False
    file_bytes: Mapping[str, int] | None = None  # of transformers in GGUF
    window: int = 0  # latent frames whose K/V a causal model attends to
    chunk_size: int = 0  # of them those that it denoises together
    rotated_keys: bool = False  # whether the keys are there a second time


def kv_bytes(config: PartConfig, run: Run, spatial: int, latent_frames: int) -> int:
    """K/V of so many latent frames in all layers of a transformer, without rotated keys."""
    rows, columns = config.get("patch_size", (1, 2, 2))[1:]
    tokens = latent_frames * (run.height // spatial // rows) * (run.width // spatial // columns)
    layers = int(config.get("num_layers", 40)) * run.branches
    values: int = 2 * tokens * width_of(config) * layers
    return values * ITEM_BYTES[run.torch_dtype]


def needs_of(configs: Mapping[str, PartConfig], run: Run, *, per_token: bool) -> Needs:
    """The needs of a run of the model whose parts have these configs, by the parts' names.

    `per_token`: the timestep of each token is embedded alone (`expand_timesteps` in model_index.json).
    """
    item, vae = ITEM_BYTES[run.torch_dtype], configs["vae"]
    experts = {name: configs[name] for name in ("transformer", "transformer_2") if name in configs}
    first = next(iter(experts.values()))
    spatial, temporal = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    frames, rows, columns = first.get("patch_size", (1, 2, 2))
    at_once = run.chunk_size or (run.num_frames - 1) // temporal + 1
    latents = (at_once, run.height // spatial, run.width // spatial)
    kv = kv_bytes(first, run, spatial, run.window)
    tokens = latents[0] // frames * (latents[1] // rows) * (latents[2] // columns)
    width = width_of(first)
    one = tokens * width * item
    kept = (run.entries + 1 if run.entries else 0) + run.hidden
    shown = FLOAT * int(first.get("in_channels", 16)) * math.prod(latents)
    transformers = {name: transformer_bytes(config, run, name) for name, config in experts.items()}
    weights = vae_parameters(vae) * item + clip_parameters(configs.get("image_encoder")) * item
    blocks = sum(int(config.get("num_layers", 40)) for config in experts.values())
    texts = blocks * 2 * run.branches * TEXT_TOKENS * width * item
    loop = 10 * FLOAT * vae.get("z_dim", 16) * math.prod(latents)
    pixels, residual = run.height * run.width, bool(vae.get("is_residual", False))
    channels = vae.get("decoder_base_dim") or vae.get("base_dim", 96)
    video = 3 * item * run.num_frames * pixels
    at_work = CONVOLUTIONS * DECODER_CHANNELS[residual] * channels * item
    return Needs(
        transformers=transformers,
        weights=weights,
        forward=forward_bytes(first, tokens, item, per_token=per_token)
        + loop
        + (texts if run.fast or run.window else 0)
        + (0 if run.storage == "torch_dtype" and not run.file_bytes else largest_layer(first) * item),
        residuals=kept * one + run.latents * shown + run.tier_bytes,
        decoder=int(at_work * pixels) + video,
        decoder_state=int(STATE_CHANNELS[residual] * channels * item * pixels),
        tiled=int(at_work * min(pixels, TILE * TILE)),
        kv=kv + kv // 4 * (2 if run.rotated_keys else 0),
    )


def card_problem(needs: Needs, card: int, device_bytes: int | None) -> str | None:
    """Why a model's weights are too large for a card of so many bytes, and what would fit; None if they are not."""
    taken = needs.weights + (needs.whole if device_bytes is None else device_bytes)
    if taken <= card:
        return None
    least = needs.weights + needs.least
    would = (
        f"with model.offload: blocks and a model.device_bytes from {needs.least} to {card - needs.weights} they fit; "
        "`edit-ray plan` says which is best"
        if least <= card
        else f"with model.offload: blocks the least is {least / 1e9:.1f} GB"
    )
    return f"the model's weights take {taken / 1e9:.1f} GB of the GPU's {card / 1e9:.1f}; {would}."


def most_frames(configs: Mapping[str, PartConfig], run: Run, card: int, *, per_token: bool) -> int:
    """The most frames, fewer than the run's, with which it fits on a card of so many bytes; 0 if it never does."""
    for num_frames in range(run.num_frames - 4, 0, -4):
        if place(needs_of(configs, replace(run, num_frames=num_frames), per_token=per_token), card) is not None:
            return num_frames
    return 0


def width_of(config: PartConfig) -> int:
    """A token's numbers between two blocks."""
    return int(config.get("num_attention_heads", 40)) * int(config.get("attention_head_dim", 128))


def forward_bytes(config: PartConfig, tokens: int, item: int, *, per_token: bool) -> int:
    """At most at once in a forward of `tokens` in diffusers' order of arithmetic, without weights.

    Live in a block are its input, what attention has given, and the hidden states. Then either RoPE turns the queries
    in float32, or the feed-forward layer has its output before and after GELU, or both summands of its residual
    connection are in float32.
    """
    width, ffn = width_of(config), config.get("ffn_dim", 13824)
    widened = 3 if item < FLOAT else 2
    rotation, gelu = 6 * item + 1.5 * FLOAT, 4 * item + 2 * item * ffn / width
    most = max(rotation, gelu, 5 * item + widened * FLOAT)
    if per_token:  # six modulations of each token, in float32 and as they are embedded
        most += 6 * FLOAT + 7 * item
    if layers := config.get("vace_layers"):  # a hint for each control layer, and the control itself
        most += (len(layers) + 1) * item
    rope = 2 * FLOAT * int(config.get("attention_head_dim", 128))
    return int(tokens * (most * width + rope))


def transformer_bytes(config: PartConfig, run: Run, name: str) -> TransformerBytes:
    """The weights of a transformer as they are stored."""
    item = ITEM_BYTES[run.torch_dtype]
    linear, rest, wide = block_parameters(config)
    stored = item if run.storage == "torch_dtype" else 1
    block = linear * stored + rest * item + wide * FLOAT
    around, around_wide = around_parameters(config)
    around_wide += 2 * int(config.get("rope_max_seq_len", 1024)) * int(config.get("attention_head_dim", 128))
    blocks = config.get("num_layers", 40) * block
    control, control_wide = vace_parameters(config)
    outside = (around + control) * item + (around_wide + control_wide) * FLOAT
    if run.file_bytes and name in run.file_bytes:
        blocks = max(run.file_bytes[name] - outside, 0)
        block = blocks // config.get("num_layers", 40)
    return TransformerBytes(blocks, block, outside)


def block_parameters(config: PartConfig) -> tuple[int, int, int]:
    """Of a block: in linear layers, in other ones, and in what stays in float32."""
    width, ffn, added = width_of(config), config.get("ffn_dim", 13824), config.get("added_kv_proj_dim")
    linear = 8 * (width * width + width) + width * ffn + ffn + ffn * width + width
    rest = 4 * width
    if added is not None:
        linear, rest = linear + 2 * (added * width + width), rest + width
    return linear, rest, 6 * width + (2 * width if config.get("cross_attn_norm", True) else 0)


def around_parameters(config: PartConfig) -> tuple[int, int]:
    """Of what is around the blocks: in `torch_dtype`, and in float32."""
    width, text, image = width_of(config), config.get("text_dim", 4096), config.get("image_dim")
    patch = math.prod(config.get("patch_size", (1, 2, 2)))
    channels = config.get("out_channels") or config.get("in_channels", 16)
    plain = config.get("in_channels", 16) * patch * width + width
    plain += 6 * (width * width + width) + text * width + width + width * width + width
    plain += width * channels * patch + channels * patch
    wide = config.get("freq_dim", 256) * width + width + width * width + width + 2 * width
    if image is not None:
        plain += image * image + image + image * width + width + (config.get("pos_embed_seq_len") or 0) * image
        wide += 2 * image + 2 * width
    return plain, wide


def vace_parameters(config: PartConfig) -> tuple[int, int]:
    """Of VACE's control blocks and their embedding, which stay on the GPU: in `torch_dtype`, and in float32."""
    layers = config.get("vace_layers")
    if not layers:
        return 0, 0
    width, patch = width_of(config), math.prod(config.get("patch_size", (1, 2, 2)))
    square = width * width + width
    embedding = config.get("vace_in_channels", 96) * patch * width + width
    linear, rest, wide = block_parameters(config)
    return embedding + len(layers) * (linear + rest + square) + square, len(layers) * wide


def largest_layer(config: PartConfig) -> int:
    """Parameters of the layer whose weights are the most, which is made whole while it computes."""
    return width_of(config) * max(int(config.get("ffn_dim", 13824)), width_of(config))


def vae_parameters(config: PartConfig) -> int:
    """About as many as a VAE has whose channels are those of the published one, or in proportion."""
    residual = bool(config.get("is_residual", False))
    channels = config.get("decoder_base_dim") or config.get("base_dim", 96)
    return int(VAE_PARAMETERS[residual] * (channels / VAE_CHANNELS[residual]) ** 2)


def clip_parameters(config: PartConfig | None) -> int:
    """Of CLIP's vision model, about: of its layers."""
    if config is None:
        return 0
    size, inner = int(config.get("hidden_size", 768)), int(config.get("intermediate_size", 3072))
    return int(config.get("num_hidden_layers", 12)) * (4 * size * size + 2 * size * inner)
