"""Two live runs, each of a job as a user starts it, whose processes are killed until both are done all the same.

A job is started again with `--resume` as often as it dies. Where a run stands is read from its folder: this process
never joins the Ray that it kills.
"""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from edit_ray.errors import UnknownRun
from edit_ray.runs.event_log import read_events
from edit_ray.runs.folder import RunFolder
from jobs.demo import private_ray
from tests.chaos.processes import MARK, actors_of, encoder_of, kill, marked, title_of, wait_for
from tests.chaos.run_files import WINDOW, check_same, configuration, left_over

REPOSITORY = Path(__file__).resolve().parents[2]
VICTIMS = {"GPU actor": "DenoiserActor", "store actor": "CacheStoreActor", "scheduler": "SegmentSchedulerActor"}
ANYONE = {"GPU actor": 8, "store actor": 6, "scheduler": 8, "driver": 4, "encoder": 8, "head": 1}  # and how often
AIMED = {
    "model load": ("GPU actor",),
    "prepare": ("GPU actor", "scheduler", "store actor"),
    "denoise": ("GPU actor", "store actor"),
    "spill": ("GPU actor", "store actor"),
    "decode": ("GPU actor",),
    "encode": ("GPU actor", "encoder"),
    "between latents and manifest": ("GPU actor", "scheduler"),
    "commit": ("scheduler",),
    "finalize": ("GPU actor", "scheduler"),
    "recovery": ("scheduler",),
}
BEGINNING_S = {"model load": 6.0, "recovery": 4.0}  # that an actor takes from its process's start until it is at work
EACH_PAIR = 5  # kills anywhere: as many as leave it time to recover, on a busy machine too
LIMIT_S = 600.0  # in which a pair of runs must end, however often it was hurt


class PrivateRay:
    """A Ray of its own that can be killed whole, and started again."""

    def __init__(self, mark):
        self.mark, self.environment, self._stack = mark, {}, contextlib.ExitStack()

    def start(self):
        os.environ[MARK] = self.mark
        folder = tempfile.TemporaryDirectory(prefix="er-", dir="/tmp", ignore_cleanup_errors=True)
        temp = self._stack.enter_context(folder)
        self.environment = self._stack.enter_context(private_ray(Path(temp)))
        del os.environ[MARK]
        return self

    def kill(self):
        """The head with all that belongs to Ray; the actors have to find out by themselves."""
        for pid, title in marked(self.mark).items():
            if not any(title.startswith(f"ray::{actor}") for actor in VICTIMS.values()):
                kill(pid)

    def end(self):
        self._stack.close()


@dataclass
class Run:
    """One of the pair."""

    folder: RunFolder
    config: Path
    job: subprocess.Popen | None = None
    done: bool = False

    def stages(self):
        """Those in which the run is at this moment, as its folder shows."""
        try:
            manifest = self.folder.read_manifest()
        except UnknownRun:
            return set()
        events = read_events(self.folder.events)
        begun = [event for event in events if event.get("event") in ("gpu_actor", "segment_begun")]
        k = len(manifest.segments)
        if manifest.end is not None:
            return set()
        if k == manifest.num_segments:
            return {"finalize"}
        latest = begun[-1].get("segment") if begun else None  # of each life the first event names its GPU actor
        found = {"prepare"} if latest is None else set()
        if latest is not None and not self.folder.latents(latest).exists():
            found |= {"denoise", "spill"} if latest % (WINDOW + 1) == 0 else {"denoise"}
        if self.folder.media(k).exists():
            found.add("commit")
        elif self.folder.latents(k).exists():
            found.add("decode")  # or soon encoded
        return found | ({"between latents and manifest"} if self.folder.latents(k).exists() else set())


