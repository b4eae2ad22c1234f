"""A run as a user starts it, whose processes are killed one after the other until it is done all the same.

The job is a process of its own, started again with `--resume` as often as it dies; so is the observer, which says in
which stages the run is. This process never joins the Ray that it kills.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from edit_ray.runs.folder import RunFolder
from jobs.demo import private_ray
from tests.chaos.processes import MARK, actor_of, encoder_of, kill, marked, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
VICTIMS = {"GPU actor": "DenoiserActor", "store actor": "CacheStoreActor", "scheduler": "SegmentSchedulerActor"}
OTHER_VICTIMS = ("driver", "encoder", "head")
PHASES = (
    *("prepare", "denoise", "spill", "decode", "encode", "between latents and manifest"),
    *("model load", "recovery"),
)
OBSERVER = """
import json, sys, time
from edit_ray import LongVideoClient
client = LongVideoClient(output=sys.argv[1])
while True:
    for status in client.runs():
        print(json.dumps([status.run_id, status.state, status.committed, status.at_work]), flush=True)
    time.sleep(0.005)
"""
LIMIT_S = 240.0  # in which one run must end, however often it was hurt


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


class Chaos:
    """One run that is hurt. `seed` decides who is killed when; `kills` is how often at least."""

    def __init__(self, ray, root, config, seed, *, window, victims=tuple(VICTIMS), log=print):
        self.ray, self.root, self.config, self.random = ray, root, config, random.Random(seed)
        self.window, self.victims, self.log = window, victims, log
        self.hit = Counter()  # (victim, phase) -> kills
        self.now = ("", "", 0, [])
        self.observer = self.job = None

    def survive(self, run_id, kills):
        """Kills until it is done; returns how often something was killed."""
        self.run_id, done, deadline = run_id, 0, time.monotonic() + LIMIT_S
        self.folder = RunFolder(self.root, run_id)
        while True:
            assert time.monotonic() < deadline, f"run {run_id} does not end: {self.now}"
            self._look()
            if done < kills:
                done += self._hurt()
            else:
                time.sleep(0.05)
            code = None if self.job is None else self.job.poll()
            if code is not None:
                said = self._end(self.job)
                self.job = None
                if code == 0:
                    break
                self.log(f"    the job has ended with {code}: {said.strip().splitlines()[-1:]}")
        self._end(self.observer)
        return done

    def _look(self):
        """The job and the observer are there."""
        if self.job is None:
            job = str(REPOSITORY / "jobs" / "long_video.py")
            self.job = self._spawn(
                job, "--config", self.config, "--output", self.root, "--run-id", self.run_id, "--resume"
            )
        if self.observer is None or self.observer.poll() is not None:
            self._end(self.observer)
            self.observer = self._spawn("-c", OBSERVER, self.root)
            self.follower = threading.Thread(target=self._follow, args=(self.observer,), daemon=True)
            self.follower.start()

    def _spawn(self, *arguments):
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={name: value for name, value in self.ray.environment.items() if name != MARK},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def _follow(self, observer):
        for line in observer.stdout:
            with contextlib.suppress(ValueError):  # what it says when it dies is no JSON
                said = json.loads(line)
                self.now = tuple(said) if said[0] == self.run_id else self.now

    def _phases(self):
        """The phases that the run is in at this moment, as far as is known."""
        _, state, committed, at_work = self.now
        stages = dict(at_work)
        found = {stage for stage in stages if stage in PHASES}
        if stages.get("denoise") is not None and stages["denoise"] % (self.window + 1) == 0:
            found.add("spill")  # it is one of those whose residuals others reuse
        if self.folder.latents(committed).exists() and state == "running":
            found.add("between latents and manifest")
        return found

    def _hurt(self):
        """Waits for a moment that is still wanted, then kills; False where none came."""
        missing = [phase for phase in PHASES if not any(key[1] == phase for key in self.hit)]
        wanted = self.random.choice(missing or PHASES)
        unhurt = [victim for victim in self.victims if not any(key[0] == victim for key in self.hit)]
        victim = self.random.choice(unhurt or self.victims)
        if victim == "encoder":
            return self._hurt_encoder()
        if wanted in ("model load", "recovery"):
            return self._hurt_twice("GPU actor" if wanted == "model load" else "scheduler", wanted)
        deadline = time.monotonic() + 5
        while wanted not in self._phases():
            if time.monotonic() > deadline or self.job.poll() is not None:
                return False
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 0.03))
        return self._kill(victim, wanted)

    def _hurt_encoder(self):
        """The process that encodes a segment, as soon as there is one."""
        deadline = time.monotonic() + 5
        while (pid := encoder_of(self.ray.mark)) is None:
            if time.monotonic() > deadline or self.job.poll() is not None:
                return False
        kill(pid)
        return self._note("encoder", "encode")

    def _hurt_twice(self, victim, phase):
        """Once, and again as soon as the next one has begun."""
        if victim not in self.victims or not self._kill(victim, "any"):
            return False
        wait_for(lambda: actor_of(self.ray.mark, VICTIMS[victim]), 60, f"another {victim}")
        time.sleep(self.random.uniform(0, 0.5))
        return self._kill(victim, phase)

    def _kill(self, victim, phase):
        if victim == "head":
            self.ray.kill()
            wait_for(lambda: not marked(self.ray.mark), 60, "no actor outlives its Ray")
            self.ray.end()
            self.ray.start()
            self._end(self.job)
            self.job = None
        elif victim == "driver":
            self._end(self.job)
            self.job = None
        else:
            pid = actor_of(self.ray.mark, VICTIMS[victim])
            if pid is None:
                return False
            kill(pid)
        return self._note(victim, phase)

    def _note(self, victim, phase):
        self.hit[victim, phase] += 1
        self.log(f"  {victim} killed in phase: {phase}; {self.now[1:]}")
        return True

    def _end(self, process):
        """Whatever it still has said."""
        if process is None:
            return ""
        process.kill()
        process.wait()
        if process is self.observer:
            self.follower.join()
            self.observer = None
        said = process.stdout.read()
        process.stdout.close()
        return said
