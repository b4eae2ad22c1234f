"""The sizes of Wan's published text-to-video models, as their diffusers folders have them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TextEncoder = Literal["full", "tiny", "none"]
Config = Mapping[str, Any]

# Of the published model's 48 means and deviations nothing depends that speed does.
_WAN22_VAE: Config = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
_UMT5_XXL: Config = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Variant:
    """What the configs of a Wan text-to-video model say, where it is not what diffusers' classes take by default."""

    transformer: Config
    flow_shift: float
    vae: Config = field(default_factory=dict)
    text_encoder: Config = field(default_factory=lambda: _UMT5_XXL)
    expand_timesteps: bool = False

    def text_encoder_config(self, size: TextEncoder) -> Config | None:
        """UMT5's config: as published, one narrow layer that gives embeddings of the same width, or None."""
        if size == "none":
            return None
        narrow = {"vocab_size": 512, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        return {**self.text_encoder, **(narrow if size == "tiny" else {}), "dropout_rate": 0.0}


def _transformer(heads: int, ffn_dim: int, num_layers: int, channels: int = 16) -> Config:
    return {
        "num_attention_heads": heads,
        "ffn_dim": ffn_dim,
        "num_layers": num_layers,
        "in_channels": channels,
        "out_channels": channels,
    }


VARIANTS: Mapping[str, Variant] = {
    "t2v-1.3B": Variant(_transformer(12, 8960, 30), flow_shift=3.0),
    "t2v-14B": Variant(_transformer(40, 13824, 40), flow_shift=3.0),
    "ti2v-5B": Variant(_transformer(24, 14336, 30, 48), flow_shift=5.0, vae=_WAN22_VAE, expand_timesteps=True),
}
