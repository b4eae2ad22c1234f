"""Power is lost in the middle of a run's life; the long form is tests/chaos/test_power_loss.py."""

import asyncio
import random

import pytest

from edit_ray.testing import save_random_wan
from tests.chaos.power_loss import lose_power, record
from tests.unit.test_actors import config_for
from tests.unit.test_actors_recovery import WARM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")

SMALL = {
    "sampling": {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 3},
    "video": {"num_segments": 3},
}
REUSING = {**SMALL, "cache": WARM, "store": {"host_bytes": 4 * 4096, "allow_tmpfs": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan", expand_timesteps=True)


def test_what_was_promised_is_there_after_a_loss_of_power(tmp_path, model):
    (tmp_path / "recorded").mkdir()
    history = asyncio.run(record(tmp_path / "recorded", config_for(model, **REUSING)))
    luck = random.Random(5)
    ended = {number for number in range(len(history.operations)) if luck.random() < 0.3}
    counts = lose_power(tmp_path / "lost", history, each=1, seed=5, resumes=3, only=ended)
    assert counts.disks > 40
    assert {"open", "unknown"} <= counts.states.keys()
