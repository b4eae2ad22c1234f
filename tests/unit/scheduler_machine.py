"""The segment scheduler in random orders of everything that can happen, against a model that holds what is on disk.

The model is the shell: it knows what was asked for, what of it came to be, and which segments are durable. Processes of
it die: a GPU actor loses whatever it works on, and a segment scheduler is replaced by one that knows only what is
durable, while reports of the old one's work still come in.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edit_ray.runs.events import (
    CancelAsked,
    CloseRun,
    Consumed,
    RunSubmitted,
    Steered,
    StopWork,
    Work,
    WorkDone,
    WorkersCounted,
    WorkFailed,
)
from edit_ray.runs.run_plan import RunPlan
from edit_ray.runs.scheduler import LEAD, MOST_DEATHS, SegmentScheduler

INDEX = st.integers(0, 63)


@dataclass
class Durable:
    """What a run's folder and its pointer hold, and what its clients have."""

    plan: RunPlan
    takes: list[list[int]] = field(default_factory=lambda: [[]])  # committed segments, in the order of their commits
    first: int = 0  # segment of the latest take
    latents: int = 0  # segments 0 … latents-1 of the latest take have latents
    media: set[int] = field(default_factory=set)  # segments of it that were encoded in this life
    worker: int | None = None
    prepared: bool = False  # on this GPU actor
    had: int | None = None  # the GPU actor that it has lost
    displaced: bool = False  # its GPU actor has no place, and what was begun there has not ended
    consumed: int = 0  # what clients have told the segment scheduler in this life
    ended: CloseRun | None = None
    paused: bool = False
    approved: int = 0
    edits: list[int] = field(default_factory=list)  # the first segment of each
    begun: int = 0  # the denoising of segments before this one has begun in this life, or has ended
    asked_with: dict[Work, int] = field(default_factory=dict)
    made_with: dict[int, int] = field(default_factory=dict)  # by segment: edits that held when its latents were made

    @property
    def committed(self) -> int:
        return self.first + len(self.takes[-1])

    def edits_of(self, segment: int) -> int:
        return sum(start <= segment for start in self.edits)

    def rests(self, segment: int) -> bool:
        """Whether the run is paused before a segment; behind the last one a pause holds nothing."""
        return self.paused and (self.plan.num_segments is None or segment < self.plan.num_segments)

    def holds(self, segment: int) -> bool:
        """Whether a segment must not begin, or, behind the last one, the run not finish."""
        return self.rests(segment) or (self.plan.approve and self.approved < segment)