class Chaos:
    """Pairs of runs that are hurt. `seed` decides who is killed when; `hit` counts the kills by victim and stage."""

    def __init__(self, ray, root, models, seed, log=print):
        self.ray, self.root, self.models, self.log = ray, root, models, log
        self.random = random.Random(seed)
        self.anywhere, self.aimed, self.missed = Counter(), Counter(), Counter()
        self.took_s, self.instants = 0.0, []
        self.runs = []

    def pair(self, number, modes, strike):
        """Two runs at a time, to the end, then compared in every file with those to which nothing has happened."""
        whole = [f"whole-{mode}" for mode in modes]
        if not all((self.root / name).exists() for name in whole):
            began = time.monotonic()
            self._live(whole, modes, lambda: time.sleep(0.05))
            self.took_s = time.monotonic() - began
        began = time.monotonic()
        self.instants = sorted(began + self.random.uniform(0, 2 * self.took_s) for _ in range(EACH_PAIR))
        names = [f"hurt-{number}-{mode}" for mode in modes]
        self._live(names, modes, strike)
        for name, same in zip(names, whole, strict=True):
            check_same(self.root / same, self.root / name)
        assert left_over(self.root) == []
        kills = sum(self.anywhere.values()) + sum(self.aimed.values())
        self.log(f"  {modes}: the same bytes, after {time.monotonic() - began:.0f} s; {kills} kills so far")

    def _live(self, names, modes, strike):
        configs = [configuration(self.root / f"{mode}.yaml", self.models, mode) for mode in modes]
        self.runs = [Run(RunFolder(self.root, name), config) for name, config in zip(names, configs, strict=True)]
        deadline = time.monotonic() + LIMIT_S
        while True:
            assert time.monotonic() < deadline, (
                f"a run does not end: {[(run.folder, run.stages()) for run in self.runs]}"
            )
            for run in self.runs:
                self._look(run)
            if all(run.done for run in self.runs):
                return
            strike()

    def _look(self, run):
        """A job is there until its run is done. No run fails, whoever dies."""
        if run.done or (run.job is not None and run.job.poll() is None):
            return
        if run.job is not None:
            code, said = run.job.returncode, run.job.stdout.read().strip().splitlines()[-1:]
            self._end_job(run)
            with contextlib.suppress(UnknownRun):
                manifest = run.folder.read_manifest()
                assert manifest.state in ("open", "done"), f"{run.folder.run_id} is lost: {manifest.error}"
            run.done = code == 0
            if run.done:
                return
            self.log(f"    the job of {run.folder.run_id} has ended with {code}: {said}")
        options = ("--config", run.config, "--output", self.root, "--run-id", run.folder.run_id, "--resume")
        run.job = subprocess.Popen(
            [sys.executable, *map(str, (REPOSITORY / "jobs" / "long_video.py", *options))],
            env={name: value for name, value in self.ray.environment.items() if name != MARK},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def _end_job(self, run):
        if run.job is not None:
            run.job.kill()
            run.job.wait()
            run.job.stdout.close()
            run.job = None

    def strike_anywhere(self, whom=tuple(ANYONE)):
        """Kills at instants drawn before, over twice the time of undisturbed runs, whatever these are at."""
        time.sleep(0.02)
        if not self.instants or time.monotonic() < self.instants[0]:
            return
        del self.instants[0]
        stages = set().union(*(run.stages() for run in self.runs))
        victim = self.random.choices(whom, [ANYONE[victim] for victim in whom])[0]
        if self._kill(victim):
            self._note(self.anywhere, victim, "+".join(sorted(stages)) or "start, end or recovery")

    def strike_in(self, number):
        """Kills whoever works on a stage while it does, until each stage was hit as often as that."""

        def strike():
            left = [stage for stage in AIMED if self.hits(stage) < number]
            if not left:
                return time.sleep(0.02)
            stage = self.random.choice(left)
            victim = self.random.choice(AIMED[stage])
            struck = self._strike_again if stage in BEGINNING_S else self._strike_during
            return struck(stage, victim)

        return strike

    def hits(self, stage):
        """How often a stage was hit that was aimed at."""
        return sum(count for (_, of), count in self.aimed.items() if of == stage)

    def _strike_during(self, stage, victim):
        """Hit counts what the folder shows both before and after the kill, as a killed process changes it no more."""
        deadline, known, pids = time.monotonic() + 20, 0.0, []
        while not (there := self._in(stage)):
            if (now := time.monotonic()) - known > 1:
                known, pids = now, self._pids(victim)
            if now > deadline or any(run.job.poll() is not None for run in self.runs if run.job):
                return
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 0.02))
        pid = encoder_of(self.ray.mark) if victim == "encoder" else self._at_work(pids, stage)
        if pid is not None:
            kill(pid)
            run = there[0]
            hit = victim == "encoder" or (stage if stage != "encode" else "decode") in run.stages()
            self._note(self.aimed if hit else self.missed, victim, stage)

    def _strike_again(self, stage, victim):
        """Once, and again at any instant of the next one's beginning."""
        before = self._pids(victim)
        if not before or not any(run.stages() for run in self.runs):
            return time.sleep(0.02)
        kill(self.random.choice(before))
        pids = wait_for(lambda: set(self._pids(victim)) - set(before), 60, f"another {victim}")
        time.sleep(self.random.uniform(0, BEGINNING_S[stage]))
        kill(pids.pop())
        return self._note(self.aimed, victim, stage)

    def _in(self, stage):
        """The runs that are in a stage now."""
        if stage == "encode" and encoder_of(self.ray.mark) is None:
            return []
        return [run for run in self.runs if (stage if stage != "encode" else "decode") in run.stages()]

    def _at_work(self, pids, stage):
        """Of these actors the one whose title says that it is at the stage, else any."""
        method = "denoise" if stage == "spill" else stage
        at_work = [pid for pid in pids if f".{method}_" in title_of(pid)] if len(pids) > 1 else pids
        return self.random.choice(at_work or pids) if pids else None

    def _pids(self, victim):
        return actors_of(self.ray.mark, VICTIMS[victim]) if victim in VICTIMS else []

    def _kill(self, victim):
        """Whether there was one."""
        if victim == "head":
            self.ray.kill()
            wait_for(lambda: not marked(self.ray.mark), 60, "no actor outlives its Ray")
            self.ray.end()
            self.ray.start()
        jobs = [run for run in self.runs if run.job is not None and not run.done]
        if victim in ("head", "driver"):
            for run in jobs if victim == "head" else self.random.sample(jobs, min(1, len(jobs))):
                self._end_job(run)
            return bool(jobs)
        pids = [encoder_of(self.ray.mark)] if victim == "encoder" else self._pids(victim)
        if not pids or pids == [None]:
            return False
        kill(self.random.choice(pids))
        return True

    def _note(self, counter, victim, stage):
        counter[victim, stage] += 1
        said = " (missed)" if counter is self.missed else ""
        self.log(f"    {victim} killed in {stage}{said}")

    def end(self):
        """Ends the jobs that are there."""
        for run in self.runs:
            self._end_job(run)
