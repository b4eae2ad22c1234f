"""Random histories on Ray: those of `storm.py`, steered too, lived by real actors that are killed after random events.

HISTORIES=100 SEED=7 CAUSAL=1 pytest -m chaos -s tests/chaos/test_storm_on_ray.py

`CAUSAL=1` makes them histories of a causal model, with both kinds of stored K/V and a change of prompt.
"""

import asyncio
import os
import random
import time
from collections import Counter

import pytest
import ray

from edit_ray import LongVideoClient
from edit_ray.runs.event_log import read_events
from tests.chaos.harness import VICTIMS
from tests.chaos.processes import actors_of, kill
from tests.chaos.storm import SteeredHistory, Weather
from tests.chaos.undisturbed import Undisturbed, save_model

HISTORIES = int(os.environ.get("HISTORIES", "3"))
SEED = int(os.environ.get("SEED", "0"))
CAUSAL = os.environ.get("CAUSAL", "0") == "1"
PATIENCE_S = 240.0
STEERS = ("steer", "pause", "branch")


class SchedulerOverRay:
    """A client, asked as `SegmentSchedulerActor` is."""

    def __init__(self, client):
        self._client = client

    async def submit(self, run_id, config, *_):
        await asyncio.to_thread(self._client.submit, config, run_id=run_id)

    async def resume(self, run_id, *_):
        await asyncio.to_thread(self._client.resume, run_id)

    async def extend(self, run_id, _, segments, *__):
        await asyncio.to_thread(self._client.extend, run_id, segments)

    async def reroll(self, run_id, _, start, seed, prompt, *__):
        await asyncio.to_thread(lambda: self._client.reroll(run_id, start, seed=seed, prompt=prompt))

    async def steer(self, run_id, from_segment, said, request):
        return await asyncio.to_thread(lambda: self._client.steer(run_id, from_segment, request=request, **said))

    async def pause(self, run_id, paused):
        return await asyncio.to_thread(self._client.pause if paused else self._client.unpause, run_id)

    async def branch(self, run_id, _, source, at, said, segments, __, request):
        asked = {"new_id": run_id, "num_segments": segments, "request": request, **said}
        return await asyncio.to_thread(lambda: self._client.branch(source, at, **asked))


class HistoryOnRay(SteeredHistory):
    """`happened` counts what has come to whom."""

    def __init__(self, seed, root, model, client, mark, happened):
        super().__init__(seed, root, model, 0.0, Weather(random.Random()), causal=CAUSAL)
        self._client, self._mark, self._happened = client, mark, happened

    def _new_scheduler(self):
        return SchedulerOverRay(self._client)

    def _forecast(self):
        kinds = [self.draw.choice(list(VICTIMS))] if self.draw.random() < 0.6 else []
        kinds += ["cancel"] if self.draw.random() < 0.7 else []
        kinds += [kind for kind in STEERS if self.draw.random() < 0.4]
        self._coming = sorted((self.draw.randrange(2 * self.segments), kind) for kind in kinds)
        self._before = self._events()
        self.told.append(f"coming {self._coming}")

    async def _end(self, run_id=None):
        began = time.monotonic()
        while True:
            while run_id is None and self._coming and self._events() - self._before >= self._coming[0][0]:
                await asyncio.sleep(self.draw.uniform(0, 0.05))
                await self._come(self._coming.pop(0)[1])
            status = await asyncio.to_thread(self._client.status, run_id or self.run_id)
            if run_id is None:
                await self._seen(status)
            if status.ended:
                assert status.state in ("done", "cancelled"), status.error
                return status.state
            assert time.monotonic() < began + PATIENCE_S, status
            await asyncio.sleep(0.005)

    def _events(self):
        return len(read_events(self.folder.events))

    async def _come(self, kind):
        self.told.append(f"{kind} at {len(self.folder.read_manifest().segments)}")
        if kind == "cancel":
            await asyncio.to_thread(self._client.cancel, self.run_id)
        elif kind in STEERS:
            await self._strike(kind)
        else:
            pids = actors_of(self._mark, VICTIMS[kind])
            if not pids:
                return
            kill(self.draw.choice(pids))
        self._happened[kind] += 1


@pytest.fixture
def client(ray_of_our_own, tmp_path, monkeypatch):
    for name, value in ray_of_our_own.environment.items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "hurt"
    root.mkdir()
    client = LongVideoClient(output=root)
    yield client
    client.close()
    ray.shutdown()


def test_whatever_happens_on_ray_every_file_is_what_it_would_be(ray_of_our_own, client, tmp_path):
    happened, whole = Counter(), tmp_path / "whole"
    whole.mkdir()
    model = save_model(tmp_path / "wan", CAUSAL)
    undisturbed = Undisturbed(whole, model)
    print(f"\nseeds {SEED} to {SEED + HISTORIES - 1}")
    try:
        for seed in range(SEED, SEED + HISTORIES):
            history = HistoryOnRay(seed, client.output, model, client, ray_of_our_own.mark, happened)
            try:
                history.check(asyncio.run(history.live()), undisturbed)
            except BaseException as error:
                error.add_note(f"history {seed}\n" + "\n".join(history.told))
                raise
            happened.update(history.done, history=1)
    finally:
        undisturbed.end()
        print(dict(happened))
    assert happened["history"] == HISTORIES
    assert sum(happened[kind] for kind in ("cancel", *VICTIMS)) >= HISTORIES // 2, "enough has happened"
