"""What a run will still take of the disk, and which old files may go."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.actors.folder_state import shortage_after, shortage_before
from edit_ray.actors.messages import RunSpec
from edit_ray.config import Config
from edit_ray.runs.retention import (
    KEEP_ALL,
    MARGIN_BYTES,
    SegmentSize,
    bytes_to_come,
    first_guess,
    measured,
    retention,
    shortage,
)
from edit_ray.runs.run_plan import FrameLayout
from tests.unit.test_manifest import record


def test_more_segments_take_more_until_old_ones_go():
    size = SegmentSize(latents=100, media=10)
    assert bytes_to_come(4, size, None) == 4 * (100 + 3 * 10)
    assert bytes_to_come(4, size, 2) == 3 * (100 + 3 * 10), "two that stay and one that is made"
    assert bytes_to_come(0, size, None) == 0


def test_a_shortage_is_one_sentence_and_enough_is_none():
    assert shortage(100, 100 + MARGIN_BYTES) is None
    said = shortage(101, 100 + MARGIN_BYTES)
    assert "101 bytes of disk, 64 MiB besides must stay free, and 64 MiB are free; free some" in said
    assert "takes about 2,048 MiB of disk" in shortage(2**31, 0)
    assert "and 0 bytes are free" in shortage(2**31, 0)


@given(st.integers(1, 2**40), st.integers(0, 2**40))
def test_what_some_bytes_take_is_never_written_as_nothing(needed, free):
    said = shortage(needed, free) or ""
    assert "about 0 " not in said


def test_the_latest_segments_are_measured():
    guess = first_guess(33, 128, 128, 5000)
    assert measured([], guess) == guess
    assert measured([record(0)], guess) == guess, "of that one nothing was measured"
    records = [replace(record(k), statistics={"media_bytes": 1000.0 + k}) for k in range(20)]
    assert measured(records, guess) == SegmentSize(5000, 1019)


@pytest.mark.parametrize("video", [{"num_segments": 4}, {"num_segments": None}])
def test_the_file_system_is_asked(tmp_path, video):
    config = Config.model_validate({"video": video, "prompt_segments": [{"segment": 0, "prompt": "a red circle"}]})
    spec = RunSpec("one", tmp_path / "not" / "yet", config, config.num_segments)
    assert shortage_before(spec) is None
    assert shortage_after(spec, (record(0),)) is None
    huge = config.model_copy(update={"sampling": config.sampling.model_copy(update={"height": 2**24, "width": 2**24})})
    assert "MiB of disk" in shortage_before(RunSpec("one", tmp_path, huge, config.num_segments))


@given(
    st.integers(0, 200),
    st.one_of(st.none(), st.integers(1, 10)),
    st.integers(0, 60),
    st.sampled_from([FrameLayout(33, 3, 16), FrameLayout(17, 2, 16), FrameLayout(33, 0, 16)]),
)
def test_what_is_still_needed_stays(committed, keep, needed, layout):
    kept = retention(committed, keep, needed, layout)
    if keep is None:
        assert kept == KEEP_ALL
        return
    assert kept.media_from == max(0, committed - keep)
    assert 0 <= kept.latents_from <= kept.media_from
    there = layout.first_latent(committed) - layout.first_latent(kept.latents_from)
    assert kept.latents_from == 0 or there >= needed
    if kept.latents_from < kept.media_from:
        fewer = layout.first_latent(committed) - layout.first_latent(kept.latents_from + 1)
        assert fewer < needed, "no more stay than are needed"
