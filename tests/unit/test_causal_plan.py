"""What a causal segment sees of those before it: the chunks of the library's own window, with the right prompts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.cache.kv import KVWindow
from edit_ray.cache.kv_retention import WindowSink
from edit_ray.cache.kv_rings import KVLayout
from edit_ray.runs.causal_plan import ChunkSizes, chunks_held, kv_uses, seen_chunks, segments_seen, slots_held
from edit_ray.runs.run_plan import Edit, FrameLayout, Scene, Storyboard, Take

SWITCHES = st.sampled_from(["recache", "keep", "cut"])


def window_of(sink, others):
    layout = KVLayout(1, 1, 1, 1, 2, sink + others, torch.float32, torch.device("cpu"))
    return KVWindow(layout, WindowSink(), sink_chunks=sink)


def show(window, chunk):
    window.begin(chunk)
    window.finished = True
    window.complete()


@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 14))
def test_the_chunks_are_those_that_a_window_holds(sink, others, chunk_size, made):
    window = window_of(sink, others)
    for chunk in range(made):
        show(window, chunk)
    sizes = ChunkSizes(chunk_size, (sink + others) * chunk_size, sink * chunk_size)
    assert chunks_held(made, sizes) == list(window.chunks)


@st.composite
def boards(draw):
    starts = sorted(draw(st.sets(st.integers(1, 12), max_size=4)))
    scenes = [
        Scene(start, f"prompt {start}", "", 1.0, 0, switch=draw(SWITCHES) if start else "recache")
        for start in (0, *starts)
    ]
    takes = [
        Take(number, draw(st.integers(0, 12)), number, draw(st.sampled_from([None, f"take {number}"])))
        for number in range(1, draw(st.integers(0, 2)) + 1)
    ]
    edits = [
        Edit(draw(st.integers(0, 12)), draw(st.sampled_from([None, f"edit {number}"])), seed=7)
        for number in range(draw(st.integers(0, 2)))
    ]
    changes, chunks = draw(st.permutations([*takes, *edits])), draw(st.integers(1, 3))
    return Storyboard(tuple(scenes), FrameLayout(4 * (chunks - 1) + 1, 0, 16, causal=True), tuple(changes)), chunks


def shown_one_by_one(board, last, chunks, sizes):
    """The prompt that each chunk of the window has when segment `last` begins, told as it happens: (chunk, prompt)."""
    first, prompts = 0, []
    for segment in range(last + 1):
        own = board.segment(segment).prompt
        scene = next((scene for scene in board.scenes if scene.start == segment), None)
        changed = any(change.start == segment and change.prompt is not None for change in board.changes)
        switch = scene.switch if scene is not None else "recache" if changed else "keep"
        if switch == "cut":
            first, prompts = segment, []
        if switch == "recache":
            prompts = [own] * len(prompts)
        if segment == last:
            held = chunks_held(len(prompts), sizes)
            return [(number, first * chunks + number, prompts[number]) for number in held]
        prompts += [own] * chunks
    raise AssertionError


@given(boards(), st.integers(0, 14), st.integers(0, 2), st.integers(1, 4))
def test_a_chunk_has_the_prompt_that_it_was_last_shown_with(board_of_chunks, index, sink, others):
    board, chunks = board_of_chunks
    sizes = ChunkSizes(1, sink + others, sink)
    seen = seen_chunks(board, index, sizes)
    told = [
        (chunk.number, chunk.segment * chunks + chunk.first_latent, board.segment(chunk.prompt_of).prompt)
        for chunk in seen
    ]
    assert told == shown_one_by_one(board, index, chunks, sizes)
    assert segments_seen(board, index, sizes) == tuple(sorted({chunk.segment for chunk in seen}))
    assert all(chunk.segment < index for chunk in seen)


@given(boards(), st.integers(0, 13), st.integers(0, 2), st.integers(1, 4))
def test_slots_are_those_of_a_window_that_rolls_on(board_of_chunks, last, sink, others):
    """Told as a stream does it: shown again where a prompt is switched to, dropped at a cut, else left as it is."""
    board, chunks = board_of_chunks
    sizes = ChunkSizes(1, sink + others, sink)
    window, made = window_of(sink, others), 0
    for segment in range(last + 1):
        switched = board.switch_before(segment, "recache", "cut") == segment
        if segment and switched:
            held = list(window.chunks)
            window.clear()
            if board.switch_before(segment, "cut") == segment:
                made, held = 0, []
            for chunk in held:
                show(window, chunk)
        if segment == last:
            assert slots_held(board, segment, sizes) == list(window.order)
        for _ in range(chunks):
            show(window, made)
            made += 1


@given(boards(), st.integers(0, 3), st.integers(2, 14), st.integers(0, 2), st.integers(1, 4))
def test_what_is_read_was_written_by_then_and_what_is_written_is_read(board_of_chunks, start, end, sink, others):
    board, _ = board_of_chunks
    sizes = ChunkSizes(1, sink + others, sink)
    uses = {index: kv_uses(board, index, sizes, start, end) for index in range(start, end)}
    written = set()
    for index, use in uses.items():
        assert written.issuperset(use.reads)
        fresh = index == start or board.switch_before(index, "recache", "cut") == index
        assert fresh == (not use.reads)
        if use.reads:
            assert sorted(number for number, _ in use.reads) == sorted(slots_held(board, index, sizes))
            latest = max(start, board.switch_before(index, "recache", "cut"))
            assert all(writer >= latest for _, writer in use.reads), "what was computed again is not read as it was"
        assert not written.intersection(use.writes)
        written |= {*use.writes}
        assert all(writer == index for _, writer in use.writes)
    assert written == {read for use in uses.values() for read in use.reads}
