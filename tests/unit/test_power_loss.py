"""Power is lost in the middle of a run's life.

The slow form loses it after every operation, many times: PAIRS=20000 and SEED=7 choose how many pairs of a history and
a subset of what was not synced there are at least, and which.
"""

import asyncio
import os
import random

import pytest

from tests.chaos.power_loss import lose_power, record
from tests.runs_here import REUSE, config_for

PAIRS, SEED = int(os.environ.get("PAIRS", "20000")), int(os.environ.get("SEED", "7"))
SMALL = {
    "sampling": {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 3},
    "video": {"num_segments": 3},
}
REUSING = SMALL | REUSE


def test_what_was_promised_is_there_after_a_loss_of_power(tmp_path, model):
    (tmp_path / "recorded").mkdir()
    history = asyncio.run(record(tmp_path / "recorded", config_for(model, **REUSING)))
    luck = random.Random(5)
    ended = {number for number in range(len(history.operations)) if luck.random() < 0.3}
    counts = lose_power(tmp_path / "lost", history, each=1, seed=5, resumes=3, only=ended)
    assert counts.disks > 40
    assert {"open", "unknown"} <= counts.states.keys()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [SMALL, REUSING], ids=["plain", "reuse"])
def test_no_loss_of_power_loses_what_was_promised(tmp_path, model, changes):
    (tmp_path / "recorded").mkdir()
    history = asyncio.run(record(tmp_path / "recorded", config_for(model, **changes)))
    each = -(-PAIRS // len(history.operations))  # of two histories; up to a half of the subsets are drawn before
    counts = lose_power(tmp_path / "lost", history, each=each, seed=SEED, resumes=60)
    print(f"\n{len(history.operations)} operations, seed {SEED}: {counts}")
    assert counts.pairs >= PAIRS / 2
    assert counts.resumed == 60
    assert {"unknown", "open", "cancelled", "done"} == counts.states.keys()
