"""The attention of a causal model: diffusers' own transformer, whose attention processors read and write K/V.

Shapes: B videos, c latent frames of a chunk, N tokens of a chunk, n chunks in the window, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, _get_qkv_projections
from torch import Tensor

from edit_ray.cache.kv import KVWindow
from edit_ray.engine.causal_options import CausalOptions

Table = tuple[Tensor, Tensor]
"""Cosines and sines [1, tokens, 1, D] of the tokens' angles, two for each pair of channels."""


class CausalAttention:
    """Lets the chunks of one stream attend to its `kv`, while they are computed and only then.

    `grid` has the rows and columns of a frame's tokens. In `rope: relative` a second ring has the keys rotated to the
    numbers that their chunks have now. It is written once for each chunk, and not in each step; for layers in host
    memory, which share one, in each forward.
    """

    def __init__(
        self, transformer: WanTransformer3DModel, kv: KVWindow, options: CausalOptions, grid: tuple[int, int]
    ) -> None:
        self.transformer, self.kv, self.options, self.grid = transformer, kv, options, grid
        self.branch = "cond"
        self.origin = 0  # the chunk that has the position 0 in `rope: absolute`
        self.texts: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._tables: tuple[int, Table, Table] | None = None  # of a version; of the current chunk, of the window

    @contextmanager
    def chunk(self, index: int, forwards: int = 1) -> Iterator[None]:
        """Inside, the transformer's forwards are those of a chunk; at the end its K/V belongs to the window.

        There are so many `forwards` in each branch; the last one is of the clean chunk, with `kv.finished` set.

        Raises:
            ValueError: in `rope: absolute` the chunk lies beyond the model's table of positions.
        """
        self._check_position(index)
        self.kv.begin(index, forwards)
        self.texts.clear()
        replaced: list[tuple[Any, Any]] = []
        try:
            for layer, block in enumerate(self.transformer.blocks):
                replaced.append((block.attn1, block.attn1.processor))
                block.attn1.set_processor(ChunkProcessor(self, layer, block.attn1.processor))
                if block.attn2.add_k_proj is None:
                    replaced.append((block.attn2, block.attn2.processor))
                    block.attn2.set_processor(TextProcessor(self, layer, block.attn2.processor))
            yield
            self.kv.complete()
        finally:
            self.kv.abandon()
            self.texts.clear()
            for attn, processor in replaced:
                attn.set_processor(processor)

    @property
    def here(self) -> Table:
        """The table of the current chunk."""
        return self._tables_now()[0]

    def extend(self, layer: int, key: Tensor, rotated: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the chunk's keys and values of a layer, [B, N, heads, D] each: keys as they are, and rotated.

        Returns keys and values [B, n · N, heads, D] of the window, to attend to.
        """
        relative, kv, which = self.options.rope == "relative", self.kv, (self.branch, layer)
        edited = kv.write(*which, key if relative else rotated, value)
        keys, values = kv.window(*which)
        if relative:
            own = rotate(keys[:, kv.slot], self.here) if edited else rotated
            keys = self._renumbered(which, keys, own)
        return keys.flatten(1, 2), values.flatten(1, 2)

    def _renumbered(self, which: tuple[str, int], keys: Tensor, own: Tensor) -> Tensor:
        """The keys [B, n, N, heads, D] rotated; those of earlier chunks only if the window has changed."""
        rotated, known = self.kv.rotated(*which)
        if not known:
            rotated.copy_(rotate(keys.flatten(1, 2), self._tables_now()[1]).view_as(rotated))
        rotated[:, self.kv.slot] = own
        return rotated

    def _tables_now(self) -> tuple[Table, Table]:
        """The tables of the current chunk and of the window, by slot."""
        if self._tables is None or self._tables[0] != self.kv.version:
            order = self.kv.order
            numbers = [sorted(order).index(chunk) for chunk in order]
            if self.options.rope == "absolute":
                numbers = [chunk - self.origin for chunk in order]
            window = self._table(numbers)
            first, tokens = self.kv.slot * self.kv.layout.tokens, self.kv.layout.tokens
            here = [part[:, first : first + tokens] for part in window]
            self._tables = self.kv.version, (here[0], here[1]), window
        return self._tables[1:]

    def _table(self, chunks: Sequence[int]) -> Table:
        """The angles of these chunks, with the bits of diffusers' `WanRotaryPosEmbed`."""
        rope, (height, width), size = self.transformer.rope, self.grid, self.options.chunk_size
        frames = torch.tensor([chunk * size + frame for chunk in chunks for frame in range(size)])
        frames = frames.to(rope.freqs_cos.device)
        made = []
        for source in (rope.freqs_cos, rope.freqs_sin):
            t, h, w = source.split([rope.t_dim, rope.h_dim, rope.w_dim], dim=1)
            parts = (t[frames].view(-1, 1, 1, t.shape[1]), h[None, :height, None], w[None, None, :width])
            whole = torch.cat([part.expand(len(frames), height, width, -1) for part in parts], dim=-1)
            made.append(whole.flatten(0, 2)[None, :, None])
        return made[0], made[1]

    def _check_position(self, index: int) -> None:
        end, limit = (index - self.origin + 1) * self.options.chunk_size, self.transformer.rope.max_seq_len
        if self.options.rope == "absolute" and end > limit:
            raise ValueError(
                f"Chunk {index} ends at latent frame {end}; with rope 'absolute' this model's videos end at {limit}, "
                "with 'relative' they have no end."
            )


class _Processor:
    """One layer's processor; its attention backend is that of the processor it stands for."""

    def __init__(self, attention: CausalAttention, layer: int, replaced: Any) -> None:
        self.attention, self.layer, self.replaced = attention, layer, replaced

    def attend(self, attn: WanAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        backend = getattr(self.replaced, "_attention_backend", None)
        attended = dispatch_attention_fn(query, key, value, backend=backend).flatten(2, 3).type_as(query)
        output: Tensor = attn.to_out[1](attn.to_out[0](attended))
        return output


class ChunkProcessor(_Processor):
    """Self-attention of a chunk over the window."""

    def __call__(self, attn: WanAttention, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        query, key, value = _get_qkv_projections(attn, hidden_states, None)
        query, key, value = (
            each.unflatten(2, (attn.heads, -1)) for each in (attn.norm_q(query), attn.norm_k(key), value)
        )
        query, rotated = rotate(query, self.attention.here), rotate(key, self.attention.here)
        return self.attend(attn, query, *self.attention.extend(self.layer, key, rotated, value))


class TextProcessor(_Processor):
    """Cross-attention, whose keys and values a chunk computes once for a prompt."""

    def __call__(self, attn: WanAttention, hidden_states: Tensor, text: Tensor, *_: object, **__: object) -> Tensor:
        texts, which = self.attention.texts, (self.attention.branch, self.layer)
        known = texts.get(which)
        if known is None or known[0] is not text:
            query, key, value = _get_qkv_projections(attn, hidden_states, text)
            heads = [each.unflatten(2, (attn.heads, -1)) for each in (attn.norm_k(key), value)]
            known = texts[which] = (text, heads[0], heads[1])
        else:
            query = attn.to_q(hidden_states)
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        return self.attend(attn, query, known[1], known[2])


def rotate(x: Tensor, table: Table) -> Tensor:
    """`x` [B, tokens, heads, D] turned pair by pair, with the bits of diffusers' processor."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[0][..., 0::2], table[1][..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).type_as(x)
