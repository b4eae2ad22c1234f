"""SIGKILL of anything at any instant: the run ends all the same, with the bytes of an undisturbed one.

make chaos [KILLS=300] [SEED=7]
"""

import os
import secrets
import time
from collections import Counter
from pathlib import Path

import pytest

from edit_ray.cache.stores.arena import owner_lives
from edit_ray.testing import save_random_wan
from tests.chaos.harness import OTHER_VICTIMS, PHASES, VICTIMS, Chaos, PrivateRay
from tests.chaos.processes import marked, wait_for
from tests.chaos.run_files import CONTINUITY, WINDOW, check_same, configuration, left_over, skipped_share

KILLS = int(os.environ.get("KILLS", "20"))
SEED = int(os.environ.get("SEED", str(secrets.randbelow(10**6))))
KILLS_A_RUN = 5


@pytest.fixture
def ray_of_our_own():
    ray = PrivateRay(secrets.token_hex(8)).start()
    yield ray
    ray.end()


def test_every_run_ends_with_the_bytes_of_an_undisturbed_one(ray_of_our_own, tmp_path):
    model = save_random_wan(tmp_path / "wan", num_layers=6, expand_timesteps=True)
    print(f"\nseed {SEED}, {KILLS} kills")
    hit, kills, number = Counter(), 0, 0
    while kills < KILLS or number < len(CONTINUITY):
        mode = list(CONTINUITY)[number % len(CONTINUITY)]
        root = tmp_path / f"{number}"
        root.mkdir()
        config = configuration(root / "run.yaml", model, mode)
        victims = (*VICTIMS, *OTHER_VICTIMS)
        chaos = Chaos(ray_of_our_own, root, config, f"{SEED}-{number}", window=WINDOW, victims=victims)
        chaos.hit = hit
        whole = tmp_path / f"whole-{mode}"
        if not whole.exists():
            whole.mkdir()
            Chaos(ray_of_our_own, whole, config, 0, window=WINDOW).survive("whole", 0)
            assert skipped_share(whole / "whole") >= 0.4
        print(f"run {number}, {mode}")
        started = time.monotonic()
        kills += chaos.survive(f"run-{number}", KILLS_A_RUN)
        check_same(whole / "whole", root / f"run-{number}")
        assert left_over(root) == []
        print(f"  the same bytes, after {time.monotonic() - started:.0f} s; {kills} kills so far")
        number += 1
    print({f"{victim}, {phase}": count for (victim, phase), count in sorted(hit.items())})
    assert {phase for _, phase in hit} >= set(PHASES)
    assert {victim for victim, _ in hit} == {*VICTIMS, *OTHER_VICTIMS}
    ray_of_our_own.end()
    wait_for(lambda: not marked(ray_of_our_own.mark), 20, "no process outlives its Ray")
    wait_for(lambda: not arenas_of_the_dead(), 20, "no arena outlives its Ray")


def arenas_of_the_dead():
    """Other tests on this machine may have arenas of their own, or be about to remove one."""
    return [path for path in Path("/dev/shm").glob("edit_ray-*") if not owner_lives(path)]
