"""`CausalSegmentEngine`: segments of a causal model, each a number of chunks that continue committed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from edit_ray.cache.device_slots import Item
from edit_ray.cache.kv import KVWindow
from edit_ray.cache.options import CacheOptions
from edit_ray.cache.records import Record
from edit_ray.engine.causal_options import CausalOptions, options_of_run
from edit_ray.engine.causal_pipeline import EditCausalWanPipeline
from edit_ray.engine.causal_stream import CausalStream, GivenChunk, Texts, VideoChunk
from edit_ray.engine.options import ContinuityOptions, SamplingOptions, frames_of
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.engine.reuse import branches_of
from edit_ray.engine.segment import UNCACHED, SegmentEngine
from edit_ray.errors import EntryLost
from edit_ray.runs.causal_plan import KVUses
from edit_ray.tiers.leases import Reuse
from edit_ray.tiers.protocol import EntryForm
from edit_ray.tiers.reuse_plan import CacheKey, PlannedUse, ReusePlan, SegmentUses
from edit_ray.tiers.store_client import PlannedStore


@dataclass(frozen=True)
class ChunkBefore:
    """A committed chunk that a segment sees: its number, clean latents [1, C, c, h, w], and the prompts it has."""

    number: int
    latents: Tensor
    prompt: str
    negative_prompt: str


@dataclass(frozen=True)
class KVPlan:
    """The K/V that segments from `first` on write and read of each other, under the name of their run in the store."""

    run: str
    first: int
    segments: Sequence[KVUses]


class CausalSegmentEngine(SegmentEngine):
    """Denoises segments chunk by chunk. What a segment begins with is computed again from latents, or was stored: so it
    does not matter which process makes it, and when.
    """

    pipeline_class: ClassVar[type[EditWanPipeline]] = EditCausalWanPipeline
    _model_options: CausalOptions | None = None  # of the model, which those of a run change
    _records: Sequence[Record] = ()  # of the last segment's chunks
    _figures: Mapping[str, float] = MappingProxyType({})

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
        slots: Sequence[int] = (),
        **conditions: Any,
    ) -> Tensor:
        """One segment's normalised latents [1, C, T, h, w], float32, on the CPU.

        Equal, bit for bit, to the chunks of `pipe.stream(prompt, history=…, generator=…)` with the same beginning.
        `before` are the chunks that it sees, from old to new. `on_step` counts the steps of all chunks. What `store`
        has planned is K/V: reads of the chunks with which the segment begins, in these `slots` of the window, and
        writes of those that later segments begin with.
        """
        assert continuity is not None, "a causal segment has a number of chunks"
        self.use_options(continuity, sampling)
        self._use(cache, sampling, lora_weights or {})
        self._records = []
        stream = self.stream(
            sampling, prompt=prompt, seed=seed, before=before, on_step=on_step, chunks=continuity.chunks
        )
        try:
            if store is not None and slots:
                stream.restore(slots, _entries_of(store))
            made = [next(stream) for _ in range(continuity.chunks)]
            if store is not None:
                _keep(store, stream.kv)
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

    def plan_kv(self, sampling: SamplingOptions, uses: KVPlan) -> Reuse:
        """The reuse plan of K/V: an entry is that of a chunk in one layer."""
        factor = self.pipe.vae_scale_factor_spatial
        layout = self.pipe.kv_layout(self.pipe.causal, 1, sampling.height // factor, sampling.width // factor)
        form = EntryForm(layout.device, layout.dtype, layout.entry_shape)
        items = [(branch, layer) for branch in branches_of(sampling) for layer in range(layout.num_layers)]
        return Reuse(kv_reuse_plan(uses, items, form.size), form)

    @property
    def history_len(self) -> int:
        """Of a segment's own K/V nothing is read of the store."""
        return 0

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
            self._records = [*self._records, cache.record]


def kv_reuse_plan(plan: KVPlan, items: Sequence[Item], size: int) -> ReusePlan:
    """The writes and reads of K/V as those of entries, each of one of these (branch, layer)."""

    def entries(chunks: Sequence[tuple[int, int]], step: int) -> tuple[PlannedUse, ...]:
        return tuple(
            PlannedUse(CacheKey(plan.run, writer - plan.first, "kv", branch, layer, number), size, step)
            for number, writer in chunks
            for branch, layer in items
        )

    segments = tuple(SegmentUses(entries(use.writes, step=1), entries(use.reads, step=0)) for use in plan.segments)
    return ReusePlan(segments, (), max(size * len(each.working) for each in segments))


def _entries_of(store: PlannedStore) -> Iterator[tuple[int, Item, Tensor]]:
    """The planned K/V, in the order of the plan. Raises EntryLost."""
    for key in store.planned_reads():
        _, _, branch, layer, chunk = key
        entry = store.get(key)
        if entry is None:
            raise EntryLost(f"The store has no {key}, which the segment begins with.")
        yield int(chunk or 0), (str(branch), int(layer or 0)), entry


def _keep(store: PlannedStore, kv: KVWindow) -> None:
    for key in store.planned_writes():
        _, _, branch, layer, chunk = key
        entry = kv.get(int(chunk or 0), int(layer or 0), str(branch))
        assert entry is not None, "it is in the window"
        store.put(key, entry)
    store.finish()


def _figures_of(made: Sequence[VideoChunk]) -> dict[str, float]:
    statistics = [chunk.statistics for chunk in made]
    return {
        "chunks": len(made),
        "recache_s": sum(each.recache_s for each in statistics),
        "kv_bytes": max(each.kv_bytes for each in statistics),
    }
