"""A run as a user starts it, of which one process is stopped (SIGSTOP) in one stage, for a while or for good.

One observer says in which stage the run is, one client submits every run and streams it. This process never joins Ray.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from edit_ray.errors import UnknownRun
from edit_ray.runs.folder import RunFolder
from tests.chaos.processes import MARK, actor_of, kill, marked, wait_for

STEP_S, LOAD_S, ANSWER_S = 4.0, 30.0, 3.0  # engine.step_timeout_s, load_timeout_s, answer_timeout_s
HANG_S = float(os.environ.get("HANG_S", "6"))  # of a process that goes on by itself
RESTART_S = 45.0  # in which any actor is there again, on a machine that is busy
SEGMENTS = 3
ACTORS = {"GPU actor": "DenoiserActor", "store actor": "CacheStoreActor", "scheduler": "SegmentSchedulerActor"}
VICTIMS = (*ACTORS, "encoder", "client")
STAGES = ("prepare", "denoise", "decode", "encode", "commit", "finalize", "recovery")
ENCODES = {"encode": b"libx264", "finalize": b"+faststart"}  # the stages that have an ffmpeg, and how one knows it
# Until a hang is found: a watchdog looks five times in its time, the client counts one look more; a GPU actor that
# waits for its store is given its time once more.
FOUND_S = {
    "GPU actor": STEP_S * 1.4,
    "store actor": ANSWER_S * 1.4 + STEP_S * 1.4,
    "scheduler": ANSWER_S * 1.4,
    "encoder": STEP_S * 0.7,
    "client": 0.0,
}
CONFIG = """
model: {{path: "{model}"}}
sampling: {{height: 64, width: 64, num_frames: 17, num_inference_steps: 8, seed: 3}}
video: {{num_segments: {segments}}}
prompt_segments: [{{start: 0s, prompt: a red circle}}]
continuity: {{mode: history, history_latents: 2}}
cache: {{policy: warmstart_reuse, inner: fbcache, rel_l1_thresh: 0.5, warm_steps: 2, reuse_window: 2, granularity: 3}}
store: {{host_bytes: 16KiB, allow_tmpfs: true}}
engine:
  {{start_timeout_s: 60, cpu_threads: 1, step_timeout_s: {step}, load_timeout_s: {load}, answer_timeout_s: {answer}}}
"""
OBSERVER = """
import json, sys, time
from edit_ray import LongVideoClient
client = LongVideoClient(output=sys.argv[1], answer_timeout_s=3600)  # the hang is another's to find
print('["ready"]', flush=True)
told = {}
while True:
    for status in client.runs():
        said = json.dumps([status.run_id, status.state, status.at_work])
        if told.get(status.run_id) != said:
            print(said, flush=True)
            told[status.run_id] = said
    time.sleep(0.001)
"""
CLIENT = """
import json, sys
from edit_ray import LongVideoClient
root, config, answer_s = sys.argv[1:]
client = LongVideoClient(output=root, answer_timeout_s=float(answer_s))
print('["ready"]', flush=True)
for line in sys.stdin:
    try:
        run = client.submit(config, run_id=line.strip())
        found = [segment.index for segment in client.stream(run, frames=False)]
    except Exception as error:
        found = [f"{type(error).__name__}: {error}"]
    print(json.dumps([line.strip(), found]), flush=True)
