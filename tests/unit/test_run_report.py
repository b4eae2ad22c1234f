"""The page of a run's report: what it draws is where it says, and it needs nothing from anywhere."""

import base64
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edit_ray.page.drawing import HEIGHT_PX, Bar, Curve, chart, data_url, nice_step, sampled, timeline
from edit_ray.page.run_page import bars_of, render_run
from edit_ray.page.run_summary import duration, headline, spans_of
from edit_ray.runs.manifest import SegmentRecord
from tests.unit.test_cache_report import RECORD, Page

few = settings(max_examples=60, deadline=None)

FULL = {
    **{f"{work}_s": 0.5 for work in ("denoise", "decode", "encode", "complete", "publish")},
    **{"red": 100.0, "green": 90.0, "blue": 80.0, "sharpness": -5.0, "interior_score": 0.3, "seam_score": 0.6},
    **{"seam_jump": 1.1, "seam_accel": 1.2, "seam_color": 2.4, "seam_sharp": -0.1},
    **{"units_computed": 30, "units_skipped": 10, "entries_read": 4, "entries_written": 2},
    **{"host_bytes": 2**20, "disk_bytes": 2**21, "prefetch_useful": 4, "prefetch_late": 0},
}
NASTY = '</pre></title><script src="http://x">&"'


def bare(index: int, prompt: str = "a red circle", **statistics) -> SegmentRecord:
    return SegmentRecord(index, 0, prompt, 7, 24 * index, 24, "", "", statistics)


def segment(index: int, prompt: str = "a red circle", **changes) -> SegmentRecord:
    begins = {f"{work}_at": 1000.0 + 2 * index for work in ("denoise", "decode", "encode", "complete", "publish")}
    return bare(index, prompt, **(FULL | begins | changes))


def percent(value):
    """A number of percent, which must be marked as such."""
    assert value.endswith("%")
    return float(value.removesuffix("%"))


bars = st.builds(
    Bar,
    lane=st.sampled_from(["one", "two", "<b>"]),
    start_s=st.floats(0, 1e5),
    length_s=st.floats(0, 1e4),
    colour=st.sampled_from(["blue", "grey"]),
    label=st.sampled_from(["0", "1999", "<i>"]),
    tooltip=st.text(max_size=10),
)


@few
@given(st.lists(bars, max_size=20))
def test_a_bar_is_where_its_time_and_lane_are(bars):
    page = Page(timeline(bars, "<title>"))
    drawn = page.all("rect")
    assert len(drawn) == len(bars)
    wide = [float(r["width"].removesuffix("%")) if r["width"].endswith("%") else 0 for r in drawn]
    assert all(percent(r["x"]) >= 0 and percent(r["x"]) + w <= 100.01 for r, w in zip(drawn, wide, strict=True))
    assert [r["width"] for r, w in zip(drawn, wide, strict=True) if not w] == ["3"] * wide.count(0)
    rows = list(dict.fromkeys(bar.lane for bar in bars))
    assert [float(r["y"]) for r in drawn] == [40 * rows.index(bar.lane) + 18 for bar in bars]
    for one, two, left, right in zip(bars, bars[1:], drawn, drawn[1:], strict=False):
        if one.start_s < two.start_s:
            assert percent(left["x"]) <= percent(right["x"])


@given(st.floats(1e-6, 1e9))
def test_a_step_is_a_round_number_and_there_are_not_too_many(length):
    step = nice_step(length)
    assert 4 <= length / step <= 20
    assert float(f"{step:.0e}") == pytest.approx(step)
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9)) in (1, 2, 5)


@few
@given(st.lists(st.none() | st.floats(0, 1e6), max_size=80), st.sets(st.integers(1, 79), max_size=5))
def test_a_line_has_a_point_for_every_value_and_no_piece_of_it_crosses_a_break(values, breaks):
    page = Page(chart([Curve("it", "blue", values)], "<unit>", "<title>", breaks=breaks))
    stretches = [
        [tuple(map(float, point.split(","))) for point in line["points"].split()] for line in page.all("polyline")
    ]
    points = [point for stretch in stretches for point in stretch]
    assert len(points) == sum(value is not None for value in values)
    assert all(0 <= x <= 1000 and 15.9 <= y <= 136.1 for x, y in points)
    borders = [10 * percent(line["x1"]) for line in page.all("line") if line["class"] == "change"]
    assert len(borders) == len(breaks)
    crossed = [x for x in borders for stretch in stretches if stretch and stretch[0][0] < x < stretch[-1][0]]
    assert crossed == []
    joined = [x for x in borders if any(at[0] < x for at in points) and any(at[0] > x for at in points)]
    assert joined or len(stretches) == 1, "without a break between two points a line is one piece"
    assert "<unit>" in page.text


