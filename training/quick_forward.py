"""The transformer's forward for training: what `WanTransformer3DModel.forward` computes, in fewer and smaller kernels.

- Of 512 text tokens 464 or more are equal: zeros, past the longest caption. 16 stand for those 464, and a bias on
  their attention makes up for the number.
- Timesteps are those of latent frames, not of tokens.
- Queries, keys and values are one product, patches are a product and not a convolution, and all is compiled.

Shapes: B clips of T latent frames, N tokens a frame, S = T N, H heads, L text tokens, D channels.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.models import CAPTION_TOKENS, MAX_TEXT_TOKENS

PADDING_TOKENS = 16  # with the caption's 48, as many keys as attention likes


def padding_bias(device: torch.device) -> Tensor:
    """The bias [48 + 16] of attention to the text, by which its last 16 tokens count as 464.

    All but the last one's are numbers that bfloat16 holds, and the last one's is what is then left to count.
    """
    left = MAX_TEXT_TOKENS - CAPTION_TOKENS
    each = torch.tensor(math.log(left / PADDING_TOKENS)).bfloat16().item()
    last = math.log(left - (PADDING_TOKENS - 1) * math.exp(each))
    return torch.tensor([0.0] * CAPTION_TOKENS + [each] * (PADDING_TOKENS - 1) + [last], device=device)


def _parts(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


class AttentionWeights(NamedTuple):
    """Those of one attention, as `WanAttention` has them."""

    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    query_scale: Tensor
    key_scale: Tensor

    @classmethod
    def of(cls, attn: WanAttention) -> "AttentionWeights":
        """References, not copies."""
        query, key, value, out = (_parts(layer) for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]))
        return cls(query, key, value, out, attn.norm_q.weight, attn.norm_k.weight)


class BlockWeights(NamedTuple):
    """Those of one block; tensors and not modules, so that all blocks share what is compiled."""

    own: AttentionWeights
    text: AttentionWeights
    text_norm: tuple[Tensor, Tensor]
    widen: tuple[Tensor, Tensor]
    narrow: tuple[Tensor, Tensor]
    modulation: Tensor

    @classmethod
    def of(cls, block: WanTransformerBlock) -> "BlockWeights":
        """References, not copies."""
        norm, widen, narrow = (_parts(layer) for layer in (block.norm2, block.ffn.net[0].proj, block.ffn.net[2]))
        own, text = (AttentionWeights.of(attn) for attn in (block.attn1, block.attn2))
        return cls(own, text, norm, widen, narrow, block.scale_shift_table)


class QuickTransformer:
    """Trains a transformer's own weights; it is called as the transformer is, with shorter arguments."""

    def __init__(self, transformer: WanTransformer3DModel, compiled: bool) -> None:
        self.transformer = transformer
        self.blocks = [BlockWeights.of(block) for block in transformer.blocks]
        self.heads, self.eps = transformer.config.num_attention_heads, transformer.config.eps
        self.bias = padding_bias(transformer.device)
        parts: list[Callable[..., Any]] = [_begin, _block, _end]
        self._begin, self._block, self._end = [_compiled(part) for part in parts] if compiled else parts

    def __call__(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Predict the flow [B, C, T, h, w].

        Args:
            hidden_states: Latents [B, C, T, h, w].
            timestep: One of each clip, [B], or of each latent frame, [B, T].
            encoder_hidden_states: The captions [B, 48, D'], zeros after each one's end.
            return_dict: Whether to return a dictionary, which this does not.
        """
        model, embedder = self.transformer, self.transformer.condition_embedder
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        times = embedder.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)
        time_layers = (embedder.time_embedder.linear_1, embedder.time_embedder.linear_2, embedder.time_proj)
        text_layers = (embedder.text_embedder.linear_1, embedder.text_embedder.linear_2)
        patches = (model.patch_embedding.weight, model.patch_embedding.bias)
        layers = (patches, *((layer.weight, layer.bias) for layer in (*time_layers, *text_layers)))
        states, time, modulation, text = self._begin(hidden_states, times, encoder_hidden_states, layers)
        cos, sin = (part.flatten(0, 1) for part in model.rope(hidden_states))  # [S, 1, D / H]
        for block in self.blocks:
            states = self._block(states, text, self.bias, modulation, (cos, sin), block, self.heads, self.eps)
        last = (model.proj_out.weight, model.proj_out.bias)
        return (self._end(states, time, model.scale_shift_table, last, self.eps, hidden_states.shape),)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = 32
    return torch.compile(function, dynamic=False)


def _begin(
    latents: Tensor, times: Tensor, captions: Tensor, layers: tuple[tuple[Tensor, Tensor], ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [B, T, N, D], the times' embeddings [B, T or 1, D] and [B, T or 1, 6, D], the text [B, L, D]."""
    (patch, offset), *time_layers, widen, narrow = layers
    tokens = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # [B, C, T, h/2, 2, w/2, 2]
    tokens = tokens.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)
    states = F.linear(tokens, patch.flatten(1), offset)
    time = F.linear(F.silu(F.linear(times, *time_layers[0])), *time_layers[1])
    modulation = F.linear(F.silu(time), *time_layers[2]).unflatten(-1, (6, -1))
    text = F.pad(captions, (0, 0, 0, PADDING_TOKENS))
    text = F.linear(F.gelu(F.linear(text, *widen), approximate="tanh"), *narrow)
    return states, time, modulation, text


def _block(
    states: Tensor,
    text: Tensor,
    bias: Tensor,
    modulation: Tensor,
    table: tuple[Tensor, Tensor],
    weights: BlockWeights,
    heads: int,
    eps: float,
) -> Tensor:
    parts = (weights.modulation + modulation.float()).unsqueeze(-2).unbind(2)  # each [B, T or 1, 1, D]
    shift, scale, gate, wide_shift, wide_scale, wide_gate = parts
    normed = (_norm(states, eps) * (1 + scale) + shift).type_as(states)
    attended = _own_attention(normed.flatten(1, 2), table, weights.own, heads, eps)
    states = (states.float() + attended.view_as(states) * gate).type_as(states)
    normed = _norm(states, eps, *weights.text_norm).type_as(states)
    attended = _text_attention(normed.flatten(1, 2), text, bias, weights.text, heads, eps)
    states = states + attended.view_as(states)
    normed = (_norm(states, eps) * (1 + wide_scale) + wide_shift).type_as(states)
    widened = F.gelu(F.linear(normed, *weights.widen), approximate="tanh")
    return (states.float() + F.linear(widened, *weights.narrow).float() * wide_gate).type_as(states)


def _end(
    states: Tensor,
    time: Tensor,
    modulation: Tensor,
    last: tuple[Tensor, Tensor],
    eps: float,
    shape: tuple[int, int, int, int, int],
) -> Tensor:
    shift, scale = (modulation[:, None] + time.float().unsqueeze(2)).unsqueeze(-2).unbind(2)
    tokens = F.linear((_norm(states, eps) * (1 + scale) + shift).type_as(states), *last)
    patches = tokens.unflatten(3, (2, 2, -1)).unflatten(2, (shape[3] // 2, shape[4] // 2))
    flow: Tensor = patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
    return flow


def _norm(states: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(states.float(), states.shape[-1:], weight, bias, eps)


def _scaled(states: Tensor, scale: Tensor, eps: float, heads: int) -> Tensor:
    """RMS norm over all heads, [B, S, D] to fp32 [B, S, H, D / H]."""
    wide = states.float()
    normed: Tensor = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale
    return normed.unflatten(-1, (heads, -1))  # type: ignore[no-any-return]


def _own_attention(
    states: Tensor, table: tuple[Tensor, Tensor], weights: AttentionWeights, heads: int, eps: float
) -> Tensor:
    cos, sin = table
    matrix, offset = (torch.cat(parts) for parts in zip(weights.query, weights.key, weights.value, strict=True))
    query, key, value = F.linear(states, matrix, offset).chunk(3, dim=-1)

    def rotated(each: Tensor) -> Tensor:
        first, second = each.unflatten(-1, (-1, 2)).unbind(-1)
        return (each * cos + torch.stack([-second, first], -1).flatten(-2) * sin).type_as(value)

    query = rotated(_scaled(query, weights.query_scale, eps, heads))
    key = rotated(_scaled(key, weights.key_scale, eps, heads))
    return _attended(query, key, value.unflatten(-1, (heads, -1)), weights, None)


def _text_attention(
    states: Tensor, text: Tensor, bias: Tensor, weights: AttentionWeights, heads: int, eps: float
) -> Tensor:
    matrix, offset = (torch.cat(parts) for parts in zip(weights.key, weights.value, strict=True))
    key, value = F.linear(text, matrix, offset).chunk(2, dim=-1)
    query = _scaled(F.linear(states, *weights.query), weights.query_scale, eps, heads).type_as(value)
    key = _scaled(key, weights.key_scale, eps, heads).type_as(value)
    return _attended(query, key, value.unflatten(-1, (heads, -1)), weights, bias.type_as(value)[None, None, None])


def _attended(query: Tensor, key: Tensor, value: Tensor, weights: AttentionWeights, bias: Tensor | None) -> Tensor:
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    if bias is None:
        attended = F.scaled_dot_product_attention(query, key, value)
    else:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # cuDNN's is slower on so few keys
            attended = F.scaled_dot_product_attention(query, key, value, bias.expand(*query.shape[:3], -1))
    return F.linear(attended.transpose(1, 2).flatten(2), *weights.out)
