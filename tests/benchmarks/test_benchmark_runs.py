"""What the benchmarks of whole runs make of their figures; they themselves are run by hand, on a quiet machine."""

import pytest

from benchmarks.endurance import drift, of_pairs, summary, windows
from benchmarks.overlap import compare


def test_windows_are_whole_and_begin_after_the_start():
    values = [(index, 1000.0 if index < 100 else float(index // 100)) for index in range(450)]
    assert windows(values, 450) == [1.0, 2.0, 3.0]


def test_a_leak_is_a_drift_and_one_odd_window_is_none():
    assert drift([100.0, 101.0, 102.0, 103.0]) == pytest.approx(0.03)
    assert drift([100.0, 100.0, 140.0, 100.0, 100.0]) == 0
    assert drift([100.0]) == 0


def test_what_grows_is_not_flat_and_logs_are_held_to_nothing():
    leaks = [(index, 100 + 0.02 * index) for index in range(1000)]
    even = [(index, 50.0) for index in range(1000)]
    told = summary({"one: resident MB": leaks, "two: resident MB": even, "logs kB": leaks}, 1000)
    assert {name: row["flat"] for name, row in told.items()} == {
        "one: resident MB": False,
        "two: resident MB": True,
        "logs kB": None,
    }


def test_commits_are_compared_in_pairs_whatever_the_machine_does():
    slower_and_slower = [(early, 1.04 * early) for early in (5.0, 7.0, 12.0)]
    assert of_pairs(slower_and_slower)["drift"] == pytest.approx(0.04)
    assert of_pairs(slower_and_slower)["flat"]
    assert not of_pairs([(early, 1.06 * early) for early in (5.0, 7.0, 12.0)])["flat"]


def test_a_run_that_hides_all_but_its_last_decoding_has_the_ratio_one():
    whole = [
        {"denoise_at": 10.0 + 4 * k, "denoise_s": 4.0, "decode_at": 14.0 + 4 * k, "decode_s": 1.0} for k in range(3)
    ]
    figures = compare(whole, [4.0, 4.0, 4.0])
    assert figures["ratio"] == 1
    assert figures["ratio_if_nothing_were_hidden"] == pytest.approx(15 / 13)
