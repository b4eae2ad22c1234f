"""Random histories on Ray: those of `storm.py`, lived by real actors that are killed soon after a random event.

HISTORIES=100 SEED=7 pytest -m chaos -s tests/chaos/test_storm_on_ray.py
"""

import asyncio
import os
import random
import secrets
import time
from collections import Counter

import pytest

from edit_ray import LongVideoClient
from edit_ray.runs.event_log import read_events
from edit_ray.testing import save_random_wan
from tests.chaos.harness import VICTIMS, PrivateRay
from tests.chaos.processes import actors_of, kill, marked, wait_for
from tests.chaos.storm import History, Undisturbed, Weather, compare

HISTORIES = int(os.environ.get("HISTORIES", "3"))
SEED = int(os.environ.get("SEED", "0"))
PATIENCE_S = 240.0


class Door:
    """A client, asked as a segment scheduler is."""

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


class HistoryOnRay(History):
    """`happened` counts what has come to whom."""

    def __init__(self, seed, root, model, client, mark, happened):
        super().__init__(seed, root, model, 0.0, Weather(random.Random()))
        self._client, self._mark, self._happened = client, mark, happened

    def _door(self):
        return Door(self._client)

    def _forecast(self):
        kinds = [self.draw.choice(list(VICTIMS))] if self.draw.random() < 0.6 else []
        kinds += ["cancel"] if self.draw.random() < 0.7 else []
        self._coming = sorted((self.draw.randrange(3 * self.segments), kind) for kind in kinds)
        self._before = self._events()
        self.told.append(f"coming {self._coming}")

    async def _end(self):
        began = time.monotonic()
        while True:
            while self._coming and self._events() - self._before >= self._coming[0][0]:
                await asyncio.sleep(self.draw.uniform(0, 0.05))
                await self._come(self._coming.pop(0)[1])
            status = await asyncio.to_thread(self._client.status, self.run_id)
            if status.ended:
                assert status.state in ("done", "cancelled"), status.error
                return status.state
            assert time.monotonic() < began + PATIENCE_S, status
            await asyncio.sleep(0.02)

    def _events(self):
        return len(read_events(self.folder.events))

    async def _come(self, kind):
        self.told.append(f"{kind} at {len(self.folder.read_manifest().segments)}")
        if kind == "cancel":
            await asyncio.to_thread(self._client.cancel, self.run_id)
        else:
            pids = actors_of(self._mark, VICTIMS[kind])
            if not pids:
                return
            kill(self.draw.choice(pids))
        self._happened[kind] += 1


@pytest.fixture
def ray_of_our_own(monkeypatch):
    ray = PrivateRay(secrets.token_hex(8)).start()
    for name, value in ray.environment.items():
        monkeypatch.setenv(name, value)
    yield ray
    import ray as joined

    joined.shutdown()
    ray.end()


def test_whatever_happens_on_ray_every_file_is_what_it_would_be(ray_of_our_own, tmp_path):
    mark, happened = ray_of_our_own.mark, Counter()
    model = save_random_wan(tmp_path / "wan", expand_timesteps=True)
    root, whole = tmp_path / "hurt", tmp_path / "whole"
    root.mkdir(), whole.mkdir()
    undisturbed, client = Undisturbed(whole, model), LongVideoClient(output=root)
    print(f"\nseeds {SEED} to {SEED + HISTORIES - 1}")
    try:
        for seed in range(SEED, SEED + HISTORIES):
            history = HistoryOnRay(seed, root, model, client, mark, happened)
            try:
                manifest = asyncio.run(history.live())
                compare(
                    history.folder,
                    manifest,
                    undisturbed.of(history.shape, history.segments, history.takes),
                    history.keep,
                )
            except BaseException as error:
                error.add_note(f"history {seed}\n" + "\n".join(history.told))
                raise
            happened["history"] += 1
    finally:
        undisturbed.end()
        client.close()
        print(dict(happened))
    ray_of_our_own.end()
    wait_for(lambda: not marked(mark), 20, "no process outlives its Ray")
