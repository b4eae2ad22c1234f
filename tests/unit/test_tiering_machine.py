"""The planner in random orders of everything that can happen; and five broken planners that this must find."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from edit_ray.cache.tiering import serving
from edit_ray.cache.tiering.account import Account
from edit_ray.cache.tiering.events import Free
from edit_ray.cache.tiering.planner import TierPlanner
from edit_ray.cache.tiering.residency import Residency
from tests.unit.tiering_machine import EVENTS, AnyOrder

SHORT = settings(
    max_examples=500,
    stateful_step_count=14,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def run(planner, **changes):
    """The histories of one planner; how often each event was in them."""
    machine = type("Machine", (AnyOrder,), {"Planner": planner, "fired": Counter()})
    run_state_machine_as_test(machine, settings=settings(SHORT, **changes))
    return machine.fired


def check_all_fired(fired):
    print({name: fired[name] for name in EVENTS})
    assert [name for name in EVENTS if not fired[name]] == []


def test_the_planner_holds_in_any_order():
    check_all_fired(run(TierPlanner))


def test_it_holds_if_only_the_first_in_line_has_room_made_for_it(monkeypatch):
    monkeypatch.setattr(serving, "_WAITING", 1)
    assert run(TierPlanner, max_examples=100)["complete"] > 0


@pytest.mark.slow
def test_the_planner_holds_in_many_more_orders():
    check_all_fired(run(TierPlanner, max_examples=50_000, stateful_step_count=30, derandomize=False))


class DoubleCommit(TierPlanner):
    """A request that has completed can complete again."""

    def _complete(self, number, written):
        request = self._serving.granted.get(number)
        super()._complete(number, written)
        if request is not None:
            self._serving.granted[number] = request


class OneEntryMore(TierPlanner):
    """A tier takes one small entry more than its budget allows."""

    class Generous(Account):
        @property
        def free(self):
            return super().free + 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tiers.accounts[0].__class__ = self.Generous


class StaleCompletionAccepted(TierPlanner):
    """A report of a move that ended long ago is taken for one of a move in flight."""

    def _moved(self, ticket, failure=None):
        known = self.tiers.ways
        super()._moved(ticket if ticket in known else next(iter(known), ticket), failure)


class LostReservation(TierPlanner):
    """What was reserved for a write that is given up stays reserved."""

    class Forgetful(Residency):
        def release(self, place, granted=True):
            if granted:
                self.out.append(Free(place))

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tiers.__class__ = self.Forgetful


class EvictsWhatIsInFlight(TierPlanner):
    """An entry that is being moved may go to make room."""

    class Ruthless(Residency):
        def make_room(self, level, wanted):
            super().make_room(level, wanted)
            for entry in [way.entry for way in self.ways.values() if way.entry.level == level]:
                if self.accounts[level].free < wanted and entry.pins == 0 and not entry.doomed:
                    entry.move, ticket = None, entry.move
                    self.drop(entry, "evicted")
                    entry.move = ticket

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tiers.__class__ = self.Ruthless


@pytest.mark.parametrize(
    "broken", [DoubleCommit, OneEntryMore, StaleCompletionAccepted, LostReservation, EvictsWhatIsInFlight]
)
def test_a_broken_planner_is_found(broken):
    # Not the harness's own mistakes: each is an assertion of the model or the planner, or a place that is not there.
    with pytest.raises((AssertionError, KeyError)):
        run(broken, max_examples=400, phases=[Phase.generate], report_multiple_bugs=False)
