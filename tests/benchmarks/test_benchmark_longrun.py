"""The long run at 1/1024 of its bytes: the same table, as bounds and entries shrink alike."""

from fractions import Fraction

import pytest
from PIL import Image

from benchmarks.longrun_report import Row, draw, summary, table
from benchmarks.store_process import StoreProcess
from benchmarks.tiered_longrun import ENTRIES, Task, in_one_process, through_the_actor
from tests.store_here import StoreHere

KIB = 1024
BOUNDS = {"device": 384 * KIB, "host": 768 * KIB, "disk": 2304 * KIB}


def task_in(folder, generations):
    return Task(folder, generations, Fraction(1, 1024), allow_tmpfs=True)


def row(generation, resident=100, evictions=0, **tiers):
    return Row(generation, tiers, 0, 0, evictions, 0.0, 0.0, resident)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    return in_one_process(task_in(tmp_path_factory.mktemp("disk"), 40))


def test_the_tiers_fill_as_the_table_says(figures):
    assert figures["bounds"] == BOUNDS
    told = figures["summary"]
    assert told["engaged_from"] == {"device": 1, "host": 3, "disk": 7}
    assert told["full_from"] == {"device": 2, "host": 6, "disk": 18}
    assert told["evicts_from"] == 19
    assert told["flat_from"] == 18
    assert told["most_bytes"] == 3456 * KIB
    rows = {row["generation"]: list(row["tier_bytes"].values()) for row in figures["rows"]}
    of_the_table = {2: (384, 0, 0), 4: (384, 384, 0), 7: (384, 768, 192), 12: (384, 768, 1152), 19: (384, 768, 2304)}
    assert {generation: tuple(size // KIB for size in rows[generation]) for generation in of_the_table} == of_the_table


def test_what_is_held_is_what_was_stored_and_the_rest_is_a_miss(figures):
    held = sum(ENTRIES.values())
    assert figures["read"] == {"equal": held, "absent": 40 * 16 - held, "wrong": 0}
    assert figures["rows"][-1]["evictions"] == 40 * 16 - held
    assert figures["left_behind"] == []


@pytest.mark.parametrize("make_store", [StoreHere, pytest.param(StoreProcess, marks=pytest.mark.slow)])
def test_the_path_of_a_run_reads_what_it_wrote_and_leaves_nothing(tmp_path, make_store):
    generations = 8
    figures = through_the_actor(task_in(tmp_path, generations), make_store)
    read_by_each = [16 * min(segment, 4) for segment in range(generations)]
    assert figures["read"] == {"equal": sum(read_by_each), "absent": 0, "wrong": 0}
    assert figures["left_behind"] == []
    assert not any(figures["faults"].values())
    assert figures["summary"]["full_from"]["host"] == 3  # two generations, and the places of a third that comes
    assert figures["summary"]["engaged_from"]["disk"] <= 6
    for tier in ("host", "disk"):
        assert figures["peak_bytes"][tier] <= BOUNDS[tier]
    # Whatever is written goes to disk at once. Four generations are wanted later; a fifth would be, were the last
    # segment made again.
    assert [row["file_bytes"] // (192 * KIB) for row in figures["rows"]] == [1, 2, 3, 4, 5, 5, 5, 5]


def test_summary_says_from_when_to_the_end_and_compares_what_is_resident_from_generation_30_on():
    rows = [row(1, host=4, disk=0), row(2, host=8, disk=0), row(3, host=4, disk=0), row(4, host=8, disk=4)]
    told = summary(rows, {"host": 8, "disk": 8})
    assert told["full_from"] == {"host": 4, "disk": None}
    assert told["engaged_from"] == {"host": 1, "disk": 4}
    assert (told["evicts_from"], told["flat_from"], told["resident_spread"]) == (None, 4, None)
    rows = [row(number, resident=300 if number < 30 else 100 + number % 3, host=1) for number in range(1, 61)]
    assert summary(rows, {"host": 1})["resident_spread"] == pytest.approx(0.02)


def test_the_rows_are_drawn(tmp_path, figures):
    rows = [Row(**row) for row in figures["rows"]]
    assert table([row(number, host=1) for number in range(1, 201)]).row_count < 40, "its beginning and its end"
    draw(rows[:4], tmp_path, "a heading")
    with Image.open(tmp_path / "tiers.gif") as film:
        assert film.n_frames == 4


@pytest.mark.parametrize("scale", ["1/2048", "3/4096", "0"])
def test_a_scale_without_whole_pages_is_refused(tmp_path, scale):
    with pytest.raises(ValueError, match="it must be a multiple of 1/1024"):
        Task(tmp_path, scale=Fraction(scale))