"""


def configuration(path, model):
    times = {"step": STEP_S, "load": LOAD_S, "answer": ANSWER_S}
    path.write_text(CONFIG.format(model=model, segments=SEGMENTS, **times))
    return path


def bound_of(victim, stage, undisturbed_s):
    """Seconds from the stop to the end of the run: the hang is found, its actor is there again, the work is done anew.

    What goes on by itself may have been restarted before, or may not.
    """
    twice = stage == "recovery"  # the scheduler was killed as well
    return max(FOUND_S[victim], HANG_S) + RESTART_S * (1 + twice) + 2 * undisturbed_s


class Talker:
    """A process of ours that prints lines of JSON, which begin with a run's id: the latest of each run."""

    def __init__(self, environment, *arguments):
        self.latest = {}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={name: value for name, value in environment.items() if name != MARK},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.follower = threading.Thread(target=self._follow, daemon=True)
        self.follower.start()
        wait_for(lambda: self.latest, 60, "a process that talks")

    def _follow(self):
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # what Ray says is no JSON
                run_id, *told = json.loads(line)
                self.latest[run_id] = told

    def tell(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.follower.join()
        self.process.stdin.close()
        self.process.stdout.close()


class Hangs:
    """One Ray, one model, one cell of the matrix after the other."""

    def __init__(self, ray, root, config, log=print):
        self.ray, self.root, self.log = ray, root, log
        self.observer = Talker(ray.environment, "-c", OBSERVER, root)
        self.client = Talker(ray.environment, "-c", CLIENT, root, config, ANSWER_S)
        self.undisturbed_s = 0.0

    def end(self):
        self.observer.end()
        self.client.end()

    def whole(self, run_id="whole"):
        """An undisturbed run, and how long it takes once the actors are there."""
        for name in ("warm-up", run_id):
            began = time.monotonic()
            self.client.tell(name)
            self._finish(name, began + 3 * RESTART_S)
            self.undisturbed_s = time.monotonic() - began
        return self.root / run_id

    def live_through(self, run_id, victim, stage, for_good):
        """One cell; returns the run's folder, seconds from the stop to its end, and what was at work when it stopped.

        None where the moment did not come.
        """
        self.client.tell(run_id)
        pid = self._at_the_moment(run_id, victim, stage)
        if pid is None:
            self._finish(run_id, time.monotonic() + 3 * RESTART_S)
            return None
        began, bound_s = time.monotonic(), bound_of(victim, stage, self.undisturbed_s)
        try:
            if not for_good:
                time.sleep(HANG_S)
                _signal(pid, signal.SIGCONT)
            self._wait_for_end(run_id, began + bound_s)
        finally:  # a stopped actor is no more; a client that was stopped for good has not seen the end
            seconds = time.monotonic() - began
            _signal(pid, signal.SIGCONT)
        self._finish(run_id, time.monotonic() + RESTART_S)
        return self.root / run_id, seconds, bound_s

    def _finish(self, run_id, deadline):
        """The client has every segment, and the scheduler and the folder say that the run is done."""
        left = max(0.0, deadline - time.monotonic())
        [found] = wait_for(lambda: self.client.latest.get(run_id), left, f"the client has all of {run_id}")
        assert found == list(range(SEGMENTS))
        assert RunFolder(self.root, run_id).read_manifest().state == "done"
        wait_for(lambda: self._now(run_id)[0] == "done", 30, f"the scheduler says that {run_id} is done")

    def _now(self, run_id):
        """The run's state and what is at work, as the observer was told last."""
        return self.observer.latest.get(run_id, ("unknown", []))

    def _wait_for_end(self, run_id, deadline):
        def ended():
            with contextlib.suppress(UnknownRun):
                return RunFolder(self.root, run_id).read_manifest().end
            return None

        end = wait_for(ended, max(0.0, deadline - time.monotonic()), f"an end of {run_id}")
        assert end.state == "done", end.error

    def _at_the_moment(self, run_id, victim, stage):
        """Stops the victim in the stage, and returns its pid."""
        if victim == "encoder":
            return self._encoder(run_id, ENCODES[stage])
        find = self._finder(victim)
        if stage == "recovery":
            if not self._comes_to(run_id, "denoise", 1):
                return None
            kill(before := actor_of(self.ray.mark, ACTORS["scheduler"]))
            wait_for(lambda: actor_of(self.ray.mark, ACTORS["scheduler"]) not in (None, before), 60, "a scheduler")
        else:
            find = (lambda pid: lambda: pid)(find()) if find() is not None else find
            if not self._comes_to(run_id, stage, None):
                return None
        pid = find()
        return pid if pid is not None and _signal(pid, signal.SIGSTOP) else None

    def _finder(self, victim):
        if victim == "client":
            return lambda: self.client.process.pid
        return lambda: actor_of(self.ray.mark, ACTORS[victim])

    def _comes_to(self, run_id, stage, segment):
        """Whether the run is seen in the stage before it ends."""
        deadline = time.monotonic() + RESTART_S
        while time.monotonic() < deadline:
            state, at_work = self._now(run_id)
            if any(at == stage and segment in (None, index) for at, index in at_work):
                return True
            if state == "done":
                return False
            time.sleep(0.0005)
        return False

    def _encoder(self, run_id, word):
        """Stops an ffmpeg of the GPU actor that does what the word says."""
        parent = wait_for(lambda: actor_of(self.ray.mark, ACTORS["GPU actor"]), 60, "a GPU actor")
        while self._now(run_id)[0] != "done":
            for pid in _children(parent):
                with contextlib.suppress(OSError):
                    if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return pid if _signal(pid, signal.SIGSTOP) else None
        return None


def _children(pid):
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            yield from map(int, (task / "children").read_text().split())


def _signal(pid, number):
    """Whether the process was there to take it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def stopped(mark):
    """Processes of a Ray that are still stopped."""
    found = []
    for pid, title in marked(mark).items():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                found.append(title)
    return found
