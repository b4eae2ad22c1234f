"""Frames to segments and back."""

import math
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.runs.ids import check_run_id, new_run_id
from edit_ray.runs.run_plan import FrameLayout


@st.composite
def layouts(draw: st.DrawFn) -> FrameLayout:
    latents = draw(st.integers(1, 257))
    if draw(st.booleans()):
        return FrameLayout(4 * (latents - 1) + 1, 0, draw(st.integers(1, 120)), causal=True)
    history, init = (draw(st.integers(0, latents - 1)) for _ in range(2))
    return FrameLayout(4 * (latents - 1) + 1, history, draw(st.integers(1, 120)), init)


@pytest.mark.parametrize(
    ("layout", "frames_of", "first_latents"),
    [
        (FrameLayout(33, 3, 16), [33, 24, 24, 24], [0, 9, 15, 21]),  # the embedded model's video, of 105 frames
        (FrameLayout(81, 0, 16), [81, 81, 81, 81], [0, 21, 42, 63]),
        (FrameLayout(33, 3, 16, init_latents=3), [24, 24, 24, 24], [3, 9, 15, 21]),  # a clip is no part of the video
        (FrameLayout(81, 0, 16, causal=True), [81, 84, 84, 84], [0, 21, 42, 63]),
        (FrameLayout(33, 3, 16, init_latents=1), [32, 24, 24, 24], [1, 9, 15, 21]),
    ],
)
def test_layouts(layout: FrameLayout, frames_of: list[int], first_latents: list[int]) -> None:
    assert [layout.frames_of(index) for index in range(4)] == frames_of
    assert [layout.first_latent(index) for index in range(4)] == first_latents
    assert layout.total_frames(4) == sum(frames_of)


@given(layouts(), st.integers(0, 500))
def test_each_latent_after_the_first_of_a_stream_is_four_frames(layout: FrameLayout, index: int) -> None:
    added = layout.first_latent(index + 1) - layout.first_latent(index)
    starts = not layout.one_stream and index > 0  # a stream of its own
    starts |= layout.init_latents == 0 and index == 0
    assert layout.frames_of(index) == 4 * added - 3 * starts


@given(layouts(), st.integers(0, 500))
def test_frames_of_the_segments_add_up(layout: FrameLayout, num_segments: int) -> None:
    assert sum(map(layout.frames_of, range(num_segments))) == layout.total_frames(num_segments)
    assert layout.first_frame(num_segments) == layout.total_frames(num_segments)


@given(layouts(), st.integers(0, 100_000))
def test_a_segment_s_first_and_last_frames_are_found_by_their_seconds(layout: FrameLayout, index: int) -> None:
    first, last = layout.first_frame(index), layout.first_frame(index + 1) - 1
    assert layout.segment_at(first / layout.fps) == index
    assert layout.segment_at(last / layout.fps) == index
    assert layout.frame_at(last / layout.fps) == last


@given(layouts(), st.floats(0.001, 7 * 86400), st.integers(1, 100_000))
def test_the_fewest_segments_cover_a_duration(layout: FrameLayout, duration_s: float, whole: int) -> None:
    assert layout.segments_for(layout.total_frames(whole) / layout.fps) == whole
    num_segments = layout.segments_for(duration_s)
    assert num_segments >= 1
    assert layout.total_frames(num_segments) >= duration_s * layout.fps - 1e-6
    assert num_segments == 1 or layout.total_frames(num_segments - 1) < duration_s * layout.fps


def test_binary_rounding_makes_no_extra_segment() -> None:
    assert 0.07 * 100 > 7
    assert FrameLayout(1, 0, 100).segments_for(0.07) == 7
    assert math.floor(0.29 * 100) == 28
    assert FrameLayout(1, 0, 100).segment_at(0.29) == 29


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((34, 0, 16), "4k\\+1"),
        ((0, 0, 16), "4k\\+1"),
        ((33, 9, 16), "less than the 9 latents"),
        ((33, -1, 16), "at least 0"),
        ((33, 3, 0), "fps is 0"),
        ((33, 3, 16, 9), "init_latents is 9"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(arguments: tuple[int, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        FrameLayout(*arguments)


@pytest.mark.parametrize("call", [FrameLayout(33, 0, 16).frames_of, FrameLayout(33, 0, 16).segment_at])
def test_nothing_lies_before_the_start(call) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        call(-1)


@pytest.mark.parametrize("run_id", ["", "A", "-a", "_a", "a/b", "..", "a\n", "a b", "ä", "a" * 65, "a" * 10_000])
def test_a_bad_run_id_is_named_in_one_short_line(run_id: str) -> None:
    assert [check_run_id(good) for good in ("a", "0", "my-run_2", "a" * 64)] == ["a", "0", "my-run_2", "a" * 64]
    with pytest.raises(ValueError, match=r"must be 1 to 64 of a-z, 0-9, '_' and '-'") as caught:
        check_run_id(run_id)
    assert repr(run_id)[:60] in str(caught.value)
    assert len(str(caught.value)) < 220
    assert "\n" not in str(caught.value)


def test_a_new_run_id_tells_its_time() -> None:
    assert new_run_id(datetime(2026, 11, 23, 10, 15), "3f2a") == "20261123-101500-3f2a"
