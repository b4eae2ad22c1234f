"""One operation on files fails, once, anywhere; the long form is tests/chaos/test_one_failure.py."""

import asyncio
import logging
import random

import pytest

from edit_ray.testing import save_random_wan
from tests.chaos.one_failure import Experiment
from tests.unit.test_actors import config_for
from tests.unit.test_power_loss import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")


def experiment(root, **changes):
    """A run of three segments, and one of a single segment that is served meanwhile."""
    model = save_random_wan(root / "wan", expand_timesteps=True)
    engine = {"cpu_threads": 1, "idle_exit_s": 3600, "gpu_actors": 2}
    single = {"video": {"num_segments": 1}, "prompt_segments": [{"segment": 0, "prompt": "a red circle"}]}
    one = config_for(model, **{**SMALL, **changes}, engine=engine)
    return Experiment(root / "root", one, config_for(model, **{**SMALL, **single}, engine=engine))


def test_one_failure_anywhere_costs_no_run_a_byte(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    luck = random.Random(3)

    async def fail_some():
        await lives.prepare()
        for failure in luck.sample(lives.every(), 10):
            await lives.fail(*failure)
        await lives.crew.end()

    lives = experiment(tmp_path)
    asyncio.run(fail_some())
    assert lives.failed[True] >= 6
