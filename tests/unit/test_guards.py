"""The experiment that removes guards (tests/chaos/guards.py) finds every one of them in the package."""

from tests.chaos.guards import guards, syncs


def test_every_guard_that_the_experiment_removes_is_there_once() -> None:
    found = [guard.name for guard in (*syncs(), *guards())]
    assert len(found) == len(set(found)) > 50
