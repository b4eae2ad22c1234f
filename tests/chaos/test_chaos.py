"""SIGKILL of anything at any instant: two live runs end all the same, with the bytes of undisturbed ones.

make chaos [KILLS=300] [AIMED=10] [SEED=7] [MODES=image,causal-commit]

KILLS fall anywhere in the life of a run, AIMED more into each stage; MODES are some of those that segments continue in.
"""

import itertools
import os
import secrets
from pathlib import Path

from edit_ray.tiers.arena import owner_lives
from tests.chaos.harness import AIMED, Chaos
from tests.chaos.processes import wait_for
from tests.chaos.run_files import CONTINUITY, is_causal, save_models, skipped_share

KILLS = int(os.environ.get("KILLS", "20"))
EACH = int(os.environ.get("AIMED", "1"))
MODES = os.environ.get("MODES", ",".join(CONTINUITY)).split(",")
SEED = int(os.environ.get("SEED", str(secrets.randbelow(10**6))))


def test_every_run_ends_with_the_bytes_of_an_undisturbed_one(ray_of_our_own, tmp_path):
    before = arenas_of_the_dead()
    chaos = Chaos(ray_of_our_own, tmp_path, save_models(tmp_path / "models"), SEED)
    modes = itertools.cycle(MODES)
    print(f"\nseed {SEED}, {KILLS} kills anywhere, {EACH} in each of {len(AIMED)} stages")
    try:
        for number in itertools.count():
            if sum(chaos.anywhere.values()) < KILLS:
                chaos.pair(number, (next(modes), next(modes)), chaos.strike_anywhere)
            elif any(chaos.hits(stage) < EACH for stage in AIMED):
                chaos.pair(number, (next(modes), next(modes)), chaos.strike_in(EACH))
            else:
                break
    finally:
        chaos.end()
        for name in ("anywhere", "aimed", "missed"):
            counts = getattr(chaos, name)
            print(f"{name}: {sum(counts.values())}", {", ".join(key): n for key, n in sorted(counts.items())})
    reusing = [whole for whole in tmp_path.glob("whole-*") if not is_causal(whole.name.removeprefix("whole-"))]
    assert all(skipped_share(whole) >= 0.4 for whole in reusing)
    ray_of_our_own.end()
    wait_for(lambda: arenas_of_the_dead() <= before, 20, "no arena outlives its Ray")


def arenas_of_the_dead():
    """Other tests on this machine may have left some, or be about to remove one."""
    return {path for path in Path("/dev/shm").glob("edit_ray-*") if not owner_lives(path)}