class AnyOrder(RuleBasedStateMachine):
    Scheduler = SegmentScheduler
    fired = None  # how often each event and each transition was in the histories: a Counter

    @initialize(workers=st.integers(1, 3))
    def start(self, workers):
        self.workers = workers
        self.scheduler = self.Scheduler(workers)
        self.runs = {}  # id -> Durable, in the order of submission
        self.open = []  # work that is asked for and has not ended
        self.late = []  # work that has ended, or that nobody waits for any more
        self.stopping = set()
        self.states = {}  # how runs have ended
        self.lacking = set()  # GPU actors without a place
        self.failures = defaultdict(Counter)  # of each kind, by run, incarnation, stage and segment

    # What the shell does.

    def count(self, name):
        type(self).fired[name] += 1

    def handle(self, event):
        before = {run_id: self.state(run_id) for run_id in self.runs}
        self.obey(self.scheduler.handle(event))
        for run_id, was in before.items():
            if was != (now := self.state(run_id)):
                self.count(f"{was} -> {now}")

    def state(self, run_id):
        return self.scheduler.state(run_id) or self.states.get(run_id, "none")

    def obey(self, instructions):
        for instruction in instructions:
            run = self.runs[instruction.run_id]
            assert run.ended is None, f"{instruction} after its run ended"
            match instruction:
                case Work():
                    self.begin(run, instruction)
                case StopWork(run_id, worker):
                    assert [work for work in self.open if (work.run_id, work.worker) == (run_id, worker)]
                    self.stopping.add(run_id)
                case CloseRun(run_id, state, error, worker):
                    assert not self.of(run_id), "a run ends while it is worked on"
                    assert (state == "failed") == (error is not None)
                    assert state != "done" or run.committed == run.plan.num_segments
                    assert worker in (run.worker, run.had)
                    self.stopping.discard(run_id)
                    run.ended, run.worker = instruction, None
                    self.states[run_id] = state

    def begin(self, run, work):
        assert work.run_id not in self.stopping, f"{work} of a run that is being stopped"
        assert work.incarnation == run.plan.incarnation
        counts = self.failures[work.run_id, work.incarnation, work.stage, work.segment_index]
        assert counts["error"] <= run.plan.retries, "given up too late"
        assert counts["death"] <= MOST_DEATHS, "given up too late"
        assert not run.displaced, "its GPU actor has no place"
        assert run.prepared != (work.stage == "prepare"), "prepared once on each GPU actor, before all else"
        assert work not in [*self.open, *self.late], f"{work} is asked for twice"
        assert not [other for other in self.of(work.run_id) if other.stage == work.stage], "one of a kind at a time"
        assert run.worker in (None, work.worker), "a run changes its GPU actor"
        others = [other for other in self.runs.values() if other is not run and other.worker == work.worker]
        assert not others, "one run at a time on a GPU actor"
        assert work.worker < self.workers
        assert work.worker not in self.lacking, "a GPU actor without a place"
        run.worker, run.had = work.worker, None
        self.check_order(run, work)
        self.open.append(work)

    def check_order(self, run, work):
        plan, k = run.plan, work.segment_index
        match work.stage:
            case "denoise":
                assert k < run.begun or not run.holds(k), "begun while it is held"
                run.begun = max(run.begun, k + 1)
                run.asked_with[work] = run.edits_of(k)
                assert k <= run.committed + LEAD - 1
                assert plan.num_segments is None or k < plan.num_segments
                assert plan.max_ahead is None or k < run.consumed + plan.max_ahead, "nobody keeps up"
                assert not plan.frames_first or not self.busy(work.run_id, "decode"), "its frames are not there yet"
            case "decode":
                assert k < run.latents, "decoded before it was denoised"
            case "commit":
                assert k == run.committed, "committed out of order"
                assert k in run.media, "committed before its media were whole"
            case "finalize":
                assert run.committed == plan.num_segments
                assert not run.holds(run.committed), "finished without a yes"

    def of(self, run_id):
        return [work for work in self.open if work.run_id == run_id]

    def busy(self, run_id, stage):
        return [work for work in self.of(run_id) if work.stage == stage]

    def come_true(self, work):
        """The work's effect on what is durable."""
        run = self.runs[work.run_id]
        run.prepared |= work.stage == "prepare" and not run.displaced
        if work.stage == "denoise":
            assert work.segment_index == run.latents or work.segment_index < run.latents
            run.latents = max(run.latents, work.segment_index + 1)
            run.made_with[work.segment_index] = run.asked_with[work]
        if work.stage == "encode":
            run.media.add(work.segment_index)
        if work.stage == "commit":
            assert work.segment_index == run.committed, "committed twice, or out of order"
            assert run.made_with[work.segment_index] == run.edits_of(work.segment_index), "an edit does not hold"
            run.takes[-1].append(work.segment_index)

    def submit(self, plan, worker=None):
        run = self.runs[plan.run_id]
        run.plan, run.ended, run.media, run.consumed = plan, None, set(), 0
        run.prepared, run.displaced, run.had = False, False, worker if run.paused else None
        # The latest latents may be of a segment that was not complete: it is made again, here in every other life.
        denoised = max(run.committed, run.latents - plan.incarnation % 2)
        while denoised > run.committed and run.made_with[denoised - 1] != run.edits_of(denoised - 1):
            denoised -= 1  # latents from before an edit are not what the run would make now
        run.begun = denoised
        self.handle(RunSubmitted(plan, run.committed, denoised, worker, run.paused, run.approved))

    # Events.

    @precondition(lambda self: len(self.runs) < 6)
    @rule(
        segments=st.sampled_from([1, 2, 3, 5, None]),
        retries=st.sampled_from([1, 0, 2]),
        max_ahead=st.sampled_from([None, None, 1, 2]),
        frames_first=st.booleans(),
    )
    def begin_a_run(self, segments, retries, max_ahead, frames_first):
        self.count("submit")
        run_id = f"run-{len(self.runs)}"
        plan = RunPlan(run_id, segments, retries, 1, max_ahead, frames_first)
        self.runs[run_id] = Durable(plan)
        self.submit(plan)

    @precondition(lambda self: self.open)
    @rule(index=INDEX, more=st.sampled_from([0, 1, 3, 15]))
    def succeed(self, index, more):
        for at in range(more + 1):
            if not self.open or (at and self.open[0].stage == "finalize"):
                break  # where a run is about to end, something else may happen first
            work = self.take(index + at)
            self.count(f"{work.stage} done")
            self.come_true(work)
            self.handle(WorkDone(work))

    @precondition(lambda self: self.open)
    @rule(index=INDEX, kind=st.sampled_from(["error", "error", "fatal"]))
    def fail(self, index, kind):
        work = self.take(index)
        self.count(f"{work.stage} failed")
        self.report(work, kind)

    def take(self, index):
        work = self.open.pop(index % len(self.open))
        self.late.append(work)
        run = self.runs[work.run_id]
        if run.displaced and not self.of(work.run_id) and work.run_id not in self.stopping:
            run.worker, run.had, run.displaced = None, run.worker, False
        return work

    def report(self, work, kind):
        """Work has failed. The run ends where that was too often, and else it goes on."""
        counts = self.failures[work.run_id, work.incarnation, work.stage, work.segment_index]
        counts[kind] += 1
        too_often = counts["error"] > self.runs[work.run_id].plan.retries or counts["death"] > MOST_DEATHS
        stopping = work.run_id in self.stopping
        self.handle(WorkFailed(work, "it broke", kind))
        given_up = self.state(work.run_id) in ("stopping", "failed")
        assert stopping or given_up == (too_often or kind == "fatal"), f"{counts}: {self.state(work.run_id)}"

    @precondition(lambda self: self.open)
    @rule(index=INDEX, times=st.sampled_from([1, 1, 2, 11]))
    def gpu_actor_dies(self, index, times):
        worker = self.open[index % len(self.open)].worker
        for _ in range(times):
            self.count("GPU actor dies")
            for work in [work for work in self.open if work.worker == worker]:
                if work in self.open:
                    self.take(self.open.index(work))
                    self.report(work, "death")

    @precondition(lambda self: self.open)
    @rule(index=INDEX)
    def no_place(self, index):
        """A GPU actor is to be started, and no node has what it needs: where others have, the run waits for those."""
        self.count("no place")
        worker = self.open[index % len(self.open)].worker
        others = set(range(self.workers)) - self.lacking - {worker}
        run_id = self.open[index % len(self.open)].run_id
        if not others or run_id in self.stopping:
            self.report_no_place(self.take(index))
            return
        self.lacking.add(worker)
        run = self.runs[run_id]
        run.prepared, run.displaced = False, True
        self.handle(WorkFailed(self.take(index), "no place", "no place"))
        assert self.state(run_id) in ("queued", "preparing"), "it waits for another"

    def report_no_place(self, work):
        """It counts as any failure."""
        self.failures[work.run_id, work.incarnation, work.stage, work.segment_index]["error"] += 1
        self.handle(WorkFailed(work, "no place", "no place"))

    @precondition(lambda self: self.runs)
    @rule(commits=st.booleans(), forget_workers=st.booleans())
    def scheduler_dies(self, commits, forget_workers):
        """All that it knew is gone. What it was committing may have reached the disk, or not."""
        self.count("scheduler dies")
        for work in self.open:
            run = self.runs[work.run_id]
            if work.stage == "denoise" or (work.stage == "commit" and commits):
                self.come_true(work)
            assert run.ended is None
        self.late += self.open
        self.open, self.stopping, self.lacking = [], set(), set()
        self.scheduler = self.Scheduler(self.workers)
        live = [run for run in self.runs.values() if run.ended is None]
        before = {run.plan.run_id: None if forget_workers else run.worker for run in live}
        for run in live:
            run.worker = None
        for run in sorted(live, key=lambda run: before[run.plan.run_id] is None):
            self.submit(replace(run.plan, incarnation=run.plan.incarnation + 1), before[run.plan.run_id])

    @precondition(lambda self: self.late)
    @rule(index=INDEX, failed=st.booleans(), which=st.sampled_from(["same", "attempt", "incarnation"]))
    def late_report(self, index, failed, which):
        """Of work that has ended, or of another attempt or life than what is open."""
        self.count("late report")
        work = self.late[index % len(self.late)]
        if which != "same" and self.open:
            work = self.open[index % len(self.open)]
            work = replace(work, **{which: getattr(work, which) - 1})
        if work in self.open:
            return
        state = self.scheduler.state(work.run_id)
        assert self.scheduler.handle(WorkFailed(work, "late") if failed else WorkDone(work)) == []
        assert self.scheduler.state(work.run_id) == state

    @precondition(lambda self: self.runs)
    @rule(index=INDEX, what=st.sampled_from(["consume", "consume", "cancel", "cancel", "count workers"]))
    def someone_asks(self, index, what):
        self.count(what)
        run_id = list(self.runs)[index % len(self.runs)]
        run = self.runs[run_id]
        if what == "cancel":
            self.handle(CancelAsked(run_id))
        elif what == "count workers":
            self.workers = max(self.workers, index % 3 + 1)
            self.lacking.clear()
            self.handle(WorkersCounted(index % 3 + 1))
        else:
            run.consumed = max(run.consumed, min(run.committed, run.consumed + index % 3))
            self.handle(Consumed(run_id, run.consumed))

    @precondition(lambda self: any(work.stage == "finalize" for work in self.open))
    @rule()
    def cancelled_too_late(self):
        """The video is whole before anybody obeys."""
        at = next(at for at, work in enumerate(self.open) if work.stage == "finalize")
        self.count("cancel")
        self.handle(CancelAsked(self.open[at].run_id))
        work = self.take(at)
        self.count("finalize done")
        self.come_true(work)
        self.handle(WorkDone(work))

    @precondition(lambda self: any(run.ended for run in self.runs.values()))
    @rule(index=INDEX, how=st.sampled_from(["resume", "extend", "reroll"]), at=INDEX)
    def go_on(self, index, how, at):
        """An ended run lives again: where it stood, with more segments, or from an earlier one on in another take."""
        ended = [run_id for run_id, run in self.runs.items() if run.ended]
        run_id = ended[index % len(ended)]
        run = self.runs[run_id]
        plan = replace(run.plan, incarnation=run.plan.incarnation + 1)
        if how == "extend" and plan.num_segments is not None:
            plan = replace(plan, num_segments=plan.num_segments + 2)
        if how == "reroll":
            self.reroll(run, at % (run.committed + 1))
        if how == "resume" and run.ended.state == "done":
            return
        self.count(how)
        self.submit(plan)

    def reroll(self, run, start):
        kept = list(range(start))
        run.takes.append([])
        run.takes[-2], run.first = [*run.takes[-2]], len(kept)
        run.latents = start

    # What always holds.

    @invariant()
    def every_segment_is_committed_once_and_in_order(self):
        for run in self.runs.values():
            assert run.takes[-1] == list(range(run.first, run.committed))
            for take in run.takes:
                assert take == sorted(set(take))

    @invariant()
    def what_can_go_on_goes_on(self):
        live = [run_id for run_id, run in self.runs.items() if run.ended is None]
        assert self.scheduler.idle == (not live)
        for run_id in live:
            state, run = self.scheduler.state(run_id), self.runs[run_id]
            if state == "queued":
                busy = {other.worker for other in self.runs.values() if other.worker is not None}
                free = set(range(self.workers)) - busy - self.lacking
                assert self.of(run_id) or not free or run.rests(run.committed), "a run waits, and a GPU actor is free"
                continue
            if state == "paused":
                assert run.begun == run.committed, "what has begun is not finished"
            if state == "paused" and not run.holds(run.committed):
                assert run.plan.max_ahead is not None
                assert run.committed >= run.consumed + run.plan.max_ahead
            elif state == "paused":
                assert self.scheduler.held_by(run_id) in ("pause", "approval")
            else:
                assert self.of(run_id), f"a run is {state}, and nobody works on it"

    def teardown(self):
        """When everything succeeds from here on and clients keep up, every run ends, and nothing is left over."""
        if not hasattr(self, "scheduler"):
            return
        for run_id, run in self.runs.items():
            if run.plan.num_segments is None:
                self.handle(CancelAsked(run_id))
        for _ in range(2000):
            if self.scheduler.idle:
                break
            for run_id, run in self.runs.items():
                run.consumed, run.paused, run.approved = run.committed, False, run.committed
                self.handle(Steered(run_id, False, run.committed))
                self.handle(Consumed(run_id, run.committed))
            if self.open:
                self.succeed(0, 0)
        assert self.scheduler.idle, "a run does not end"
        assert self.open == []
        for run in self.runs.values():
            assert run.ended is not None
            assert run.ended.state != "done" or run.committed == run.plan.num_segments


FIRED = (
    *("submit", "resume", "extend", "reroll", "cancel", "consume", "count workers"),
    *("GPU actor dies", "scheduler dies", "late report", "no place"),
    *(f"{stage} done" for stage in ("prepare", "denoise", "decode", "encode", "commit", "finalize")),
    *(f"{stage} failed" for stage in ("prepare", "denoise", "decode", "encode", "commit", "finalize")),
    *("none -> queued", "none -> preparing", "done -> queued", "done -> preparing"),
    *("preparing -> queued", "running -> queued", "running -> preparing"),
    *("queued -> preparing", "preparing -> running", "preparing -> stopping", "preparing -> failed"),
    *("running -> paused", "paused -> running", "running -> stopping", "running -> finalizing", "running -> failed"),
    *("finalizing -> done", "finalizing -> stopping", "finalizing -> failed"),
    *("queued -> cancelled", "paused -> cancelled", "stopping -> cancelled", "stopping -> failed", "stopping -> done"),
)
