"""Random histories of a run without Ray, each compared, file by file, with the run to which nothing has happened.

A history draws a configuration and what happens: cancels and deaths of actors at random calls and steps, then resumes,
extensions and re-rolls, until the run is done. What it leaves must follow from its configuration, its number of
segments and its takes alone.

    python -m tests.chaos.storm FOLDER --first 0 --count 1000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edit_ray.actors import stages
from edit_ray.actors.folder_state import all_damage_of
from edit_ray.actors.live_run import LiveRun
from edit_ray.actors.local import LocalPool, LocalWorker
from edit_ray.actors.messages import RunStatus
from edit_ray.actors.pool import ActorGone
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.config import Config
from edit_ray.errors import ConfigError, RunEnded, UnknownRun
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Manifest
from edit_ray.runs.run_plan import Change, Edit
from tests.chaos.undisturbed import PATIENCE_S, WORK, Reroll, Shape, Undisturbed, compare, save_model

KILLS = ("gpu", "gpu at a step", "store", "store at work", "node", "scheduler", "cluster")
STEERS = ("steer", "steer and die", "pause", "branch")
OUTSIDE = ("cancel", "scheduler", "cluster", *STEERS)  # what the history sees to


@dataclass
class Weather(LocalPool):
    """A crew to which `coming`, by the number of a call for work, happens during that call."""

    draw: random.Random
    coming: dict[int, str] = field(default_factory=dict)
    calls: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    struck: asyncio.Event = field(default_factory=asyncio.Event)  # what a history itself must see to

    def __post_init__(self) -> None:
        super().__init__()
        self.what = ""

    async def denoiser(self, worker: int, method: str, *arguments: Any) -> Any:
        if method not in WORK:
            return await super().denoiser(worker, method, *arguments)
        self.calls += 1
        what = self.coming.pop(self.calls, "")
        if not what:
            return await super().denoiser(worker, method, *arguments)
        self.happened[what] += 1
        of = self.workers[worker]
        if what in OUTSIDE:
            at_work = asyncio.ensure_future(super().denoiser(worker, method, *arguments))
            await asyncio.sleep(self.draw.choice((0.0, 0.0, 0.01, 0.05)))
            self.what = what
            self.struck.set()
            return await at_work
        if what in ("store", "store at work"):
            answer = asyncio.ensure_future(super().denoiser(worker, method, *arguments))
            await asyncio.sleep(0.03 * self.draw.random() if what == "store at work" else 0.0)
            of.store.close()
            of.store = LocalWorker(worker).store
            return await answer
        if what == "node":
            of.store.close()
            for path in arguments[0].residuals_directory.glob("*.safetensors"):
                path.unlink()
            of.store = LocalWorker(worker).store
        dead, at_work = of.denoiser, None
        if what == "gpu at a step":
            at_work = asyncio.ensure_future(super().denoiser(worker, method, *arguments))
            await asyncio.sleep(self.draw.choice((0.0, 0.01, 0.03)))
        await self.restart_denoiser(worker)
        dead.stop_run(arguments[0].run_id)  # what it was at ends, as nobody may write beside the next one
        if at_work is not None:
            with contextlib.suppress(Exception):
                await at_work
        raise ActorGone("the actor died")


class History:
    """One run, from its submission until it is done, whatever happens."""

    def __init__(
        self, seed: int, root: Path, model: Path, long_share: float, crew: Weather, *, causal: bool = False
    ) -> None:
        """`crew` lives on from the history before."""
        self.draw = random.Random(seed)
        self.run_id, self.root = f"storm-{seed}", root
        self.shape = Shape.drawn(self.draw, long_share, causal)
        self.keep = self.draw.choice((None, None, 1, 2)) if self.shape.kv != "commit" else None
        self.segments = self.draw.randint(2, 4)
        self.config = self.shape.config(model, self.segments, self.keep)
        self.takes: list[Reroll] = []
        self.told: list[str] = [f"{self.shape}, keep {self.keep}, {self.segments} segments"]
        self.done = Counter[str]()
        self.crew, crew.draw = crew, self.draw
        self.folder = RunFolder(root, self.run_id)

    async def live(self) -> Manifest:
        """Lives the history; the manifest that it ends with."""
        self.scheduler = self._new_scheduler()
        self._forecast()
        asked = self.config.model_dump(mode="json")
        await self.scheduler.submit(self.run_id, asked, str(self.root), str(self.root), self.run_id)
        state = await self._end()
        for _ in range(self.draw.randint(0, 3)):
            self._forecast()
            await self._change(state)
            state = await self._end()
        self.crew.coming.clear()
        if state != "done":
            await self.scheduler.resume(self.run_id, str(self.root), False)
            state = await self._end()
        async with asyncio.timeout(PATIENCE_S):  # a run's end is told a little before it is forgotten
            while await self.crew.recall():
                await asyncio.sleep(0.01)
        return self.folder.read_manifest()

    def check(self, manifest: Manifest, undisturbed: Undisturbed) -> None:
        """AssertionError unless every file is what it would be without anything that has happened."""
        whole = undisturbed.of(self.shape, self.segments, self.takes)
        compare(self.folder, manifest, whole, self.keep)

    def _new_scheduler(self) -> Any:
        return SegmentSchedulerActor(self.crew)

    def _forecast(self) -> None:
        """What happens in the life that begins: most often a cancel, and a death or none."""
        kinds = [self.draw.choice(KILLS)] if self.draw.random() < 0.6 else []
        kinds += ["cancel"] if self.draw.random() < 0.7 else []
        calls = self.draw.sample(range(1, 3 * self.segments + 2), len(kinds))
        self.crew.coming = {self.crew.calls + call: kind for call, kind in zip(calls, kinds, strict=True)}
        self.told.append(f"coming {dict(zip(calls, kinds, strict=True))}")

    async def _change(self, state: str) -> None:
        committed = len(self.folder.read_manifest().segments)
        kind = self.draw.choice(("resume", "extend", "reroll"))
        if kind == "extend" and self.segments < 6:
            more = self.draw.randint(1, 6 - self.segments)
            self.segments += more
            self.told.append(f"{state} at {committed}: extend by {more}")
            await self.scheduler.extend(self.run_id, str(self.root), more, False)
        elif kind == "reroll" and committed and len(self.takes) < 2:
            start, seed = self.draw.randrange(committed), self.draw.choice((None, 77))
            prompt = self.draw.choice((None, "a blue square"))
            before = self.folder.manifest.read_bytes()
            try:
                await self.scheduler.reroll(self.run_id, str(self.root), start, seed, prompt, False)
            except ConfigError:
                assert self.keep is not None, "nothing is dropped"
                assert self.folder.manifest.read_bytes() == before, "refused, and written"
            else:
                self.takes.append((start, seed, prompt))
                self.told.append(f"{state} at {committed}: reroll from {start}, {seed}, {prompt}")
                return
            await self._resume(state, committed)
        else:
            await self._resume(state, committed)

    async def _resume(self, state: str, committed: int) -> None:
        self.told.append(f"{state} at {committed}: resume")
        await self.scheduler.resume(self.run_id, str(self.root), False)

    async def _end(self, run_id: str | None = None) -> str:
        """Waits for the end of the run, or of another one, and does what needs another hand than the crew's."""
        folder = RunFolder(self.root, run_id or self.run_id)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if self.crew.struck.is_set():
                    self.crew.struck.clear()
                    await self._strike(self.crew.what)
                try:
                    status = (await self.scheduler.wait_segment(folder.run_id, 100, 0.05)).status
                except UnknownRun:  # it had ended when its scheduler died
                    status = RunStatus.of(folder.path, folder.read_manifest())
                await self._seen(status)
                if status.ended and not self.crew.struck.is_set():
                    assert status.state in ("done", "cancelled"), status.error
                    return status.state

    async def _seen(self, status: RunStatus) -> None:
        """What a client does when it sees the run in a state."""

    async def _strike(self, what: str) -> None:
        self.told.append(f"{what} at call {self.crew.calls}")
        if what == "cancel":
            await self.scheduler.cancel(self.run_id)
            return
        await die(self.scheduler)
        if what == "cluster":
            await self.crew.end()
            coming, calls, happened = self.crew.coming, self.crew.calls, self.crew.happened
            self.crew = Weather(self.draw, coming, calls, happened)
        self.scheduler = SegmentSchedulerActor(self.crew)
        if what == "cluster":
            await self.scheduler.resume(self.run_id, str(self.root), False)


