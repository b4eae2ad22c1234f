"""The segment scheduler's sentences, seeds and takes; `test_scheduler_machine` tries everything in any order."""

import pytest

from edit_ray.runs.events import (
    CancelAsked,
    CloseRun,
    FailureKind,
    RunSubmitted,
    Steered,
    Work,
    WorkDone,
    WorkFailed,
)
from edit_ray.runs.run_plan import (
    Edit,
    FrameLayout,
    Pictures,
    RunPlan,
    Scene,
    Storyboard,
    Take,
    segment_seed,
    take_of,
    take_seed,
)
from edit_ray.runs.scheduler import MOST_DEATHS, SegmentScheduler


def plan(run_id: str, segments: int | None, retries: int = 1, **more) -> RunPlan:
    return RunPlan(run_id, segments, retries, **more)


def done(work: Work) -> WorkDone:
    return WorkDone(work)


def failed(work: Work, kind: FailureKind = "error") -> WorkFailed:
    return WorkFailed(work, "it broke", kind)


def run_to_end(scheduler: SegmentScheduler, instructions: list) -> list:
    """Everything succeeds, oldest first; returns all instructions in the order they came."""
    seen = list(instructions)
    for instruction in seen:
        if isinstance(instruction, Work):
            seen.extend(scheduler.handle(done(instruction)))
    return seen


def test_a_run_makes_its_segments_stage_by_stage():
    scheduler = SegmentScheduler()
    seen = run_to_end(scheduler, scheduler.handle(RunSubmitted(plan("a", 3))))
    stages = [(work.stage, work.segment_index) for work in seen if isinstance(work, Work)]
    assert stages[0] == ("prepare", None)
    assert stages[-1] == ("finalize", None)
    for stage in ("denoise", "decode", "encode", "commit"):
        assert [index for name, index in stages if name == stage] == [0, 1, 2]
    assert seen[-1] == CloseRun("a", "done", None, 0)
    assert scheduler.idle


def test_a_segment_that_fails_too_often_ends_its_run_and_says_why():
    scheduler = SegmentScheduler()
    (prepare,) = scheduler.handle(RunSubmitted(plan("a", 2, retries=1)))
    (denoise,) = scheduler.handle(done(prepare))
    (again,) = scheduler.handle(failed(denoise))
    assert (again.stage, again.segment_index, again.attempt) == ("denoise", 0, 1)
    (close,) = scheduler.handle(failed(again))
    assert close == CloseRun("a", "failed", "denoise of segment 0 failed (attempt 2 of 2): it broke", 0)


def test_a_fatal_failure_is_not_tried_again():
    scheduler = SegmentScheduler()
    (prepare,) = scheduler.handle(RunSubmitted(plan("a", 2, retries=5)))
    assert scheduler.handle(failed(prepare, "fatal")) == [CloseRun("a", "failed", "prepare failed: it broke", 0)]


def test_deaths_of_actors_are_no_failures_of_the_segment_and_have_a_bound_of_their_own():
    scheduler = SegmentScheduler()
    (prepare,) = scheduler.handle(RunSubmitted(plan("a", 2, retries=2)))
    (work,) = scheduler.handle(done(prepare))
    for attempt in range(1, 1 + MOST_DEATHS):
        (work,) = scheduler.handle(failed(work, "death"))
        assert work.attempt == attempt, "which the pause before it grows with"
    for _ in range(2):
        (work,) = scheduler.handle(failed(work))
    (close,) = scheduler.handle(failed(work))
    assert close.error == "denoise of segment 0 failed (attempt 3 of 3): it broke"
    (work,) = scheduler.handle(RunSubmitted(plan("a", 2, retries=100, incarnation=2)))
    for _ in range(MOST_DEATHS):
        (work,) = scheduler.handle(failed(work, "death"))
    (close,) = scheduler.handle(failed(work, "death"))
    assert close.error == (
        "prepare failed: actors died 11 times during this work, which may be why (is memory short?): it broke"
    )


def test_where_no_gpu_actor_has_a_place_that_is_a_failure():
    scheduler = SegmentScheduler(2)
    (work,) = scheduler.handle(RunSubmitted(plan("a", 1, retries=1)))
    (work,) = scheduler.handle(failed(work, "no place"))
    assert work.worker == 1
    (work,) = scheduler.handle(failed(work, "no place"))
    (close,) = scheduler.handle(failed(work, "no place"))
    assert close.error == "prepare failed (attempt 2 of 2): it broke"


def test_a_run_lives_once_at_a_time():
    scheduler = SegmentScheduler()
    first = scheduler.handle(RunSubmitted(plan("a", 1)))
    with pytest.raises(ValueError, match="'a' was submitted before, and lives"):
        scheduler.handle(RunSubmitted(plan("a", 1)))
    run_to_end(scheduler, first)
    assert scheduler.state("a") is None
    again = run_to_end(scheduler, scheduler.handle(RunSubmitted(plan("a", 3, incarnation=2), committed=1)))
    assert [work.segment_index for work in again if getattr(work, "stage", "") == "commit"] == [1, 2]


