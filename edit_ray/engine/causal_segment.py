"""`CausalSegmentEngine`: segments of a causal model, each a number of chunks that continue committed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.records import Record
from edit_ray.engine.causal_options import CausalOptions, options_of_run
from edit_ray.engine.causal_pipeline import EditCausalWanPipeline
from edit_ray.engine.causal_stream import CausalStream, GivenChunk, Texts, VideoChunk
from edit_ray.engine.options import ContinuityOptions, SamplingOptions, frames_of
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.engine.segment import UNCACHED, SegmentEngine
from edit_ray.tiers.store_client import PlannedStore


@dataclass(frozen=True)
class ChunkBefore:
    """A committed chunk that a segment sees: its number, clean latents [1, C, c, h, w], and the prompts it has."""

    number: int
    latents: Tensor
    prompt: str
    negative_prompt: str


class CausalSegmentEngine(SegmentEngine):
    """Denoises segments chunk by chunk. Nothing but latents is carried over: each segment computes the K/V of the
    chunks that it sees again, so that it does not matter which process makes it, and when.
    """

    pipeline_class: ClassVar[type[EditWanPipeline]] = EditCausalWanPipeline
    _model_options: CausalOptions | None = None  # of the model, which those of a run change

    def denoise(
        self,
        sampling: SamplingOptions,
        *,
        prompt: str,
        seed: int,
        on_step: Callable[[int, int], None] | None = None,
        cache: CacheOptions = UNCACHED,
        segment_index: int = 0,
        store: PlannedStore | None = None,
        lora_weights: Mapping[str, float] | None = None,
        continuity: ContinuityOptions | None = None,
        before: Sequence[ChunkBefore] = (),
        **conditions: Any,
    ) -> Tensor:
        """One segment's normalised latents [1, C, T, h, w], float32, on the CPU.

        Equal, bit for bit, to the chunks of `pipe.stream(prompt, history=…, generator=…)` with the same beginning.
        `before` are the chunks that it sees, from old to new. `on_step` counts the steps of all chunks.
        """
        assert continuity is not None, "a causal segment has a number of chunks"
        self.use_options(continuity, sampling)
        self._use(cache, sampling, lora_weights or {})
        self._records: list[Record] = []
        stream = self.stream(
            sampling, prompt=prompt, seed=seed, before=before, on_step=on_step, chunks=continuity.chunks
        )
        try:
            made = list(stream)
        finally:
            stream.close()
        self._figures = _figures_of(made)
        return self._checked(torch.cat([chunk.latents for chunk in made], dim=2), seed)

    def use_options(self, continuity: ContinuityOptions, sampling: SamplingOptions) -> CausalOptions:
        """The causal options of a run, which the pipeline has from now on."""
        self._model_options = self._model_options or self.pipe.causal
        options = options_of_run(self._model_options, continuity, sampling)
        if options != self.pipe.causal:
            self._cached_for = None  # a cache knows the steps of a chunk
            self.pipe.causal = options
        return options

    def stream(
        self,
        sampling: SamplingOptions,
        *,
        prompt: str,
        seed: int,
        before: Sequence[ChunkBefore],
        chunks: int,
        on_step: Callable[[int, int], None] | None = None,
    ) -> CausalStream:
        """The stream whose chunks are those of a segment; `denoise` says what the arguments are."""
        pairs = [(prompt, sampling.negative_prompt), *((chunk.prompt, chunk.negative_prompt) for chunk in before)]
        shown = dict.fromkeys(text for pair in pairs for text in pair)
        self.encode_prompts(list(shown))
        embeds = {text: self._embeds[text].to(self.device) for text in shown}
        guided, steps, done = sampling.guidance_scale > 1, len(self.pipe.causal.timesteps), 0

        def after_step(*_: object) -> dict[str, Any]:
            nonlocal done
            done += 1
            self._note_record()
            if on_step is not None:
                on_step(done, chunks * steps)
            return {}

        def texts(prompt: str, negative_prompt: str) -> Texts:
            return embeds[prompt], embeds[negative_prompt] if guided else None

        cond, uncond = texts(prompt, sampling.negative_prompt)
        stream: CausalStream = self.pipe.stream(
            height=sampling.height,
            width=sampling.width,
            num_frames=frames_of(chunks * self.pipe.causal.chunk_size),
            guidance_scale=sampling.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            prompt_embeds=cond,
            negative_prompt_embeds=uncond,
            history=[
                GivenChunk(chunk.number, chunk.latents, texts(chunk.prompt, chunk.negative_prompt)) for chunk in before
            ],
            callback_on_step_end=after_step,
            decode=False,
        )
        return stream

    @property
    def record(self) -> Record | None:
        """What the cache decided in the chunks of the last segment, one after the other; None without a cache."""
        return None if self.pipe.cache is None else Record.joined(self._records)

    @property
    def figures(self) -> Mapping[str, float]:
        return self._figures

    def _note_record(self) -> None:
        """Keep the record of the chunk that is denoised: each chunk is a call of its own."""
        cache = self.pipe.cache
        if cache is not None and not (self._records and self._records[-1] is cache.record):
            self._records.append(cache.record)


def _figures_of(made: Sequence[VideoChunk]) -> dict[str, float]:
    statistics = [chunk.statistics for chunk in made]
    return {
        "chunks": len(made),
        "recache_s": sum(each.recache_s for each in statistics),
        "kv_bytes": max(each.kv_bytes for each in statistics),
    }
