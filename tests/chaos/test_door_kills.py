"""SIGKILL of a door's processes while clients ask it: what was accepted is made, once, with undisturbed bytes.

KILLS=50 SEED=7 pytest -m chaos -s tests/chaos/test_door_kills.py

Clients repeat what was not answered, with the same `Idempotency-Key`. The door has two replicas; killed are one of
them, Serve's proxy, the segment scheduler, a GPU actor, and the Ray head with all that is on its machine: a new door on
a new cluster goes on. A GET of a video that was accepted is 200, or 503 with `Retry-After`; only a dead proxy breaks
connections.
"""

import os
import random
import secrets
import time
from collections import Counter

import pytest

from tests.chaos.doors import CLIENTS, DECK, MODES, PAUSE_S, Clients, DoorOnRay, check_videos
from tests.chaos.processes import wait_for
from tests.chaos.run_files import save_models

KILLS = int(os.environ.get("KILLS", "10"))
SEED = int(os.environ.get("SEED", str(secrets.randbelow(10**6))))


@pytest.fixture
def door(ray_of_our_own, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    door = DoorOnRay(ray_of_our_own, root, save_models(tmp_path / "models"))
    door.start()
    yield door
    door.end()


def victims(draw):
    """Whom to kill, one after another: those of a shuffled deck, then of the next one."""
    while True:
        deck = [victim for victim, number in DECK.items() for _ in range(number)]
        yield from draw.sample(deck, len(deck))


def test_what_a_door_has_accepted_is_made_once_whoever_is_killed(door):
    draw, kills = random.Random(SEED), Counter()
    print(f"\nseed {SEED}, {KILLS} kills, {CLIENTS} clients")
    wait_for(door.look, 60, "the door answers")
    clients, began = Clients(door, SEED), time.monotonic()
    whole = {mode: clients.video(f"whole-{mode}", mode, random.Random(0)) for mode in MODES}
    print(f"  {len(MODES)} undisturbed videos, one after another: {time.monotonic() - began:.0f} s")
    clients.made.clear()
    clients.start()
    began, order = time.monotonic(), victims(draw)
    try:
        while sum(kills.values()) < KILLS:
            until = time.monotonic() + draw.uniform(0, PAUSE_S)
            while time.monotonic() < until:
                door.look()
                clients.check()
                time.sleep(0.02)
            victim = next(order)
            said = door.kill(victim, draw)
            kills[victim] += 1
            print(f"  {time.monotonic() - began:6.1f} s  {victim} killed{said}; {len(clients.made)} videos accepted")
        wait_for(lambda: clients.check() or door.look(), 120, "the door answers again")
        clients.end()
    finally:
        clients.end(wait=False)
        print(f"  {time.monotonic() - began:.0f} s, {len(clients.made)} videos; {dict(clients.answers)}")
        print("  the longest answers took", {method: f"{took_s:.1f} s" for method, took_s in clients.longest_s.items()})
        print("\n".join(f"  {victim:<10} {kills[victim]:4} kills" for victim in DECK))
    check_videos(door.root, whole, clients.made)
