"""The forward of all chunks of a clip at once, with the attention of a stream of chunks: teacher forcing.

Each chunk is there twice, clean and noisy. Both attend to the clean chunks before them that are in their window, and to
themselves; what later chunks see of a chunk is its clean copy, at the timestep 0. In a window chunks are numbered anew,
as the engine does with `rope: relative`, so each chunk's queries and keys are rotated for that chunk.

A boolean mask over the whole sequence would say the same. But a chunk sees whole chunks or nothing of them, so their
keys are gathered instead: flash attention needs no mask, and computes nothing that a mask would hide.

Shapes: B clips of n chunks, N tokens of a chunk, H heads of D channels, C latent channels, c latent frames of a chunk.

Sources: X. Huang et al., "Self Forcing" (2025), on teacher forcing in one pass; H. Yesiltepe et al., "Infinity-RoPE"
(2025), on the numbering.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

from edit_ray.engine.causal_attention import Table, rotate
from training.loop import mixed_precision


@dataclass(frozen=True)
class ChunkWindow:
    """What a chunk attends to, counted in chunks: `length` of them, itself and the `sink` included."""

    length: int
    sink: int

    def before(self, chunk: int) -> list[int]:
        """The earlier chunks that a chunk attends to, from old to new."""
        local = max(chunk + 1 + self.sink - self.length, self.sink)
        return [*range(min(self.sink, chunk)), *range(local, chunk)]

    def spans(self, chunks: int) -> list[tuple[int, int]]:
        """The runs of chunks, first and end, that see equally many: one each, then all whose window is full."""
        full = min(self.length - 1, chunks)
        return [*((chunk, chunk + 1) for chunk in range(full)), *([(full, chunks)] if full < chunks else [])]


class ChunkedSelfAttention:
    """Self-attention of the n - 1 clean and the n noisy chunks of each clip: hidden states [B (2n - 1), N, H D].

    All layers share one. `window`, `chunks` and `table`, the angles [length, N, 1, D] of a window's numbers, are set
    before a forward.
    """

    window: ChunkWindow
    chunks: int
    table: Table

    def __call__(self, attn: WanAttention, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        heads = (
            each.unflatten(2, (attn.heads, -1)).unflatten(0, (-1, 2 * self.chunks - 1))
            for each in (query, key, attn.to_v(hidden_states))
        )
        query, key, value = heads  # [B, 2n - 1, N, H, D], the clean chunks first
        spans, clean = self.window.spans(self.chunks), self.chunks - 1
        attended = [self._span(query, key, value, 0, first, min(end, clean)) for first, end in spans if first < clean]
        attended += [self._span(query, key, value, clean, first, end) for first, end in spans]
        output: Tensor = attn.to_out[0](torch.cat(attended, dim=1).flatten(0, 1).type_as(hidden_states))
        return output

    def _span(self, query: Tensor, key: Tensor, value: Tensor, copy: int, first: int, end: int) -> Tensor:
        """What the chunks `first` to `end` of the copies from index `copy` on attend to, [B, end - first, N, H D]."""
        before = self.window.before(first)
        number, own = len(before), slice(copy + first, copy + end)
        cos, sin = self.table

        def seen(each: Tensor) -> Tensor:  # [B, end - first, number + 1, N, H, D]
            moving = (each[:, chunk : chunk + end - first] for chunk in before[self.window.sink :])
            resting = (each[:, chunk : chunk + 1].expand_as(each[:, own]) for chunk in before[: self.window.sink])
            return torch.stack([*resting, *moving, each[:, own]], dim=2)

        keys = rotate(seen(key), (cos[: number + 1], sin[: number + 1])).type_as(value)
        queries = rotate(query[:, own], (cos[number], sin[number])).type_as(value)
        attended = F.scaled_dot_product_attention(
            queries.flatten(0, 1).transpose(1, 2),
            keys.flatten(0, 1).flatten(1, 2).transpose(1, 2),
            seen(value).flatten(0, 1).flatten(1, 2).transpose(1, 2),
        )
        joined: Tensor = attended.transpose(1, 2).flatten(2).unflatten(0, (-1, end - first))
        return joined


class ChunkedCrossAttention:
    """Cross-attention of all chunks of a clip to its one text [B, L, H D], whose keys are computed once."""

    def __call__(self, attn: WanAttention, hidden_states: Tensor, text: Tensor, *_: object, **__: object) -> Tensor:
        clips = hidden_states.unflatten(0, (len(text), -1))
        query, key = attn.norm_q(attn.to_q(clips.flatten(1, 2))), attn.norm_k(attn.to_k(text))
        value = attn.to_v(text)
        attended = F.scaled_dot_product_attention(
            *(each.type_as(value).unflatten(2, (attn.heads, -1)).transpose(1, 2) for each in (query, key, value))
        )
        attended = attended.transpose(1, 2).flatten(2).view(clips.shape).flatten(0, 1)
        output: Tensor = attn.to_out[0](attended.type_as(hidden_states))
        return output


class ChunkedTransformer:
    """Runs a transformer on all chunks of `chunk_size` latent frames at once, each as a sample of its own.

    It replaces the transformer's attention processors, and from then on the transformer is of use only here.
    """

    def __init__(self, transformer: WanTransformer3DModel, chunk_size: int) -> None:
        self.transformer, self.chunk_size = transformer, chunk_size
        self._attention = ChunkedSelfAttention()
        for block in transformer.blocks:
            block.attn1.set_processor(self._attention)
            block.attn2.set_processor(ChunkedCrossAttention())

    def __call__(self, clean: Tensor, noisy: Tensor, sigma: Tensor, text: Tensor, window: ChunkWindow) -> Tensor:
        """Predict the flow [B, C, n c, h, w] in fp32.

        Args:
            clean: Latents [B, C, n c, h, w] that later chunks see; those of the last chunk are not read.
            noisy: Latents [B, C, n c, h, w] to denoise.
            sigma: Their noise levels [B, n].
            text: Embeddings [B, L, D] of each clip's caption.
        """
        chunks = sigma.shape[1]
        states = torch.cat([clean[:, :, : -self.chunk_size], noisy], dim=2)
        states = states.unflatten(2, (-1, self.chunk_size)).transpose(1, 2).flatten(0, 1)
        timestep = torch.cat([torch.zeros_like(sigma[:, 1:]), 1000 * sigma], dim=1).flatten()
        self._attention.window, self._attention.chunks = window, chunks
        self._attention.table = self._table(states, window.length)
        with mixed_precision(states.device.type):
            flow = self.transformer(states, timestep, text, return_dict=False)[0]
        noisy_flow: Tensor = flow.float().unflatten(0, (-1, 2 * chunks - 1))[:, chunks - 1 :]
        return noisy_flow.transpose(1, 2).flatten(2, 3)

    def _table(self, states: Tensor, length: int) -> Table:
        """The angles [length, N, 1, D] of a window's chunks, as the transformer computes those of a clip."""
        frames = states[:1, :, :1].expand(-1, -1, length * self.chunk_size, -1, -1)
        cos, sin = (part[0].unflatten(0, (length, -1)) for part in self.transformer.rope(frames))
        return cos, sin
