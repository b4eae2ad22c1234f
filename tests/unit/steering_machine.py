"""The segment scheduler in random orders of edits, pauses, approvals and branches among all else that can happen."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from edit_ray.runs.events import CancelAsked, Steered
from edit_ray.runs.run_plan import RunPlan
from tests.unit.scheduler_machine import INDEX, AnyOrder, Durable


class AnySteering(AnyOrder):
    """As the shell does: a run is held while a line is written, and that line counts from then on."""

    def _live(self, index):
        live = [run_id for run_id in self.runs if self.scheduler.begun(run_id) is not None]
        return live[index % len(live)] if live else None

    def _write(self, run_id, line, happens):
        """`line` changes what is durable, from the first segment that has not begun on, unless something `happens`."""
        run = self.runs[run_id]
        self.handle(Steered(run_id, True, run.approved))
        begun = self.scheduler.begun(run_id)
        assert begun is not None
        assert begun >= run.begun, "a segment has begun that an edit may change"
        paused, run.paused = run.paused, True
        own = [at for at, work in enumerate(self.open) if work.run_id == run_id]
        if happens == "work ends" and self.open:
            self.succeed(0, 0)
        elif happens == "work fails" and own:
            self.fail(own[0], "error")
            self.what_can_go_on_goes_on()
        run.paused = paused
        if happens == "dies before":
            self.count("scheduler dies while it writes")
            self.scheduler_dies(True, False)
            return
        if run.ended is None and self.scheduler.begun(run_id) is not None and happens != "is refused":
            line(run, begun)
        if happens == "dies after":
            self.count("scheduler dies while it writes")
            self.scheduler_dies(False, True)
        else:
            self.handle(Steered(run_id, run.paused, run.approved))

    HAPPENS = st.sampled_from(["nothing", "work ends", "work fails", "is refused", "dies before", "dies after"])

    @precondition(lambda self: len(self.runs) < 6)
    @rule(segments=st.sampled_from([2, 3, None]), max_ahead=st.sampled_from([None, 1]), frames_first=st.booleans())
    def begin_a_run_that_asks(self, segments, max_ahead, frames_first):
        self.count("submit one that asks")
        plan = RunPlan(f"run-{len(self.runs)}", segments, 2, 1, max_ahead, frames_first, approve=True)
        self.runs[plan.run_id] = Durable(plan)
        self.submit(plan)

    @precondition(lambda self: self._live(0))
    @rule(index=INDEX, later=st.sampled_from([0, 0, 1, 2]), happens=HAPPENS)
    def edit(self, index, later, happens):
        run_id = self._live(index)

        def line(run, begun):
            self.count("edit")
            start = begun + later
            assert start >= run.committed
            if run.plan.num_segments is None or start < run.plan.num_segments:
                run.edits.append(start)

        self._write(run_id, line, happens)

    @precondition(lambda self: self._live(0))
    @rule(index=INDEX, paused=st.booleans(), happens=HAPPENS)
    def pause(self, index, paused, happens):
        def line(run, begun):
            self.count("pause" if paused else "unpause")
            run.paused = paused

        self._write(self._live(index), line, happens)

    @precondition(
        lambda self: [run for run in self.runs.values() if run.ended is None and run.committed > run.approved]
    )
    @rule(index=INDEX, most=st.booleans(), happens=HAPPENS)
    def approve(self, index, most, happens):
        ids = [run_id for run_id, run in self.runs.items() if run.committed > run.approved]
        ids = [run_id for run_id in ids if self.scheduler.begun(run_id) is not None]
        if not ids:
            return

        def line(run, begun):
            self.count("approve")
            run.approved = run.committed if most else min(run.approved + 1, run.committed)

        self._write(ids[index % len(ids)], line, happens)

    @precondition(lambda self: self.runs and len(self.runs) < 6)
    @rule(index=INDEX, at=INDEX, own=st.booleans())
    def branch(self, index, at, own):
        """From any run, whatever it is doing; which goes on as if nothing had happened."""
        self.count("branch")
        source = self.runs[list(self.runs)[index % len(self.runs)]]
        at %= source.committed + 1
        before = (self.scheduler.state(source.plan.run_id), self.of(source.plan.run_id))
        segments = source.plan.num_segments
        plan = replace(source.plan, run_id=f"run-{len(self.runs)}", incarnation=1)
        plan = replace(plan, num_segments=None if segments is None else max(1, at, segments))
        branch = self.runs[plan.run_id] = Durable(plan, [[]], first=at, latents=at, approved=at)
        branch.edits = [*source.edits, *([at] if own else [])]
        self.submit(plan)
        after = (self.scheduler.state(source.plan.run_id), self.of(source.plan.run_id))
        assert before == after, "the source has changed"

    @precondition(lambda self: self._waiting())
    @rule(index=INDEX, at=INDEX)
    def reroll_one_that_waits(self, index, at):
        run_id = self._waiting()[index % len(self._waiting())]
        run = self.runs[run_id]
        self.handle(CancelAsked(run_id))
        assert run.ended is not None, "nothing of it was in flight"
        if run.committed:
            self.count("reroll one that waits")
            self.reroll(run, at % run.committed)
            run.approved = min(run.approved, run.first)
        self.submit(replace(run.plan, incarnation=run.plan.incarnation + 1))

    def _waiting(self):
        live = [run_id for run_id, run in self.runs.items() if run.ended is None and not self.of(run_id)]
        return [run_id for run_id in live if self.scheduler.held_by(run_id) in ("pause", "approval")]

    def reroll(self, run, start):
        super().reroll(run, start)
        run.approved = min(run.approved, start)
        run.made_with = {segment: edits for segment, edits in run.made_with.items() if segment < start}


FIRED = (
    *("submit one that asks", "edit", "pause", "unpause", "approve", "branch", "reroll one that waits"),
    *("scheduler dies while it writes", "scheduler dies", "GPU actor dies", "cancel", "reroll", "extend", "resume"),
    *("finalize done", "running -> paused", "paused -> running", "paused -> finalizing", "none -> queued"),
)
