"""A stream of chunks from a causal model: for as long as it is asked, with prompts that may change between two."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Generator, Tensor

from edit_ray.cache.device_slots import Item
from edit_ray.cache.kv import KVWindow
from edit_ray.engine.causal_attention import CausalAttention
from edit_ray.engine.causal_loop import ChunkRequest, denoise_chunk, remember_chunk
from edit_ray.engine.causal_options import CausalOptions, check_switch
from edit_ray.engine.conditioning import StepSchedule
from edit_ray.engine.decode import StreamingDecoder, to_uint8
from edit_ray.runs.run_plan import Switch, chunk_seed

Texts = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class ChunkStatistics:
    """What a chunk took: the seconds until its frames were there, the window with it, bytes of K/V on the device.

    `recache_s` of the seconds computed K/V of earlier chunks again.
    """

    seconds: float
    window: tuple[int, ...]
    kv_bytes: int
    recache_s: float = 0.0


@dataclass(frozen=True)
class VideoChunk:
    """A chunk of a stream: its number, latents [B, C, c, h, w] in float32, and the frames of the first video.

    `frames`, uint8 [F, H, W, 3], has 4c of them, 3 less at the beginning; None if the stream does not decode.
    """

    index: int
    latents: Tensor
    frames: NDArray[np.uint8] | None
    statistics: ChunkStatistics


@dataclass(frozen=True)
class GivenChunk:
    """A chunk that a stream continues: its number, clean latents [B, C, c, h, w], and the prompt that it is shown with.

    The `texts` are embeddings [B, L, D] of the prompt and, with guidance, of the negative prompt; None: the stream's.
    """

    index: int
    latents: Tensor
    texts: Texts | None = None


class CausalStream:
    """An iterator over the chunks of one video; made by `EditCausalWanPipeline.stream`.

    Several streams of one pipeline may take turns, chunk by chunk. A stream ends after `num_chunks`, when it is closed,
    and when a callback interrupts the pipeline. After an error in a chunk the same chunk is made next.
    """

    def __init__(
        self,
        pipe: Any,
        options: CausalOptions,
        kv: KVWindow,
        texts: Texts,
        *,
        shape: tuple[int, ...],
        seeds: list[int],
        num_chunks: int | None = None,
        guidance_scale: float = 1.0,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 512,
        history: Sequence[GivenChunk] = (),
        callback: Any = None,
        callback_tensor_inputs: tuple[str, ...] = ("latents",),
        decode: bool = True,
    ) -> None:
        self.options, self.kv, self.num_chunks = options, kv, num_chunks
        self.guidance_scale, self.attention_kwargs = guidance_scale, attention_kwargs
        self._pipe, self._texts, self._shape, self._seeds = pipe, texts, shape, seeds
        self._max_sequence_length = max_sequence_length
        rows, columns = pipe.denoiser.config.patch_size[1:]
        self._attention = CausalAttention(pipe.transformer, kv, options, (shape[-2] // rows, shape[-1] // columns))
        self._callback, self._tensor_inputs = callback, callback_tensor_inputs
        self._decoder = StreamingDecoder(pipe.vae) if decode else None
        self._known: dict[int, tuple[Tensor, Texts]] = {}  # the chunks whose K/V may be computed again
        self._pending: list[tuple[Switch | None, Texts]] = []  # what changes before the next chunk
        self._closed, self._made, self.next_chunk = False, 0, 0
        self._denoised: Tensor | None = None  # the next chunk, if it has yet to be decoded
        self._decoded = torch.empty(1, *shape[1:])[:, :, :0]  # the last latents that the decoder depends on
        if history:
            self._known = {given.index: (given.latents, given.texts or texts) for given in history}
            self._decoded = torch.cat([given.latents[:1].cpu() for given in history], dim=2)
            self.next_chunk = history[-1].index + 1
            self._pending.append((None, texts))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> VideoChunk:
        if self.ended:
            self.close()
            raise StopIteration
        chunk: VideoChunk = self._pipe.make_chunk(self)
        return chunk

    @property
    def ended(self) -> bool:
        """Whether there is no further chunk."""
        return self._closed or self._made == self.num_chunks

    def send(self, prompt: Any = None, *, switch: str = "recache", prompt_embeds: Tensor | None = None) -> None:
        """Continue with another prompt from the next chunk on.

        Args:
            switch: What the next chunk sees of those before: `recache` computes their K/V again, with the new prompt;
                `keep` leaves it; `cut` drops all of it, and the next chunk is a beginning.

        Raises:
            ValueError: the stream has ended; no prompt is given; there is no such switch.
        """
        known = check_switch(switch)
        if self.ended:
            raise ValueError(f"The stream has ended after {self._made} chunks; it takes no further prompt.")
        if prompt is None and prompt_embeds is None:
            raise ValueError("send() needs a prompt, or prompt_embeds.")
        cond = self._pipe.encode_text(prompt, prompt_embeds, self._max_sequence_length)
        if len(cond) != self._shape[0]:
            raise ValueError(f"send() has {len(cond)} prompts, for a stream of {self._shape[0]} videos.")
        self._pending.append((known, (cond, self._texts[1])))

    def restore(self, order: Sequence[int], entries: Iterable[tuple[int, Item, Tensor]]) -> None:
        """Continue, behind the latest chunk, a stream of which K/V is left; arguments as of `KVWindow.restore`."""
        self.kv.restore(order, entries)
        self.next_chunk = max(order) + 1

    def close(self) -> None:
        """End the stream, and free its K/V."""
        self._closed, self._decoder = True, None
        self._known.clear()
        self.kv.free()

    @torch.no_grad()
    def make(self) -> VideoChunk:
        """The next chunk; called by the pipeline, one call at a time."""
        begun, index, recache_s = time.perf_counter(), self.next_chunk, 0.0
        if self._denoised is None:
            if self._pending:
                self._make_changes()
                recache_s = time.perf_counter() - begun
            self._denoised = denoise_chunk(self._pipe, self._request(index, self._noise(index), self._texts))
            self._known[index] = self._denoised, self._texts
            held = {*self.kv.chunks, *self.kv.stored}
            self._known = {chunk: each for chunk, each in self._known.items() if chunk in held}
        latents, frames = self._denoised, self._decode(self._denoised)
        self._denoised, self.next_chunk, self._made = None, index + 1, self._made + 1
        self._closed |= self._pipe.interrupt
        seconds = time.perf_counter() - begun
        statistics = ChunkStatistics(seconds, self.kv.chunks, self.kv.device_bytes, recache_s)
        return VideoChunk(index, latents, frames, statistics)

    def _make_changes(self) -> None:
        """What the next chunk waits for: other prompts, and K/V of a given beginning."""
        while self._pending:
            self._change(*self._pending[0])
            del self._pending[0]
        if self._pipe._execution_device.type == "cuda":
            torch.cuda.synchronize(self._pipe._execution_device)  # so that its seconds are its own

    def _decode(self, latents: Tensor) -> NDArray[np.uint8] | None:
        """The chunk's frames; after an error the decoder's state is made again."""
        if self._decoder is None:
            return None
        position = self.next_chunk * self.options.chunk_size
        if self._decoder.position != position:
            self._decoder.rebuild(self._decoded, position)
        video = self._decoder.decode(latents[:1])
        self._decoded = torch.cat([self._decoded, latents[:1].cpu()], dim=2)[:, :, -self._decoder.lookback :]
        frames: NDArray[np.uint8] = to_uint8(video).cpu().numpy()
        return frames

    def _change(self, switch: Switch | None, texts: Texts) -> None:
        """Continue with other texts; without a switch all known chunks are shown to the model, each with its texts."""
        self._texts = texts
        if switch == "keep":
            return
        if switch == "cut":
            self._known.clear()
            self._attention.origin = self.next_chunk
        elif switch == "recache":
            self._known = {chunk: (self._known[chunk][0], texts) for chunk in self.kv.chunks}
            self._pending[0] = (None, texts)  # as far as this is, should it fail
        self.kv.clear()
        for chunk, known in self._known.items():
            remember_chunk(self._pipe, self._request(chunk, *known))

    def _request(self, index: int, latents: Tensor, texts: Texts) -> ChunkRequest:
        return ChunkRequest(
            index,
            latents,
            self._attention,
            schedule_of(self.options),
            lambda step: self._generators(index, step),
            *texts,
            context_noise=self.options.context_noise,
            callback=self._callback,
            callback_tensor_inputs=self._tensor_inputs,
        )

    def _generators(self, index: int, step: int) -> list[Generator]:
        return [Generator().manual_seed(chunk_seed(seed, index, step)) for seed in self._seeds]

    def _noise(self, index: int) -> Tensor:
        where: dict[str, Any] = {"device": self._pipe._execution_device, "dtype": torch.float32}
        noise: Tensor = randn_tensor(self._shape, generator=self._generators(index, 0), **where)
        return noise


def schedule_of(options: CausalOptions) -> StepSchedule:
    """The steps of each chunk."""
    return StepSchedule(len(options.timesteps), options.sigmas)
