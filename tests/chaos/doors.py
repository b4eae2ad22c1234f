"""An HTTP door of two replicas on a Ray of its own whose processes are killed, and the clients who ask it meanwhile."""

import contextlib
import http.client
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from edit_ray.runs.folder import folders_in
from jobs.demo import free_port
from tests.chaos.harness import REPOSITORY
from tests.chaos.processes import actors_of, kill, marked, wait_for
from tests.chaos.run_files import check_same, configuration, left_over

VICTIMS = {
    "replica": "ServeReplica",
    "proxy": "ProxyActor",
    "scheduler": "SegmentSchedulerActor",
    "GPU actor": "DenoiserActor",
    "head": None,
}
DECK = {"replica": 3, "proxy": 2, "scheduler": 3, "GPU actor": 3, "head": 1}  # how often each among twelve kills
MODES = ("history", "overlap", "warm-start", "none")
SCENES = [{"start": "0s", "prompt": "a red circle"}, {"segment": 2, "prompt": "a blue square"}]
CLIENTS = 6  # so that videos wait, too
LOST = 0.3  # of the answers to POST, those that a client does not wait for
PAUSE_S = 8.0  # at most, between two kills
ANSWER_S = 60.0  # in which every request is answered, whoever is dead
VIDEO_S = 300.0  # in which a video is made, however often it was hurt


class DoorOnRay:
    """The door. A connection may break only while its proxy is dead: `may_break` says of a request whether it was."""

    def __init__(self, ray, root, models):
        self.ray, self.root = ray, root
        self.configs = [configuration(root.parent / f"{mode}.yaml", models, mode) for mode in MODES]
        self.port, self._process = free_port(), None
        self._is_down, self._up_at = True, 0.0

    def start(self):
        """Returns how many runs of a lost cluster it continues."""
        named = [word for config in self.configs for word in ("--config", str(config))]
        options = (*named, "--replicas", "2", "--port", str(self.port), "--output", str(self.root))
        log = self.root.parent / "door.log"
        with log.open("a") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edit_ray.cli", "serve", *options],
                cwd=REPOSITORY,
                env=self.ray.environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        said = list(itertools.takewhile(lambda line: not line.startswith("http"), self._process.stdout))
        assert self._process.poll() is None, f"the door has not started: {log.read_text()[-2000:]}"
        return sum(line.endswith("is continued\n") for line in said)

    def kill(self, victim, draw):
        """Kills one process of the victim's kind; with the head all that is on its machine."""
        if victim == "head":
            self._is_down = True
            self.ray.kill()
            wait_for(lambda: not marked(self.ray.mark), 60, "no actor outlives its Ray")
            self.end()
            self.ray.end()
            self.ray.start()
            return f", {self.start()} continued"
        pid = draw.choice(wait_for(lambda: sorted(actors_of(self.ray.mark, VICTIMS[victim])), 90, f"a {victim}"))
        self._is_down |= victim == "proxy"
        kill(pid)
        wait_for(lambda: pid not in marked(self.ray.mark), 10, f"the {victim} is dead")
        return ""

    def look(self):
        """Whether it answers."""
        if self._is_down:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/healthz")[0] == 200:
                    self._up_at, self._is_down = time.monotonic(), False
        return not self._is_down

    def may_break(self, began):
        return self._is_down or began < self._up_at

    def ask(self, method, path, body=None, *, waits=True, **headers):
        """Status, headers and JSON, by a connection of its own, so that either replica may answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)) as connection:
            about = {"Content-Type": "application/json", **headers}
            connection.request(method, path, None if body is None else json.dumps(body), about)
            if not waits:
                return None
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def end(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


class Clients:
    """Those who ask a door for videos and follow them. `answers` counts what they got, `made` the videos by key."""

    def __init__(self, door, seed):
        self._door, self._seed, self._numbers = door, seed, itertools.count()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._threads, self._asked = ThreadPoolExecutor(CLIENTS), []
        self.made, self.answers, self.longest_s = {}, Counter(), {"GET": 0.0, "POST": 0.0}

    def start(self):
        self._asked = [self._threads.submit(self._live) for _ in range(CLIENTS)]

    def check(self):
        """Raises what a client has found."""
        for asked in self._asked:
            if asked.done():
                asked.result()

    def end(self, *, wait=True):
        """Each makes its last video to the end."""
        self._stop.set()
        for asked in self._asked if wait else ():
            asked.result(VIDEO_S + ANSWER_S)
        self._threads.shutdown(wait=wait)

    def _live(self):
        while not self._stop.is_set():
            with self._lock:
                number = next(self._numbers)
            self.video(f"{self._seed}-{number}", MODES[number % len(MODES)], random.Random(f"{self._seed} {number}"))

    def video(self, key, mode, draw):
        """Makes one; its key is good for the same video before and after its end, and nobody forgets it meanwhile."""
        body = {"model": mode, "edit_ray": {"storyboard": SCENES, "num_segments": 4, "seed": 3}}
        post, deadline = ("POST", "/v1/videos", body, {"Idempotency-Key": key}), time.monotonic() + VIDEO_S
        while draw.random() < LOST:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._door.ask(*post[:3], waits=False, **post[3])
            self.answers["POST, not waited for"] += 1
            time.sleep(draw.uniform(0, 0.3))
        video = self._answered(*post)
        self.made[key] = video["id"]
        while video["status"] not in ("completed", "failed"):
            assert time.monotonic() < deadline, f"{key} is not made: {video}"
            time.sleep(draw.uniform(0.02, 0.3))
            video = self._answered("GET", f"/v1/videos/{video['id']}")
        assert video["status"] == "completed", video
        assert self._answered(*post)["id"] == video["id"]
        return video["id"]

    def _answered(self, method, path, body=None, headers=None):
        """The answer 200, asked for until it comes. Meanwhile nothing but what a client can wait out."""
        deadline = time.monotonic() + VIDEO_S
        while time.monotonic() < deadline:
            began = time.monotonic()
            try:
                status, about, said = self._door.ask(method, path, body, **headers or {})
            except (OSError, http.client.HTTPException):
                if not self._door.may_break(began):
                    raise
                self.answers[f"{method} broken"] += 1
                time.sleep(0.2)
                continue
            self.answers[f"{method} {status}"] += 1
            self.longest_s[method] = max(self.longest_s[method], time.monotonic() - began)
            if status == 200:
                return json.loads(said)
            assert status == 503, f"{method} {path}: {status} {said[:500]}"
            assert about["Retry-After"], f"{method} {path}: 503 without Retry-After: {said[:500]}"
            time.sleep(0.2)
        raise AssertionError(f"{method} {path} is not answered")


def check_videos(root, whole, made):
    """One folder for each key, each with the bytes of the video to which nothing has happened."""
    there = {folder.run_id for folder in folders_in(root)} - set(whole.values())
    assert there == set(made.values()), "a video is lost, or made twice"
    assert len(there) == len(made), "two keys have one video"
    for key, video_id in made.items():
        check_same(root / whole[MODES[int(key.rpartition("-")[2]) % len(MODES)]], root / video_id)
    assert left_over(root) == []
