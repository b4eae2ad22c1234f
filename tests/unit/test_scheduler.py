"""The segment scheduler against random orders of everything that can happen."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from edit_ray.runs.events import CancelAsked, CloseRun, RunSubmitted, StopWork, Work, WorkDone, WorkFailed
from edit_ray.runs.layout import FrameLayout
from edit_ray.runs.plan import RunPlan, plan_run, segment_seed
from edit_ray.runs.scheduler import LEAD, SegmentScheduler

LAYOUT = FrameLayout(num_frames=33, history_latents=3, fps=16)


def plan(run_id: str, segments: int, retries: int = 1) -> RunPlan:
    return plan_run(run_id, prompts=["a prompt"] * segments, seed=7, layout=LAYOUT, retries=retries)


def done(work: Work) -> WorkDone:
    return WorkDone(work.run_id, work.stage, work.segment_index, work.attempt)


def failed(work: Work, *, fatal: bool = False) -> WorkFailed:
    return WorkFailed(work.run_id, work.stage, work.segment_index, work.attempt, "it broke", fatal)


def run_to_end(scheduler: SegmentScheduler, instructions: list) -> list:
    """Everything succeeds, oldest first; returns all instructions in the order they came."""
    seen = list(instructions)
    for instruction in seen:
        if isinstance(instruction, Work):
            seen.extend(scheduler.handle(done(instruction)))
    return seen


def test_a_run_goes_its_way():
    scheduler = SegmentScheduler()
    seen = run_to_end(scheduler, scheduler.handle(RunSubmitted(plan("a", 3))))
    stages = [(work.stage, work.segment_index) for work in seen if isinstance(work, Work)]
    assert stages[0] == ("prepare", None)
    assert stages[-1] == ("finalize", None)
    for stage in ("denoise", "decode", "commit"):
        assert [index for name, index in stages if name == stage] == [0, 1, 2]
    assert seen[-1] == CloseRun("a", "done", None)
    assert scheduler.idle


def test_denoising_leads_by_no_more_than_is_allowed():
    scheduler = SegmentScheduler()
    (prepare,) = scheduler.handle(RunSubmitted(plan("a", 5)))
    (first,) = scheduler.handle(done(prepare))
    after_first = scheduler.handle(done(first))
    assert {(work.stage, work.segment_index) for work in after_first} == {("denoise", 1), ("decode", 0)}
    second = next(work for work in after_first if work.stage == "denoise")
    assert scheduler.handle(done(second)) == [], "segment 2 waits until segment 0 is committed"


def test_a_second_run_waits_for_the_first():
    scheduler = SegmentScheduler()
    first = scheduler.handle(RunSubmitted(plan("a", 1)))
    assert scheduler.handle(RunSubmitted(plan("b", 1))) == []
    seen = run_to_end(scheduler, first)
    assert seen.index(CloseRun("a", "done")) < next(i for i, x in enumerate(seen) if getattr(x, "run_id", "") == "b")


def test_a_segment_that_fails_too_often_ends_its_run_and_says_why():
    scheduler = SegmentScheduler()
    (prepare,) = scheduler.handle(RunSubmitted(plan("a", 2, retries=1)))
    (denoise,) = scheduler.handle(done(prepare))
    (again,) = scheduler.handle(failed(denoise))
    assert (again.stage, again.segment_index, again.attempt) == ("denoise", 0, 1)
    (close,) = scheduler.handle(failed(again))
    assert close == CloseRun("a", "failed", "denoise of segment 0 failed (attempt 2 of 2): it broke")


def test_a_fatal_failure_is_not_tried_again():
    scheduler = SegmentScheduler()
    (prepare,) = scheduler.handle(RunSubmitted(plan("a", 2, retries=5)))
    assert scheduler.handle(failed(prepare, fatal=True)) == [CloseRun("a", "failed", "prepare failed: it broke")]


def test_a_stopped_run_closes_when_its_work_has_ended():
    scheduler = SegmentScheduler()
    (prepare,) = scheduler.handle(RunSubmitted(plan("a", 2)))
    assert scheduler.handle(CancelAsked("a")) == [StopWork("a")]
    assert scheduler.handle(CancelAsked("a")) == []
    assert scheduler.handle(failed(prepare)) == [CloseRun("a", "cancelled", None)]


def test_a_queued_run_can_be_cancelled():
    scheduler = SegmentScheduler()
    scheduler.handle(RunSubmitted(plan("a", 1)))
    scheduler.handle(RunSubmitted(plan("b", 1)))
    assert scheduler.handle(CancelAsked("b")) == [CloseRun("b", "cancelled", None)]


def test_a_run_id_is_used_once():
    scheduler = SegmentScheduler()
    scheduler.handle(RunSubmitted(plan("a", 1)))
    with pytest.raises(ValueError, match="'a' was submitted before"):
        scheduler.handle(RunSubmitted(plan("a", 1)))


def test_seeds_begin_with_the_runs_own_and_never_repeat():
    seeds = [segment_seed(7, index) for index in range(1000)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert segment_seed(7, 1) != segment_seed(8, 1)


class AnyOrder(RuleBasedStateMachine):
    """Work ends in any order, twice, late, never; runs come and are stopped at any time."""

    work = Bundle("work")

    @initialize()
    def start(self):
        self.scheduler = SegmentScheduler()
        self.plans: dict[str, RunPlan] = {}
        self.committed: dict[str, list[int]] = {}
        self.open: set[Work] = set()
        self.closed: dict[str, CloseRun] = {}

    def obey(self, instructions: list):
        new = []
        for instruction in instructions:
            assert instruction.run_id not in self.closed, f"{instruction} after its run ended"
            match instruction:
                case Work():
                    assert instruction not in self.open, f"{instruction} asked for twice"
                    self.open.add(instruction)
                    self.check_order(instruction)
                    new.append(instruction)
                case CloseRun(run_id, state):
                    assert not [work for work in self.open if work.run_id == run_id]
                    if state == "done":
                        assert len(self.committed[run_id]) == len(self.plans[run_id].segments)
                    self.closed[run_id] = instruction
        return multiple(*new)

    def check_order(self, work: Work):
        assert not [other for other in self.open - {work} if other.run_id != work.run_id], "one run at a time"
        assert not [other for other in self.open - {work} if other.stage == work.stage], "one of a kind at a time"
        committed = len(self.committed[work.run_id])
        if work.stage == "denoise":
            assert committed <= work.segment_index < committed + LEAD
        if work.stage == "commit":
            assert work.segment_index == committed

    @rule(target=work, segments=st.integers(1, 4), retries=st.integers(0, 2))
    def submit(self, segments, retries):
        run_id = f"run-{len(self.plans)}"
        self.plans[run_id], self.committed[run_id] = plan(run_id, segments, retries), []
        return self.obey(self.scheduler.handle(RunSubmitted(self.plans[run_id])))

    @rule(target=work, item=consumes(work))
    def succeed(self, item):
        return self.finish(item, done(item))

    @rule(target=work, item=consumes(work), fatal=st.booleans())
    def fail(self, item, fatal):
        return self.finish(item, failed(item, fatal=fatal))

    def finish(self, item, event):
        self.open.discard(item)
        if isinstance(event, WorkDone) and item.stage == "commit":
            self.committed[item.run_id].append(item.segment_index)
        instructions = self.scheduler.handle(event)
        assert self.scheduler.handle(event) == [], "the same event twice changes nothing"
        return self.obey(instructions)

    @rule(item=work)
    def stale(self, item):
        other = WorkDone(item.run_id, item.stage, item.segment_index, item.attempt + 1)
        assert self.scheduler.handle(other) == []

    @rule(target=work, number=st.integers(0, 5))
    def cancel(self, number):
        return self.obey(self.scheduler.handle(CancelAsked(f"run-{number}")))

    @invariant()
    def commits_are_in_order(self):
        for run_id, indices in self.committed.items():
            assert indices == list(range(len(indices)))
            assert self.scheduler.committed(run_id) == len(indices)

    @invariant()
    def nothing_is_forgotten(self):
        waiting = [run_id for run_id in self.plans if run_id not in self.closed]
        assert bool(waiting) == (not self.scheduler.idle)
        assert not waiting or self.open, "a run waits and nobody works"


AnyOrder.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
