"""SIGSTOP of each process of a run in each stage, for a while and for good: an end within a bound, and the same bytes.

CELLS="scheduler/*/for good,encoder/encode/*" HANG_S=20 pytest -m chaos -s tests/chaos/test_hangs.py

`CELLS` chooses by patterns of `victim/stage/how long` (default: all).
"""

import fnmatch
import itertools
import os

from edit_ray.testing import save_random_wan
from tests.chaos.hangs import ENCODES, STAGES, VICTIMS, Hangs, configuration, stopped
from tests.chaos.processes import wait_for
from tests.chaos.run_files import check_same, left_over

WANTED = os.environ.get("CELLS", "*").split(",")
TRIES = 5  # of a cell whose moment did not come, as a stage may last for milliseconds


def cells():
    for cell in itertools.product(VICTIMS, STAGES, ("for a while", "for good")):
        there = cell[0] != "encoder" or cell[1] in ENCODES
        if there and any(fnmatch.fnmatch("/".join(cell), pattern.strip()) for pattern in WANTED):
            yield cell


def test_whatever_hangs_wherever_the_run_ends_in_time_with_the_same_bytes(ray_of_our_own, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    model = save_random_wan(tmp_path / "wan", num_layers=6, expand_timesteps=True)
    hangs = Hangs(ray_of_our_own, root, configuration(tmp_path / "run.yaml", model))
    try:
        whole = hangs.whole()
        print(f"\nan undisturbed run takes {hangs.undisturbed_s:.1f} s")
        for number, (victim, stage, how_long) in enumerate(cells()):
            print(f"{victim:<12} {stage:<9} {how_long:<11}", end=" ", flush=True)
            tries = (
                hangs.live_through(f"hurt-{number}-{again}", victim, stage, how_long == "for good")
                for again in range(TRIES)
            )
            found = next((found for found in tries if found is not None), None)
            assert found is not None, "the moment never came"
            folder, seconds, bound_s = found
            check_same(whole, folder)
            wait_for(lambda: not left_over(root), 10, "nothing is left over")
            wait_for(lambda: not stopped(ray_of_our_own.mark), 10, "nothing is left stopped")
            print(f"{seconds:6.1f} s of {bound_s:.0f}", flush=True)
    finally:
        hangs.end()
