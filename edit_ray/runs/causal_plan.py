"""What a segment of a causal model sees of those before it: which chunks of them, and with whose prompt. Pure.

Chunks count from the last cut, before which nothing is seen. As in a stream of the library that is recached at each
segment, the chunks are those that a full window has: those of the sink, and the latest.
"""

from __future__ import annotations

from dataclasses import dataclass

from edit_ray.runs.run_plan import Storyboard


@dataclass(frozen=True)
class ChunkSizes:
    """The sizes of a causal model's chunks and window, in latent frames; the last two are multiples of the first."""

    chunk_size: int
    window: int
    sink: int


@dataclass(frozen=True)
class SeenChunk:
    """A chunk, the segment that it is part of, the latents before it there, and the segment whose prompt it has."""

    number: int
    segment: int
    first_latent: int
    prompt_of: int


def chunks_held(made: int, sizes: ChunkSizes) -> list[int]:
    """The chunks of a window after so many were made, from old to new."""
    places, sink = sizes.window // sizes.chunk_size, sizes.sink // sizes.chunk_size
    return [*range(min(sink, made)), *range(max(sink, made - (places - sink)), made)]


def seen_chunks(board: Storyboard, segment_index: int, sizes: ChunkSizes) -> list[SeenChunk]:
    """What segment `segment_index` sees of those before it, from old to new.

    A chunk has the prompt that it was made with, unless a later one was switched to with `recache`: then this.
    """
    per_segment = board.layout.latent_frames // sizes.chunk_size
    begin, recached = board.switch_before(segment_index, "cut"), board.switch_before(segment_index, "recache", "cut")
    seen = []
    for number in chunks_held((segment_index - begin) * per_segment, sizes):
        segment = begin + number // per_segment
        first_latent = number % per_segment * sizes.chunk_size
        seen.append(SeenChunk(number, segment, first_latent, prompt_of=max(segment, recached)))
    return seen


def segments_seen(board: Storyboard, segment_index: int, sizes: ChunkSizes) -> tuple[int, ...]:
    """The segments whose latents segment `segment_index` is made from."""
    return tuple(dict.fromkeys(chunk.segment for chunk in seen_chunks(board, segment_index, sizes)))
