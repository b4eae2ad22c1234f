"""What the causal tests compare with: one pass over all chunks, and the published rules, both slow and plain."""

from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from edit_ray.cache.kv import KVWindow
from edit_ray.cache.kv_retention import WindowSink
from edit_ray.cache.kv_rings import KVLayout
from edit_ray.engine.causal_attention import CausalAttention
from edit_ray.engine.causal_options import CausalOptions


def seen_by(chunk: int, options: CausalOptions) -> list[int]:
    """The chunks that a chunk attends to, by the rule: the sink, and the last of the window."""
    sink, local = options.sink // options.chunk_size, (options.window - options.sink) // options.chunk_size
    return [other for other in range(chunk + 1) if other < sink or other > chunk - local]


def attention_of(model, latents: Tensor, options: CausalOptions) -> CausalAttention:
    """The attention of a stream of the given latents' sizes."""
    config, grid = model.config, (latents.shape[-2] // 2, latents.shape[-1] // 2)
    sizes = {"num_layers": config.num_layers, "batch": len(latents), "tokens": options.chunk_size * grid[0] * grid[1]}
    sizes |= {"heads": config.num_attention_heads, "head_dim": config.attention_head_dim, "chunks": options.chunks}
    layout = KVLayout(**sizes, dtype=model.dtype, device=latents.device, rotated_keys=options.rope == "relative")
    kv = KVWindow(layout, WindowSink(), sink_chunks=options.sink // options.chunk_size)
    return CausalAttention(model, kv, options, grid)


def chunked(model, latents: Tensor, timesteps: Tensor, text: Tensor, attention: CausalAttention) -> Tensor:
    """The forwards of clean chunks, one after the other, each at a timestep of its own."""
    outputs = []
    for index, chunk in enumerate(latents.split(attention.options.chunk_size, dim=2)):
        with attention.chunk(index):
            attention.kv.finished = True
            outputs.append(model(chunk, timesteps[index].expand(len(latents)), text, return_dict=False)[0])
    return torch.cat(outputs, dim=2)


class OnePass:
    """Self-attention of all chunks at once, each over the chunks that it sees; with `relative` numbered anew."""

    def __init__(self, rope_of: Callable[[int], tuple[Tensor, Tensor]], options: CausalOptions, num_chunks: int):
        self.rope_of, self.options, self.num_chunks = rope_of, options, num_chunks

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        heads = [each.unflatten(2, (attn.heads, -1)) for each in (query, key, attn.to_v(hidden_states))]
        attend = self._masked if self.options.rope == "absolute" else self._renumbered
        attended = attend(*(each.chunk(self.num_chunks, dim=1) for each in heads))
        return attn.to_out[0](attended.flatten(2, 3))

    def _masked(self, queries, keys, values):
        tokens, numbers = queries[0].shape[1], range(self.num_chunks)
        mask = torch.tensor([[other in seen_by(chunk, self.options) for other in numbers] for chunk in numbers])
        mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        query, key = (
            torch.cat([turned(each, *self.rope_of(number)) for number, each in enumerate(some)], dim=1)
            for some in (queries, keys)
        )
        return dispatch_attention_fn(query, key, torch.cat(values, dim=1), attn_mask=mask)

    def _renumbered(self, queries, keys, values):
        attended = []
        for chunk, query in enumerate(queries):
            seen = seen_by(chunk, self.options)
            key = torch.cat([turned(keys[other], *self.rope_of(number)) for number, other in enumerate(seen)], dim=1)
            query = turned(query, *self.rope_of(len(seen) - 1))
            attended.append(dispatch_attention_fn(query, key, torch.cat([values[other] for other in seen], dim=1)))
        return torch.cat(attended, dim=1)


def one_pass(model, latents: Tensor, timesteps: Tensor, text: Tensor, options: CausalOptions) -> Tensor:
    """The forward of all chunks at once, recomputed from nothing."""
    num_chunks, size = latents.shape[2] // options.chunk_size, options.chunk_size
    cos, sin = model.rope(latents[:, :, :1].expand(-1, -1, num_chunks * size, -1, -1))
    tokens = cos.shape[1] // num_chunks

    def rope_of(number: int) -> tuple[Tensor, Tensor]:
        return cos[:, number * tokens : (number + 1) * tokens], sin[:, number * tokens : (number + 1) * tokens]

    before = [block.attn1.processor for block in model.blocks]
    for block in model.blocks:
        block.attn1.processor = OnePass(rope_of, options, num_chunks)
    each = timesteps.repeat_interleave(tokens)[None].expand(len(latents), -1)
    try:
        return model(latents, each, text, return_dict=False)[0]
    finally:
        for block, processor in zip(model.blocks, before, strict=True):
            block.attn1.processor = processor


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B, N, heads, D] times the complex numbers of its angles."""
    angles = torch.complex(cos[..., 0::2].to(x.dtype), sin[..., 1::2].to(x.dtype))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2)


class PublishedAttention:
    """The rules of Self-Forcing's and LongLive's K/V: one buffer, rotated keys, what overflows behind the sink shifts.

    Source: guandeh17/Self-Forcing, `wan/modules/causal_model.py`, written anew. `start` is the first latent frame.
    """

    def __init__(self, rope_of, window: int, sink: int, frame_tokens: int) -> None:
        self.rope_of, self.size, self.sink = rope_of, window * frame_tokens, sink * frame_tokens
        self.key = self.value = None
        self.end = self.filled = self.start = 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (e.unflatten(2, (attn.heads, -1)) for e in (query, key, attn.to_v(hidden_states)))
        query, key = (turned(each, *self.rope_of(self.start)) for each in (query, key))
        if self.key is None:
            shape = (len(key), self.size, *key.shape[2:])
            self.key, self.value = torch.zeros(shape, dtype=key.dtype), torch.zeros(shape, dtype=key.dtype)
        new, end = key.shape[1], self.start * (key.shape[1] // 3) + key.shape[1]
        if end > self.end and self.filled + new > self.size:
            surplus = self.filled + new - self.size
            for buffer in (self.key, self.value):
                buffer[:, self.sink : self.filled - surplus] = buffer[:, self.sink + surplus : self.filled].clone()
            self.filled -= surplus
        self.filled, self.end = self.filled + end - self.end, end
        self.key[:, self.filled - new : self.filled] = key
        self.value[:, self.filled - new : self.filled] = value
        attended = dispatch_attention_fn(query, self.key[:, : self.filled], self.value[:, : self.filled])
        return attn.to_out[0](attended.flatten(2, 3))


def published_video(model, text: Tensor, noise: Callable[[int, int], Tensor], num_chunks: int, window: int, sink: int):
    """Latents by the published algorithm for chunks of 3; `noise` gives that of a chunk and a step.

    Source: guandeh17/Self-Forcing, `pipeline/causal_inference.py`, written anew: the warped list, the prediction of the
    clean chunk, fresh noise between the steps, a last forward at timestep 0.
    """
    steps = torch.tensor([1000.0, 750.0, 500.0, 250.0]) / 1000
    sigmas = 5 * steps / (1 + 4 * steps)
    like = noise(0, 0)
    cos, sin = model.rope(like[:, :, :1].expand(-1, -1, 3 * num_chunks, -1, -1))
    tokens = cos.shape[1] // num_chunks
    attentions = []
    for block in model.blocks:

        def rope_of(start: int) -> tuple[Tensor, Tensor]:
            return cos[:, start // 3 * tokens :][:, :tokens], sin[:, start // 3 * tokens :][:, :tokens]

        attentions.append(PublishedAttention(rope_of, window, sink, tokens // 3))
        block.attn1.processor = attentions[-1]
    video = []
    for chunk in range(num_chunks):
        for attention in attentions:
            attention.start = 3 * chunk
        x = noise(chunk, 0)
        for step, sigma in enumerate(sigmas):
            flow = model(x, (sigma * 1000).expand(len(x)), text, return_dict=False)[0]
            clean = x - sigma * flow
            if step + 1 < len(sigmas):
                x = (1 - sigmas[step + 1]) * clean + sigmas[step + 1] * noise(chunk, step + 1)
        model(clean, torch.zeros(len(x)), text, return_dict=False)
        video.append(clean)
    return torch.cat(video, dim=2)