async def die(scheduler: SegmentSchedulerActor) -> None:
    """What a SIGKILL does to a segment scheduler: it does nothing any more, and its locks are gone."""
    while tasks := [task for task in (*scheduler._tasks, scheduler._recovered) if not task.done()]:
        for task in tasks:  # all at once: the end of one would begin others
            task.cancel()
        await asyncio.wait(tasks)
    for run in scheduler._runs.values():
        if not run.ended or _is_open(run):
            run.file.close()


def _is_open(run: LiveRun) -> bool:
    """Whether an ended run was about to close its manifest."""
    run._disk.shutdown()
    try:
        return os.path.samestat(os.fstat(run.file._descriptor), os.stat(run.folder.manifest))
    except OSError:
        return False


class SteeredHistory(History):
    """Also edits, pauses and branches. An edit that was answered is there; branches are made until they are done."""

    def __init__(self, *given: Any, causal: bool = False) -> None:
        super().__init__(*given, causal=causal)
        self.branches: dict[str, int] = {}
        self.accepted: list[Edit] = []

    async def live(self) -> Manifest:
        await super().live()
        for run_id in self.branches:
            assert await self._end(run_id) == "done"
        async with asyncio.timeout(PATIENCE_S):
            while await self.crew.recall():
                await asyncio.sleep(0.01)
        return self.folder.read_manifest()

    def check(self, manifest: Manifest, undisturbed: Undisturbed) -> None:
        assert set(self.accepted) <= set(manifest.changes), "an edit is lost"
        config = self.config.model_dump(mode="json") | {"output": {"keep_segments": None}}
        config["video"] = {"num_segments": self.segments}
        whole = undisturbed.steered(Config.model_validate(config), _forgetting(manifest.changes))
        compare(self.folder, manifest, whole, self.keep)
        for run_id, at in self.branches.items():
            folder = RunFolder(self.root, run_id)
            own = folder.read_manifest()
            assert all_damage_of(folder, own) == []
            assert own.takes == ()
            if own.planned_from:  # its source's plan of reuse was made anew, and so is its own
                continue
            there = [entry for entry in config["prompt_segments"] if entry["segment"] < own.num_segments]
            shorter = config | {"video": {"num_segments": own.num_segments}, "prompt_segments": there}
            whole = undisturbed.steered(Config.model_validate(shorter), _forgetting(own.changes))
            compare(folder, own, whole, self.keep, at, manifest.takes)

    def _forecast(self) -> None:
        super()._forecast()
        calls = [call for call in range(1, 3 * self.segments + 2) if self.crew.calls + call not in self.crew.coming]
        kinds = [kind for kind in STEERS if self.draw.random() < 0.4]
        coming = dict(zip(self.draw.sample(calls, len(kinds)), kinds, strict=True))
        self.crew.coming |= {self.crew.calls + call: kind for call, kind in coming.items()}
        self.told.append(f"coming {coming}")

    async def _seen(self, status: RunStatus) -> None:
        if status.held_by == "pause" and not status.at_work and not status.ended:
            if self.draw.random() < 0.3:
                await self._edit()
            if self.draw.random() < 0.5:
                await self._asked("unpause", self.scheduler.pause(status.run_id, False))

    async def _strike(self, what: str) -> None:
        if what not in STEERS:
            await super()._strike(what)
            if what == "cluster":
                for run_id in self.branches:
                    await self.scheduler.resume(run_id, str(self.root), False)
            return
        self.told.append(f"{what} at call {self.crew.calls}")
        if what == "pause":
            await self._asked(what, self.scheduler.pause(self.run_id, True))
        elif what == "branch":
            await self._branch()
        elif what == "steer":
            await asyncio.gather(*(self._edit() for _ in range(self.draw.choice((1, 1, 2)))))
        else:
            edit = asyncio.ensure_future(self._edit())
            await asyncio.sleep(self.draw.choice((0.0, 0.0, 0.002, 0.01)))
            edit.cancel()
            await asyncio.wait({edit})
            await super()._strike("scheduler")

    async def _edit(self) -> None:
        said: dict[str, Any] = {"prompt": self.draw.choice((None, "a blue square", "a red square"))}
        said["seed"] = self.draw.choice((None, 3, 4)) if said["prompt"] else 3
        later, request = self.draw.choice((None, None, 2, 3)), f"{self.draw.random()}"
        edit = await self._asked("edit", self.scheduler.steer(self.run_id, later, said, request))
        if edit is not None:
            self.accepted.append(edit)

    async def _branch(self) -> None:
        if len(self.branches) < 2:
            run_id, at = f"{self.run_id}-{len(self.branches)}", self.draw.randint(0, 4)
            said = {"prompt": self.draw.choice((None, "a blue square")), "seed": self.draw.choice((None, 9))}
            asked = run_id, str(self.root), self.run_id, at, said, at + self.draw.randint(1, 2), False, run_id
            if await self._asked("branch", self.scheduler.branch(*asked)) is not None:
                self.branches[run_id] = at

    async def _asked(self, what: str, answer: Any) -> Any:
        """The answer; None where it is refused."""
        try:
            answered = await answer
        except (ConfigError, RunEnded, UnknownRun) as refused:
            self.told.append(f"{what} is refused: {refused}")
            self.done[f"{what} refused"] += 1
            return None
        self.told.append(f"{what} is done: {answered}")
        self.done[what] += 1
        return answered


