"""Seams: what a viewer would see has a high score, and what nobody sees a low one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.video.encode import OutputOptions, encode
from edit_ray.video.fragments import Part, write_part
from edit_ray.video.seams import LARGEST_SCORE, Appearance, FrameSeries, Joins

JOIN, FRAMES = 16, 32
TIMES = np.arange(FRAMES)


def scene(times, seed: int = 1) -> np.ndarray:
    """Waves that move evenly, at these times: uint8 [F, 64, 96, 3], 0.85 bright in the red channel."""
    random = np.random.default_rng(seed)
    tops = (0.6, 2 * np.pi, 2 * np.pi, 0.45)
    waves = list(zip(*(random.uniform(0, top, 8) for top in tops), strict=True))
    y, x = np.mgrid[0:64, 0:96]
    frames = []
    for time in times:
        wave = np.mean(
            [np.sin((0.3 + k) * (np.cos(a) * x + np.sin(a) * y) + p + (0.4 + w) * time) for k, a, p, w in waves], 0
        )
        frames.append(np.stack([0.85 + 0.1 * wave, 0.75 + 0.1 * np.roll(wave, 5, 1), 0.65 + 0.1 * wave], -1))
    return np.clip(np.array(frames) * 255, 0, 255).round().astype(np.uint8)


def from_join(frames: np.ndarray, change) -> np.ndarray:
    """The frames with those from the join on changed."""
    changed = change(frames[JOIN:].astype(float))
    return np.concatenate([frames[:JOIN], np.clip(changed, 0, 255).round().astype(np.uint8)])


def blurred(frames: np.ndarray) -> np.ndarray:
    around = sum(np.roll(frames, shift, axis) for axis in (1, 2) for shift in (-1, 1))
    return (frames + around) / 5


def seam(frames: np.ndarray):
    return FrameSeries.of(frames).seam(JOIN)


def test_nothing_is_seen_where_nothing_is():
    for seed in range(6):
        assert seam(scene(TIMES, seed)).score < 0.4


REPEATED = np.where(TIMES < JOIN, TIMES, TIMES - 1)
TURNING = np.where(TIMES < JOIN, TIMES, 2 * (JOIN - 1) - TIMES)


@pytest.mark.parametrize(
    ("frames", "expected", "tolerance", "least_score"),
    [
        (lambda: np.concatenate([scene(TIMES)[:JOIN], scene(TIMES, 100)[JOIN:]]), {"jump": 3.1}, 1, 1.5),
        (lambda: scene(REPEATED), {"jump": 0}, 0.03, 4),
        (lambda: scene(TURNING), {"accel": 2.6, "jump": 1}, 0.3, 1),
        (lambda: from_join(scene(TIMES), lambda frames: frames * 1.03), {"color": 6.4}, 0.3, 1.5),
        (lambda: from_join(scene(TIMES), lambda f: blurred(blurred(blurred(f)))), {"sharp": -0.9}, 0.2, 0.7),
    ],
    ids=["a hard cut", "a repeated frame", "motion that turns back", "three percent brighter", "blur"],
)
def test_what_a_viewer_sees_has_a_high_score(frames, expected, tolerance, least_score):
    found = seam(frames())
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, abs=tolerance)
    assert found.score >= least_score


def test_a_steady_trend_of_colour_is_no_step():
    frames = scene(TIMES).astype(float) - 0.8 * TIMES[:, None, None, None]
    assert seam(np.clip(frames, 0, 255).round().astype(np.uint8)).color < 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 255), st.integers(0, 255))
def test_still_and_flat_videos_have_finite_figures(before, after):
    frames = np.full((FRAMES, 8, 8, 3), before, np.uint8)
    frames[JOIN:] = after
    found = seam(frames)
    assert math.isfinite(found.score)
    assert 0 <= found.score <= LARGEST_SCORE
    assert found.score < 1e-9 if before == after else found.score > 1
    assert found.color == pytest.approx(abs(after - before), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_frames_have_a_score_between_nothing_and_the_largest(data):
    count = data.draw(st.integers(6, 20))
    frames = np.frombuffer(data.draw(st.binary(min_size=count * 48, max_size=count * 48)), np.uint8)
    series = FrameSeries.of(frames.reshape(count, 4, 4, 3))
    boundary = data.draw(st.integers(3, count - 3))
    assert 0 <= series.seam(boundary).score <= LARGEST_SCORE
    interior = series.interior_score()
    assert (interior is None) == (count < 16)


@pytest.mark.parametrize("boundary", [0, 2, 30, 32, -1])
def test_a_seam_needs_frames_on_both_sides(boundary):
    with pytest.raises(ValueError, match="fewer than 3 frames on a side"):
        FrameSeries.of(scene(TIMES)).seam(boundary)


def test_a_seam_looks_at_eight_frames_on_each_side():
    far = scene(TIMES)
    far[: JOIN - 8], far[JOIN + 8 :] = 0, 255
    assert seam(far) == seam(scene(TIMES))


def test_the_interior_is_scored_without_the_seam():
    cut = np.concatenate([scene(TIMES)[:8], scene(np.arange(24), 100)])
    assert FrameSeries.of(cut[8:]).interior_score() < 0.3 < FrameSeries.of(cut).seam(8).score


def test_drift_is_what_changed_from_the_first_to_the_last():
    first = Appearance(100, 90, 80, -5.0)
    assert first.drift(first) == (0, 0)
    assert first.drift(Appearance(103, 84, 80, -5.5)) == (6, -0.5)


def written(folder, frames, lengths):
    """Segments of these lengths: their fragments and their frames."""
    parts, of_parts, first = [], [], 0
    for index, count in enumerate(lengths):
        parts.append(Part(f"{index}.m4s", first, count))
        of_parts.append(frames[first : first + count])
        options = OutputOptions(crf=10)
        write_part(folder, parts[-1], encode(of_parts[-1], fps=16, options=options, number=index, first_frame=first))
        first += count
    return parts, of_parts


def test_a_seam_is_measured_in_memory_and_after_a_restart_in_the_files(tmp_path, monkeypatch):
    parts, frames = written(tmp_path, scene(np.arange(60)), [20, 20, 20])
    joins = Joins()
    with monkeypatch.context() as no_files:
        no_files.setattr("edit_ray.video.seams.read_frames", None)
        first, second, third = (
            joins.measure("one", tmp_path, part, before, of_part)
            for part, before, of_part in zip(parts, [None, *parts[:2]], frames, strict=True)
        )
    assert set(first) == {"red", "green", "blue", "sharpness", "interior_score"}
    seams = {f"seam_{name}" for name in ("jump", "accel", "color", "sharp", "score")}
    assert second.keys() - first.keys() == seams
    assert second["seam_score"] < 1.0, "one scene, cut and joined"
    joins.forget("one")
    for again in (Joins(), joins):
        restarted = again.measure("one", tmp_path, parts[2], parts[1], frames[2])
        assert {name: third[name] for name in first} == {name: restarted[name] for name in first}
        assert [restarted[name] for name in seams] == pytest.approx([third[name] for name in seams], abs=0.3)


def test_short_segments_have_no_seam(tmp_path):
    parts, frames = written(tmp_path, scene(np.arange(4)), [2, 2])
    found = Joins().measure("one", tmp_path, parts[1], parts[0], frames[1])
    assert set(found) == {"red", "green", "blue", "sharpness"}
