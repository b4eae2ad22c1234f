"""One operation on files fails, once, anywhere.

The slow form lets every operation fail in every way: SLICE=2/20 takes the second of twenty slices, SLICE=1/1 all.
"""

import errno
import logging
import os
import random

import pytest

from edit_ray.testing import save_random_wan
from tests.chaos.one_failure import Experiment
from tests.runs_here import ONE, config_for
from tests.unit.test_power_loss import REUSING, SMALL

SLICE, SLICES = map(int, os.environ.get("SLICE", "1/20").split("/"))
LIVES = {"plain": {}, "reuse": REUSING, "keep": {"output": {"keep_segments": 2}}}


def experiment(root, **changes):
    """A run of three segments, and one of a single segment that is served meanwhile."""
    model = save_random_wan(root / "wan", expand_timesteps=True)
    engine = {"cpu_threads": 1, "idle_exit_s": 3600, "gpu_actors": 2}
    always = {"engine": engine, "metrics": {"enabled": False}}
    one = config_for(model, **{**SMALL, **changes}, **always)
    return Experiment(root / "root", one, config_for(model, **{**SMALL, **ONE}, **always))


def test_one_failure_anywhere_costs_no_run_a_byte(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    lives = experiment(tmp_path)
    lives.prepare()
    # With the last operations of a run, which record its end.
    last = [("run", lives.operations["run"].total() - back, errno.EIO) for back in (1, 2)]
    for failure in (*random.Random(3).sample(lives.every(), 10), *last):
        lives.fail(*failure)
    lives.end()
    assert lives.failed[True] >= 6


@pytest.mark.slow
@pytest.mark.parametrize("changes", LIVES.values(), ids=LIVES)
def test_no_single_failure_costs_a_run_a_byte(tmp_path, caplog, changes):
    caplog.set_level(logging.CRITICAL)
    lives, bad = experiment(tmp_path, **changes), []
    lives.prepare()
    for failure in lives.every()[SLICE - 1 :: SLICES]:
        try:
            lives.fail(*failure)
        except Exception as error:
            bad.append(f"{error.__notes__[-1]}: {type(error).__name__}: {error}")
            lives.restart()
    lives.end()
    print(f"\n{lives.operations}; failed {lives.failed[True]}, never came {lives.failed[False]}")
    print(*(f"{count} refused: {said}" for said, count in lives.refused.items()), sep="\n")
    print(*(f"{count} ended: {said}" for said, count in lives.ended.items()), sep="\n")
    assert bad == []
