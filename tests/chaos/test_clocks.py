"""Wall clocks that jump at every look and at every stage, at length, with segment schedulers that die meanwhile.

CLOCKS=200 SEED=7 pytest -m chaos -s tests/chaos/test_clocks.py
"""

import asyncio
import os
import random
import secrets
import time
from collections import Counter

from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan
from tests.runs_here import PLAIN_AND_REUSE, SHORT, Whole, check_same, config_for
from tests.unit.test_actors_clocks import WallClock, live_through

RUNS = int(os.environ.get("CLOCKS", "10"))
SEED = int(os.environ.get("SEED", str(secrets.randbelow(10**6))))
STAGES = {"provenance", "adopt_run", "prepare_run", "denoise_segment", "decode_segment", "encode_segment"}
STAGES |= {"finalize_run", "release_run", "recovery", "at a look"}


def test_no_byte_and_no_count_depends_on_the_wall_clock(tmp_path, monkeypatch):
    model = save_random_wan(tmp_path / "wan", expand_timesteps=True)
    configs = {name: config_for(model, **changes, **SHORT) for name, changes in PLAIN_AND_REUSE.items()}
    whole = Whole(tmp_path)
    undisturbed = {name: asyncio.run(whole(config)) for name, config in configs.items()}
    print(f"\nseed {SEED}, {RUNS} runs")
    hit = Counter()
    for number in range(RUNS):
        draw = random.Random(f"{SEED}-{number}")
        clock, name, root = WallClock(draw.random()), draw.choice(["plain", "reuse"]), tmp_path / f"{number}"
        deaths = [draw.randint(1, 5) for _ in range(draw.randint(0, 3))]
        root.mkdir()
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", clock)
            asyncio.run(live_through(root, configs[name], name, clock, deaths))
        print(number, name, deaths)
        check_same(RunFolder(root, name), undisturbed[name])
        hit += clock.hit
    print(dict(sorted(hit.items())))
    assert set(hit) >= STAGES or RUNS < 10