def test_what_has_begun_is_finished_while_a_run_is_paused_and_an_edit_comes_behind_it():
    scheduler = SegmentScheduler()
    (prepare,) = scheduler.handle(RunSubmitted(plan("a", 3)))
    assert scheduler.begun("a") == 0
    (denoise,) = scheduler.handle(done(prepare))
    assert scheduler.handle(Steered("a", True, 0)) == []
    assert (scheduler.begun("a"), scheduler.held_by("a"), scheduler.state("a")) == (1, "pause", "running")
    (again,) = scheduler.handle(failed(denoise))
    assert (again.stage, again.segment_index, again.attempt) == ("denoise", 0, 1)
    assert run_to_end(scheduler, scheduler.handle(done(again)))[-1].stage == "commit"
    assert (scheduler.begun("a"), scheduler.held_by("a"), scheduler.state("a")) == (1, "pause", "paused")
    (denoise,) = scheduler.handle(Steered("a", False, 0))
    assert (denoise.segment_index, scheduler.held_by("a")) == (1, None)
    (stop,) = scheduler.handle(CancelAsked("a"))
    assert (stop.run_id, scheduler.begun("a"), scheduler.begun("b")) == ("a", None, None)


def test_a_paused_run_that_is_queued_takes_no_gpu_actor():
    scheduler = SegmentScheduler()
    assert scheduler.handle(RunSubmitted(plan("a", 1), worker=0, paused=True)) == []
    assert (scheduler.state("a"), scheduler.held_by("a")) == ("queued", "pause")
    (prepare,) = scheduler.handle(RunSubmitted(plan("b", 1)))
    assert prepare.run_id == "b"
    assert scheduler.handle(Steered("a", False, 0)) == []
    ended = run_to_end(scheduler, [prepare])
    assert [what.run_id for what in ended if isinstance(what, CloseRun)] == ["b", "a"]


def test_a_paused_run_whose_segments_are_all_committed_is_finished_by_the_next_scheduler():
    scheduler = SegmentScheduler()
    (prepare,) = scheduler.handle(RunSubmitted(plan("a", 2), committed=2, worker=0, paused=True))
    ended = run_to_end(scheduler, [prepare])
    assert [what.stage for what in ended if isinstance(what, Work)] == ["prepare", "finalize"]
    assert ended[-1] == CloseRun("a", "done", None, 0)


def test_a_run_that_asks_waits_for_a_yes_to_each_segment_and_to_the_last():
    scheduler = SegmentScheduler()
    seen = run_to_end(scheduler, scheduler.handle(RunSubmitted(plan("a", 2, approve=True))))
    for yes in (1, 2):
        assert (seen[-1].stage, seen[-1].segment_index) == ("commit", yes - 1)
        assert (scheduler.state("a"), scheduler.held_by("a")) == ("paused", "approval")
        seen = run_to_end(scheduler, scheduler.handle(Steered("a", False, yes)))
    assert seen[-1] == CloseRun("a", "done", None, 0)


def test_a_run_that_is_ahead_waits_for_its_clients():
    scheduler = SegmentScheduler()
    run_to_end(scheduler, scheduler.handle(RunSubmitted(plan("a", 2, max_ahead=1))))
    assert (scheduler.state("a"), scheduler.held_by("a")) == ("paused", "clients")


def test_edits_and_takes_hold_in_the_order_of_their_lines():
    scenes = (Scene(0, "a", "", 4.0, 7), Scene(3, "b", "n", 5.0, 8))
    changes = (Edit(2, prompt="c"), Take(1, 1, 99), Edit(4, "d", "m", 6.0), Edit(1, seed=5, negative_prompt="o"))
    board = Storyboard(scenes, FrameLayout(33, 3, 16), changes)
    segments = [board.segment(k) for k in range(6)]
    assert [segment.prompt for segment in segments] == ["a", "a", "c", "c", "d", "d"]
    assert [segment.negative_prompt for segment in segments] == ["", "o", "o", "o", "o", "o"]
    assert [segment.guidance_scale for segment in segments] == [4.0, 4.0, 4.0, 5.0, 6.0, 6.0]
    assert [segment.seed for segment in segments] == [segment_seed(7 if k == 0 else 5, k) for k in range(6)]
    assert [segment.take for segment in segments] == [0, 1, 1, 1, 1, 1]
    assert [board.edits_of(k) for k in range(6)] == [0, 1, 2, 2, 3, 3]


def test_an_edit_inside_a_scene_that_cuts_makes_no_other_cut():
    shown = Pictures("first.png")
    board = Storyboard((Scene(0, "a", "", 4.0, 7, pictures=shown, cuts=True),), FrameLayout(33, 1, 16), (Edit(2, "b"),))
    assert [board.segment(k).pictures for k in range(4)] == [shown] * 4
    assert [board.stream_start(k) for k in range(4)] == [0] * 4
    assert [scene.cuts for scene in board.changed] == [True, False]


def test_takes_change_seed_and_prompt_from_their_segment_on():
    scene = Scene(0, "a", "", 4.0, 7)
    takes = (Take(1, 2, 99, "b"), Take(2, 4, 100))
    board = Storyboard((scene,), FrameLayout(33, 3, 16), takes)
    assert [board.segment(k).take for k in range(6)] == [0, 0, 1, 1, 2, 2] == [take_of(k, takes) for k in range(6)]
    assert [board.segment(k).prompt for k in range(6)] == ["a", "a", "b", "b", "b", "b"]
    assert [board.segment(k).seed for k in (0, 1, 2, 5)] == [
        segment_seed(seed, k) for k, seed in ((0, 7), (1, 7), (2, 99), (5, 100))
    ]
    assert len({take_seed(7, number) for number in range(100)} | {7}) == 101


def test_seeds_begin_with_the_runs_own_and_never_repeat():
    seeds = [segment_seed(7, index) for index in range(1000)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert segment_seed(7, 1) != segment_seed(8, 1)
