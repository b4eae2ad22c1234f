"""The experiment that removes guards (tests/chaos/guards.py) finds every one of them in the package."""

from tests.chaos.guards import guards, syncs


def test_every_guard_that_the_experiment_removes_is_there_once() -> None:
    assert len({guard.name for guard in guards()}) == 40
    assert len(syncs()) == 13
