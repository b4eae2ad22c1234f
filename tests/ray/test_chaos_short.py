"""The short form of `make chaos`: some kills on a Ray of its own, in seconds."""

import secrets

from edit_ray.testing import save_random_wan
from tests.chaos.harness import Chaos, PrivateRay
from tests.chaos.processes import marked, wait_for


def test_two_runs_survive_some_kills(tmp_path):
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")
    model = save_random_wan(tmp_path / "wan", num_layers=6, expand_timesteps=True)
    ray = PrivateRay(secrets.token_hex(8)).start()
    chaos = Chaos(ray, tmp_path, model, seed)

    def strike():
        if sum(chaos.anywhere.values()) < 3:
            chaos.strike_anywhere(("GPU actor", "store actor", "scheduler", "driver"))

    try:
        chaos.pair(0, ("history", "overlap"), strike)
        assert sum(chaos.anywhere.values()) > 0
    finally:
        chaos.end()
        ray.end()
    wait_for(lambda: not marked(ray.mark), 20, "no process outlives its Ray")