@given(st.integers(0, 500), st.integers(2, 50))
def test_a_sample_has_both_ends_and_no_more_than_allowed(count, most):
    chosen = sampled(count, most)
    assert len(chosen) == min(count, most)
    assert chosen == sorted(set(chosen))
    assert not count or (chosen[0], chosen[-1]) == (0, count - 1)


def test_the_work_of_all_actors_begins_at_zero():
    drawn = bars_of([segment(0), segment(1, denoise_at=1001.0, denoise_s=3.0)])
    assert {bar.lane for bar in drawn} == {
        *("GPU actor, denoising", "GPU actor, decoding", "encoder process", "CacheStore actor", "segment scheduler"),
    }
    assert len(drawn) == 10
    assert min(bar.start_s for bar in drawn) == 0
    assert [(bar.start_s, bar.length_s) for bar in drawn if "denois" in bar.lane] == [(0, 0.5), (1, 3)]
    assert bars_of([bare(0, denoise_s=3.0)]) == [], "an older run has no times of day"


def test_what_was_asked_ahead_or_begun_again_is_marked():
    events = [
        {"event": "segment_begun", "wall": 1000.0, "segment": 0, "attempt": 0},
        {"event": "prepare_asked", "wall": 1000.5, "segment": 1},
        {"event": "segment_begun", "wall": 1003.0, "segment": 1, "attempt": 1},
        {"event": "segment_made", "wall": 1004.0, "segment": 1, "attempt": 1},
        {"event": "prepare_asked", "wall": 1.0, "segment": 1},
        {"event": "prepare_asked", "wall": "then"},
    ]
    marks = bars_of([segment(0), segment(1)], events)[10:]
    assert [(bar.lane, bar.start_s, bar.tooltip) for bar in marks] == [
        ("CacheStore actor", 0.5, "segment 1 is asked for"),
        ("GPU actor, denoising", 3.0, "segment 1: begun again, attempt 2"),
    ]
    assert bars_of([], events) == []


def test_a_page_shows_everything_and_needs_nothing_else():
    picture = data_url(np.zeros((32, 48, 3), np.uint8))
    records = {f"segment {index}": RECORD for index in range(2)}
    segments = [segment(0), segment(1, red=110.0, sharpness=-6.0)]
    pictures = [(0, [picture]), (1, [picture])]
    text = render_run("one", "done", "sampling: {}", segments, records=records, pictures=pictures)
    page = Page(text)
    assert [attrs["src"] for attrs in page.all("img")] == [picture, picture]
    assert [attrs["href"] for _, attrs in page.elements if "href" in attrs] == ["data:,"], "the icon, which is none"
    assert not any(name in attrs for _, attrs in page.elements for name in ("onload", "xlink:href"))
    assert page.all("script") == []
    assert "http" not in text
    assert "url(" not in text
    headings = ["Film strip", "Prompts", "Legend", "Seams and drift", "Who worked when", "Stored for reuse", "Segments"]
    at = [page.text.rindex(heading) for heading in [*headings, "Settings"]]
    assert at == sorted(at)
    assert page.text.index("Made in") < page.text.index("Film strip"), "the figures are first"
    assert "Drift: colour by 10.0 of 255 grey levels, sharpness by a factor of 0.50" in page.text
    assert "4 residuals written, 8 read. Prefetch: useful 4, late 0." in page.text
    assert "25%" in page.text
    assert "sampling: {}" in page.text


