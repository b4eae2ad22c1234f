"""A few of the random histories of `tests/chaos/storm.py`; `make proof` lives many more."""

import pytest

from edit_ray.runs.run_plan import Edit, Take
from tests.chaos.storm import storm
from tests.chaos.undisturbed import Shape, Undisturbed, save_model, tells, told


def test_whatever_happens_to_a_run_every_file_is_what_it_would_be(tmp_path):
    counts = storm(tmp_path, range(3), long_share=0.0)
    assert counts["history"] == 3
    assert sum(counts[what] for what in ("cancel", "resume", "extend", "reroll")) >= 3, "enough has happened"


def test_however_a_run_is_steered_every_file_is_that_of_a_run_that_was_told_so_from_the_start(tmp_path):
    counts = storm(tmp_path, range(2), long_share=0.0, steered=True)
    assert counts["history"] == 2
    assert sum(counts[what] for what in ("edit", "pause", "branch")) >= 3, "enough has happened"


def test_whatever_happens_to_a_causal_run_every_file_is_what_it_would_be(tmp_path):
    counts = storm(tmp_path, range(3), causal=True)
    assert counts["history"] == 3


def test_what_no_storyboard_can_say_of_a_causal_run_is_said_in_edits(tmp_path):
    config = Shape(0, 0, False, 5, "commit", "cut").config(save_model(tmp_path / "model", causal=True), 4)
    changes = (Edit(2, seed=3), Take(1, 0, 77), Edit(2, prompt="a red square"))
    assert not tells(config, changes[:1], changes[1:])
    undisturbed = Undisturbed(tmp_path, tmp_path / "model")
    try:
        steered = undisturbed.steered(config, changes)
        in_the_end = undisturbed.steered(told(config, 4, changes), ())
        for index in range(4):
            latents = steered.latents(index, 1), in_the_end.latents(index)
            assert latents[0].read_bytes() == latents[1].read_bytes(), index
    finally:
        undisturbed.end()


@pytest.mark.slow
def test_storm_of_causal_runs(tmp_path):
    counts = storm(tmp_path, range(100, 10_000), patience_s=120.0, causal=True)
    print(dict(counts))
    assert counts["history"] >= 20


@pytest.mark.slow
@pytest.mark.parametrize("steered", [False, True])
def test_storm(tmp_path, steered):
    """The long form; a run of 2,000 histories takes an hour or two: `python -m tests.chaos.storm FOLDER`."""
    counts = storm(tmp_path, range(100, 10_000), patience_s=240.0, steered=steered)
    print(dict(counts))
    assert counts["history"] >= 20