def _forgetting(changes: Iterable[Change]) -> tuple[Change, ...]:
    """The changes without what tells their requests apart."""
    return tuple(replace(change, request="") if isinstance(change, Edit) else change for change in changes)


def storm(
    root: Path,
    seeds: range,
    long_share: float = 0.01,
    patience_s: float = 1e9,
    *,
    steered: bool = False,
    causal: bool = False,
) -> Counter[str]:
    """Lives so many histories; what has happened in them. AssertionError names the seed of one that went wrong."""
    model = root / "model" / ("causal" if causal else "wan")
    if not (model / "model_index.json").exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, causal)
    (root / "whole").mkdir(exist_ok=True)
    (root / "hurt").mkdir(exist_ok=True)
    undisturbed, counts, began = Undisturbed(root / "whole", model), Counter[str](), time.monotonic()
    crew = Weather(random.Random())
    pause, stages.RETRY_PAUSE_S = stages.RETRY_PAUSE_S, 0.01
    try:
        for seed in seeds:
            if time.monotonic() - began > patience_s:
                break
            kind = SteeredHistory if steered else History
            history = kind(seed, root / "hurt", model, long_share, crew, causal=causal)
            try:
                history.check(asyncio.run(history.live()), undisturbed)
            except Exception as error:
                raise AssertionError(f"history {seed}: {error!r}\n" + "\n".join(history.told)) from error
            told, crew = history.told, history.crew
            counts += Counter(line.split(": ")[1].split()[0] for line in told if line.startswith(("done", "cancelled")))
            counts += Counter(["history"] + ["81 frames"] * (history.shape.frames == 81))
            counts += history.done
            for path in (root / "hurt").iterdir():
                if path.name.startswith("storm-"):
                    shutil.rmtree(path)
    finally:
        stages.RETRY_PAUSE_S = pause
        asyncio.run(crew.end())
        undisturbed.end()
    return counts + crew.happened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--steered", action="store_true", help="also edits, pauses and branches")
    parser.add_argument("--causal", action="store_true", help="runs of a causal model")
    asked = parser.parse_args()
    seeds = range(asked.first, asked.first + asked.count)
    counts = storm(asked.folder, seeds, patience_s=asked.seconds, steered=asked.steered, causal=asked.causal)
    print(json.dumps(dict(counts)))


if __name__ == "__main__":
    main()
