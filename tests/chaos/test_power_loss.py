"""Power is lost after every operation of a run's life, many times; takes no Ray.

PAIRS=20000 and SEED=7 choose how many (history, subset) pairs at least, and which.
"""

import asyncio
import os

import pytest

from edit_ray.testing import save_random_wan
from tests.chaos.power_loss import lose_power, record
from tests.unit.test_actors import config_for
from tests.unit.test_power_loss import REUSING, SMALL

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")]

PAIRS, SEED = int(os.environ.get("PAIRS", "20000")), int(os.environ.get("SEED", "7"))


@pytest.mark.parametrize("changes", [SMALL, REUSING], ids=["plain", "reuse"])
def test_no_loss_of_power_loses_what_was_promised(tmp_path, changes):
    model = save_random_wan(tmp_path / "wan", expand_timesteps=True)
    (tmp_path / "recorded").mkdir()
    history = asyncio.run(record(tmp_path / "recorded", config_for(model, **changes)))
    each = -(-PAIRS // len(history.operations))
    counts = lose_power(tmp_path / "lost", history, each=each, seed=SEED, resumes=60)
    print(f"\n{len(history.operations)} operations, seed {SEED}: {counts}")
    assert counts.pairs >= 0.8 * PAIRS / 2
    assert {"unknown", "open", "cancelled", "done"} == counts.states.keys()