def test_there_is_one_legend_and_every_segment_folds():
    records = {f"segment {index}": RECORD for index in range(3)}
    page = Page(render_run("one", "done", "", [segment(index) for index in range(3)], records=records))
    assert [attrs["class"] for attrs in page.all("dl")].count("legend panel") == 1
    assert len(page.all("details")) == len(page.all("summary")) == 3 + 1, "the settings fold as well"
    assert not any("open" in attrs for attrs in page.all("details"))
    assert page.text.count("What the cache decided") == 3


def test_a_page_leaves_out_what_is_not_known():
    page = Page(render_run("one", "running", "", [bare(0, "a prompt")], records={}))
    unknown = ("Made in", "Who worked when", "Seams", "Drift", "Stored", "What the cache", "Legend", "Film strip")
    assert [heading in page.text for heading in unknown] == [False] * len(unknown)
    assert "a prompt" in page.text


def test_texts_of_the_users_are_text():
    text = render_run(NASTY, NASTY, NASTY, [segment(0, NASTY)], records={NASTY: RECORD})
    page = Page(text)
    assert page.all("script") == []
    # title, heading, state, settings, the prompt in its span and its segment, the record's heading
    assert page.text.count(NASTY) == 7


def test_many_records_are_sampled_and_that_is_said():
    records = {f"segment {index}": RECORD for index in range(100)}
    page = Page(render_run("one", "done", "", [segment(index) for index in range(100)], records=records))
    assert "What the cache decided of 40 of 100 segments" in page.text
    assert page.text.count("cond, with the prompt") == 40


def test_a_record_of_an_earlier_take_has_a_place_of_its_own():
    records = {"segment 0": RECORD, "segment 0, take 1": RECORD}
    again = SegmentRecord(0, 1, "a prompt", 7, 0, 24, "", "", {})
    page = Page(render_run("one", "done", "", [again], records=records))
    assert page.text.count("What the cache decided") == 1
    assert len(page.all("details")) == 3
    assert "segment 0" in page.text


def test_drift_is_told_apart_from_a_change_of_the_prompt():
    looks = [("one", 100.0), ("one", 103.0), ("two", 180.0), ("two", 178.0), ("three", 20.0)]
    segments = [segment(index, prompt, red=red) for index, (prompt, red) in enumerate(looks)]
    spans = spans_of(segments)
    assert [[s.index for s in span.segments] for span in spans] == [[0, 1], [2, 3], [4]]
    assert [span.drift and span.drift.color for span in spans] == [3.0, 2.0, None]
    assert [span.change and span.change.color for span in spans] == [None, 77.0, 158.0]
    page = Page(render_run("one", "done", "", segments, records={}))
    assert "3.0 of 255" in page.text, "the headline is the largest drift, and no change"
    assert [percent(line["x1"]) for line in page.all("line") if line["class"] == "change"] == [43.0, 81.0] * 2
    assert len(page.all("polyline")) == 5 * 3 + 2, "two of seams and three of colours in three pieces; two of tiers"
    assert page.text.count("new prompt") == 2


def test_the_headline_speaks_of_seams_where_nothing_was_to_change():
    scores = [("one", None), ("one", 0.25), ("two", 7.0), ("two", 0.75)]
    segments = [
        bare(index, prompt, interior_score=0.3, **({} if score is None else {"seam_score": score}))
        for index, (prompt, score) in enumerate(scores)
    ]
    (video, seams) = headline(segments, 6, 16.0)
    assert (video.value, video.note) == ("6.0 s", "96 frames, 4 of 6 segments")
    assert (seams.value, seams.note) == ("0.50", "0 is invisible; worst 0.75, inside segments 0.30")
    again = [{"event": "segment_begun", "attempt": attempt} for attempt in (0, 1, 2, None)]
    assert headline([bare(0)], None, 16.0, again)[-1].value == "2"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (99.94, "99.9 s"), (99.96, "1 min 40 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_a_duration_is_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_a_picture_is_small_and_keeps_its_shape():
    frame = np.zeros((480, 832, 3), np.uint8)
    frame[:, 416:] = 255
    image = Image.open(io.BytesIO(base64.b64decode(data_url(frame).partition(",")[2])))
    assert image.size == (166, HEIGHT_PX)
    assert image.getpixel((10, 48)) < (20, 20, 20)
    assert image.getpixel((160, 48)) > (235, 235, 235)
