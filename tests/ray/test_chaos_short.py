"""The short form of `make chaos`: some kills on a Ray of its own, in seconds."""

import secrets

from edit_ray.testing import save_random_wan
from tests.chaos.harness import VICTIMS, Chaos, PrivateRay
from tests.chaos.processes import marked, wait_for
from tests.chaos.run_files import WINDOW, check_same, configuration, left_over


def test_a_run_survives_some_kills(tmp_path):
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")
    model = save_random_wan(tmp_path / "wan", num_layers=6, expand_timesteps=True)
    config = configuration(tmp_path / "run.yaml", model, "history")
    ray = PrivateRay(secrets.token_hex(8)).start()
    try:
        Chaos(ray, tmp_path, config, seed, window=WINDOW).survive("whole", 0)
        chaos = Chaos(ray, tmp_path, config, seed, window=WINDOW, victims=(*VICTIMS, "driver", "encoder"))
        chaos.survive("hurt", 3)
        assert sum(chaos.hit.values()) > 0
        check_same(tmp_path / "whole", tmp_path / "hurt")
        assert left_over(tmp_path) == []
    finally:
        ray.end()
    wait_for(lambda: not marked(ray.mark), 20, "no process outlives its Ray")
