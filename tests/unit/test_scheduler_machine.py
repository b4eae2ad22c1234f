"""The segment scheduler in random orders of everything that can happen; and broken ones that this must find."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from edit_ray.runs import scheduler
from edit_ray.runs.events import CloseRun
from edit_ray.runs.scheduler import ScheduledRun, SegmentScheduler
from tests.unit import steering_machine
from tests.unit.scheduler_machine import FIRED, AnyOrder
from tests.unit.steering_machine import AnySteering

SHORT = settings(
    max_examples=250,
    stateful_step_count=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def run(broken, machine=AnyOrder, **changes):
    """The histories of one scheduler; how often each event and each transition was in them."""
    machine = type("Machine", (machine,), {"Scheduler": broken, "fired": Counter()})
    run_state_machine_as_test(machine, settings=settings(SHORT, **changes))
    return machine.fired


def check_all_fired(fired, names=FIRED):
    for name, times in sorted(fired.items()):
        print(f"{times:8} {name}")
    assert [name for name in names if not fired[name]] == []


def test_the_scheduler_holds_in_any_order():
    check_all_fired(run(SegmentScheduler))


@pytest.mark.slow
def test_the_scheduler_holds_in_many_more_orders():
    check_all_fired(run(SegmentScheduler, max_examples=50_000, stateful_step_count=40, derandomize=False))


def test_the_scheduler_holds_however_it_is_steered():
    check_all_fired(run(SegmentScheduler, AnySteering, max_examples=150), steering_machine.FIRED)


@pytest.mark.slow
def test_the_scheduler_holds_in_5000_orders_of_steering():
    fired = run(SegmentScheduler, AnySteering, max_examples=5000, stateful_step_count=50, derandomize=False)
    check_all_fired(fired, steering_machine.FIRED)


class TakesLateReports(SegmentScheduler):
    """A report of an earlier attempt, or of an earlier life of the run, is taken for the one that is waited for."""

    def _in_flight(self, work):
        run = self._runs.get(work.run_id)
        return run is not None and work.stage in run.in_flight


class ForgetsTheLead(SegmentScheduler):
    """Segments are denoised as far ahead as there are any."""

    class Run(ScheduledRun):
        def _may_denoise(self):
            plan = self.plan
            return plan.num_segments is None or self.made["denoise"] < plan.num_segments


class NeverGivesUp(SegmentScheduler):
    """What fails is tried again for ever."""

    class Run(ScheduledRun):
        def failed(self, stage, error, kind):
            super().failed(stage, error, kind)


class TakesDeathsForFailures(SegmentScheduler):
    """A segment fails because an actor has died."""

    class Run(ScheduledRun):
        def failed(self, stage, error, kind):
            return super().failed(stage, error, "error" if kind == "death" else kind)


class NeverTiresOfDeaths(SegmentScheduler):
    """What kills its actor each time is tried again for ever."""

    class Run(ScheduledRun):
        def failed(self, stage, error, kind):
            why = super().failed(stage, error, kind)
            return None if kind == "death" else why


class HandsOutWhatIsLacking(SegmentScheduler):
    """A GPU actor that found no place is given to a run again."""

    def _failed(self, work, error, kind):
        said = super()._failed(work, error, kind)
        self._lacking.clear()
        return said


class FailsWithoutAPlace(SegmentScheduler):
    """A GPU actor without a place is tried again, although another one has a place."""

    def _others_have_places(self, worker):
        return False


class WorksAfterTheEnd(SegmentScheduler):
    """A run that is stopped ends at once, with work still in flight."""

    def _close_if_still(self, run):
        del self._runs[run.plan.run_id]
        return [CloseRun(run.plan.run_id, run.end, run.error, run.worker), *self._advance()]


class SharesAGpuActor(SegmentScheduler):
    """A GPU actor is given to a second run."""

    def _taken(self, but=None):
        return set()


class LeavesRunsWaiting(SegmentScheduler):
    """When a run has ended nobody looks for the next one."""

    def _close_if_still(self, run):
        return super()._close_if_still(run)[:1]


class CommitsBeforeTheMediaAreWhole(SegmentScheduler):
    """A segment that is decoded counts as encoded."""

    class Run(ScheduledRun):
        def done(self, stage):
            super().done(stage)
            if stage == "decode":
                self.made["encode"] = self.made["decode"]


class ForgetsWhatWasCommitted(SegmentScheduler):
    """A run that goes on begins with its first segment."""

    class Run(ScheduledRun):
        def __init__(self, plan, made, worker):
            super().__init__(plan, dict.fromkeys(made, 0), worker)


@pytest.mark.parametrize(
    "broken",
    [
        TakesLateReports,
        ForgetsTheLead,
        NeverGivesUp,
        TakesDeathsForFailures,
        NeverTiresOfDeaths,
        HandsOutWhatIsLacking,
        FailsWithoutAPlace,
        WorksAfterTheEnd,
        SharesAGpuActor,
        LeavesRunsWaiting,
        CommitsBeforeTheMediaAreWhole,
        ForgetsWhatWasCommitted,
    ],
)
def test_a_broken_scheduler_is_found(broken, monkeypatch):
    monkeypatch.setattr(scheduler, "ScheduledRun", getattr(broken, "Run", ScheduledRun))
    # Not the harness's own mistakes: each is an assertion of the model.
    with pytest.raises(AssertionError):
        run(broken, max_examples=400, phases=[Phase.generate], report_multiple_bugs=False)


class EditsWhatHasBegun(SegmentScheduler):
    """A segment that is being denoised, and has no latents yet, is said not to have begun."""

    def begun(self, run_id):
        run = self._runs.get(run_id)
        return None if run is None or run.state == "stopping" else run.made["denoise"]


class BeginsWhileHeld(SegmentScheduler):
    """A pause holds nothing."""

    def _steer(self, run_id, paused, approved):
        return super()._steer(run_id, False, approved)


class ForgetsAPause(SegmentScheduler):
    """A run that was paused begins again with the next segment scheduler."""

    def _submit(self, submitted):
        return super()._submit(replace(submitted, paused=False))


class NeedsNoYes(SegmentScheduler):
    """A run does not wait to be approved."""

    class Run(ScheduledRun):
        def _approved(self, segments):
            return True


class FinishesWithoutAYes(SegmentScheduler):
    """The last segment is not asked for."""

    class Run(ScheduledRun):
        def _approved(self, segments):
            return segments == self.plan.num_segments or super()._approved(segments)


class RestsBehindTheLast(SegmentScheduler):
    """A run that was paused after its last segment had begun waits with the next segment scheduler."""

    class Run(ScheduledRun):
        @property
        def rests(self):
            return self.state == "queued" and self.paused


@pytest.mark.parametrize(
    "broken",
    [EditsWhatHasBegun, BeginsWhileHeld, ForgetsAPause, NeedsNoYes, FinishesWithoutAYes],
)
def test_a_scheduler_that_is_steered_wrongly_is_found(broken, monkeypatch):
    monkeypatch.setattr(scheduler, "ScheduledRun", getattr(broken, "Run", ScheduledRun))
    with pytest.raises(AssertionError):
        run(broken, AnySteering, max_examples=400, phases=[Phase.generate], report_multiple_bugs=False)


@pytest.mark.parametrize("found", [False, True])
def test_a_run_that_rests_behind_its_last_segment_is_found(found, monkeypatch):
    broken = RestsBehindTheLast if found else SegmentScheduler
    monkeypatch.setattr(scheduler, "ScheduledRun", getattr(broken, "Run", ScheduledRun))
    orders = type("Machine", (AnySteering,), {"Scheduler": broken, "fired": Counter()})()
    orders.start(workers=1)
    orders.begin_a_run(segments=1, retries=1, max_ahead=None, frames_first=False)
    orders.succeed(index=0, more=0)
    orders.pause(index=0, paused=True, happens="nothing")
    orders.succeed(index=0, more=15)
    orders.scheduler_dies(commits=True, forget_workers=False)
    with pytest.raises(AssertionError, match="a run waits") if found else nullcontext():
        orders.what_can_go_on_goes_on()
