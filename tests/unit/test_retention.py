"""What a run keeps (`output.keep_segments`) is all that it may still need; and what it will still write."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.actors.folder_state import shortage_after, shortage_before
from edit_ray.actors.messages import RunSpec
from edit_ray.config import Config
from edit_ray.runs.manifest import Extended, HardwareChanged, Manifest, Opened, Rerolled
from edit_ray.runs.retention import KEEP_ALL, MARGIN_BYTES, Retention, retention, shortage
from edit_ray.runs.run_plan import FrameLayout, Take
from edit_ray.tiers.reuse_plan import make_reuse_plan
from tests.unit.test_manifest import BEGUN, HARDWARE, LINES, fold, record

SEGMENTS = 9
LAYOUTS = (FrameLayout(5, 1, 16), FrameLayout(9, 1, 16), FrameLayout(9, 2, 16), FrameLayout(81, 1, 16))


def plan_of(segments, window, **changes):
    sizes = {"experts": ["transformer"] * 3, "unit_bytes": {"transformer": [8]}} | changes
    return make_reuse_plan("run", segments, window=window, warm_steps=2, **sizes)


def made_again_for(plan, segment):
    """The segments that have to be made again before this one where every residual is lost."""
    of = {read.key.segment for read in plan.segments[segment].reads}
    return of.union(*(made_again_for(plan, earlier) for earlier in of))


def latents_for(segment, needed, layout):
    """The segments among whose latents are the last `needed` before a segment, counted one by one."""
    owners = [k for k in range(segment) for _ in range(layout.first_latent(k + 1) - layout.first_latent(k))]
    return set(owners[-needed:]) if needed else set()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_segment_can_be_made_from_what_is_kept_even_where_all_residuals_are_lost(layout):
    for window, planned_from in product(range(5), range(0, SEGMENTS, 2)):
        plan = plan_of(SEGMENTS - planned_from, window)
        for needed, keep, committed in product((0, 1, 3, 25), (1, 3), range(planned_from, SEGMENTS)):
            kept = retention(committed, keep, needed, layout, window, planned_from)
            assert kept.latents_from <= kept.media_from == max(0, committed - keep)
            for segment in range(committed, SEGMENTS):
                again = {planned_from + k for k in made_again_for(plan, segment - planned_from)}
                used = again.union(*(latents_for(k, needed, layout) for k in {committed} | again if k <= committed))
                assert all(k >= kept.latents_from for k in used if k < committed), (window, planned_from, committed)


@given(st.lists(st.sets(st.integers(0, 30), max_size=3), min_size=1, max_size=20), st.integers(1, 4), st.integers(0, 9))
def test_what_later_segments_see_is_kept_until_they_no_longer_do(seen, keep, needed):
    """Of each number of committed segments those that the next one sees; what was seen once may be seen no more."""
    files, before, layout = set(), KEEP_ALL, FrameLayout(9, 0, 16, causal=True)
    for committed, pinned in enumerate(seen, start=1):
        pinned = {index for index in pinned if index in files or index == committed - 1}
        files.add(committed - 1)
        after = retention(committed, keep, needed, layout, seen=pinned)
        files -= {*after.latents_since(before)}
        assert files == pinned | {*range(after.latents_from, committed)}
        assert files == {*range(committed)} - {*after.latents_since(KEEP_ALL)} or before.kept
        before = after
    assert Retention(0, 5, (1, 3)).latents_since(KEEP_ALL) == [0, 2, 4]


@given(
    st.integers(1, 12),
    st.integers(0, 8),
    st.integers(0, 5),
    st.integers(0, 40).map(lambda size: size * 8),
    st.integers(1, 3),
)
def test_more_segments_change_nothing_in_what_the_first_ones_reuse(segments, more, window, budget, units):
    """So a run that is extended goes on with its plan, wherever it stands."""
    short, long = (
        plan_of(count, window, budget=budget, unit_bytes={"transformer": [8] * units})
        for count in (segments, segments + more)
    )
    assert [one.reads for one in short.segments] == [one.reads for one in long.segments[:segments]]


def test_a_plan_is_named_by_how_often_it_was_made_anew():
    there = fold(LINES[:4])
    opened = Opened(there.incarnation + 1, HARDWARE)
    went_on = there.after(opened)
    assert (went_on.replanned, went_on.planned_from) == (there.replanned, there.planned_from)
    committed, incarnation = len(there.segments), opened.incarnation
    extended = went_on.after(Extended(incarnation, 9, replans=False))
    assert (extended.replanned, extended.planned_from, extended.num_segments) == (0, 0, 9)
    for line, start in (
        (Extended(incarnation, 9), committed),  # as earlier versions wrote it
        (Rerolled(incarnation, Take(1, 1, 7)), 1),
        (HardwareChanged(incarnation, {"device": "a sundial"}, committed + 1), committed + 1),
    ):
        after = went_on.after(line)
        assert (after.replanned, after.planned_from) == (1, start)
    elsewhere = there.after(Opened(incarnation, {"device": "a sundial"}, replans=True))
    assert (elsewhere.replanned, elsewhere.planned_from) == (1, committed)
    with pytest.raises(ValueError, match="is committed"):
        went_on.after(HardwareChanged(incarnation, HARDWARE, committed - 1))
    assert Manifest.start(BEGUN).replanned == 0


@pytest.mark.parametrize(
    ("segments", "keep", "needed"), [(4, None, 4 * 130), (4, 2, 3 * 130), (0, None, 0)], ids=["all", "two and one", "0"]
)
def test_more_segments_take_more_until_old_ones_go(segments, keep, needed):
    assert shortage(segments, 100, 10, keep, needed + MARGIN_BYTES) is None
    assert f"about {needed} bytes of disk" in shortage(segments, 100, 10, keep, needed + MARGIN_BYTES - 1)


def test_a_shortage_is_one_sentence():
    said = shortage(1, 101, 0, None, 100 + MARGIN_BYTES)
    assert "101 bytes of disk, 64 MiB besides must stay free, and 64 MiB are free; free some" in said
    assert "takes about 2,048 MiB of disk" in shortage(1, 2**31, 0, None, 0)
    assert "and 0 bytes are free" in shortage(1, 2**31, 0, None, 0)
    assert not any("about 0 " in shortage(1, 2**power, 0, None, 0) for power in range(40))


@pytest.mark.parametrize("video", [{"num_segments": 4}, {"num_segments": None}])
def test_the_file_system_is_asked(tmp_path, video):
    config = Config.model_validate({"video": video, "prompt_segments": [{"segment": 0, "prompt": "a red circle"}]})
    spec = RunSpec("one", tmp_path / "not" / "yet", config, config.num_segments)
    assert shortage_before(spec) is None
    assert shortage_after(spec, (record(0),)) is None, "of that one nothing was measured"
    grows = [replace(record(k), statistics={"media_bytes": 2.0**40 * k}) for k in range(20)]
    asked = f"{3 * 19 * 2**20 * (100 if video['num_segments'] is None else 4 - 20):,} MiB of disk"
    assert (asked in (shortage_after(spec, grows) or "")) == (video["num_segments"] is None)
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
