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
    held = chunks_held((segment_index - begin) * per_segment, sizes)
    return [_seen(number, begin, per_segment, sizes.chunk_size, recached) for number in held]


def _seen(number: int, begin: int, per_segment: int, chunk_size: int, recached: int) -> SeenChunk:
    segment = begin + number // per_segment
    return SeenChunk(number, segment, number % per_segment * chunk_size, max(segment, recached))


def rolled_chunks(board: Storyboard, segment_index: int, sizes: ChunkSizes) -> list[SeenChunk]:
    """The chunks that lead to the K/V with which segment `segment_index` begins, where K/V rolls on: those that were
    shown again where a prompt was last switched to, and all behind them.
    """
    switched = board.switch_before(segment_index, "recache", "cut")
    begin, per_segment = board.switch_before(segment_index, "cut"), board.layout.latent_frames // sizes.chunk_size
    made, now = ((at - begin) * per_segment for at in (switched, segment_index))
    return [
        _seen(number, begin, per_segment, sizes.chunk_size, switched)
        for number in (*chunks_held(made, sizes), *range(made, now))
    ]


def slots_held(board: Storyboard, segment_index: int, sizes: ChunkSizes) -> list[int]:
    """The chunks with which segment `segment_index` begins, where K/V rolls on, by their slots in the window.

    Those that were shown again have the first slots; a later one has the next, or that of the chunk that left for it.
    """
    rolled = [chunk.number for chunk in rolled_chunks(board, segment_index, sizes)]
    places, sink = sizes.window // sizes.chunk_size, sizes.sink // sizes.chunk_size
    slots = rolled[:places]
    for number in rolled[places:]:
        slots[slots.index(min(slots[sink:]))] = number
    return slots


@dataclass(frozen=True)
class KVUses:
    """K/V that a segment writes, and reads: chunks, and with each the segment that writes it."""

    writes: tuple[tuple[int, int], ...] = ()
    reads: tuple[tuple[int, int], ...] = ()


def kv_uses(board: Storyboard, segment_index: int, sizes: ChunkSizes, start: int, num_segments: int) -> KVUses:
    """What a segment writes for later ones, and reads of earlier ones, by a plan that begins with segment `start`.

    A segment that computes K/V again, where a prompt is switched to or the plan begins, reads nothing, and writes all
    that it holds at its end.
    """

    def writer(at: int, by: int) -> list[tuple[int, int]]:
        """The chunks that segment `at` begins with, as the segments up to `by` have written them."""
        begin, per_segment = board.switch_before(at, "cut"), board.layout.latent_frames // sizes.chunk_size
        first = max(start, board.switch_before(by, "recache", "cut"))
        held = chunks_held((at - begin) * per_segment, sizes)
        return [(number, max(first, begin + number // per_segment)) for number in held]

    switched = [board.switch_before(at, "recache", "cut") for at in (segment_index, segment_index + 1)]
    writes: list[tuple[int, int]] = []
    if segment_index + 1 < num_segments and switched[1] <= segment_index:
        writes = [use for use in writer(segment_index + 1, segment_index) if use[1] == segment_index]
    fresh = segment_index in (start, switched[0])
    return KVUses(tuple(writes), () if fresh else tuple(writer(segment_index, segment_index - 1)))


def segments_seen(board: Storyboard, segment_index: int, sizes: ChunkSizes) -> tuple[int, ...]:
    """The segments whose latents segment `segment_index` is made from."""
    return tuple(dict.fromkeys(chunk.segment for chunk in seen_chunks(board, segment_index, sizes)))
