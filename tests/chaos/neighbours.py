"""Makes one run with actors of its own: a cluster that others share folders with.

    python -m tests.chaos.neighbours MODEL FOLDER RUN SEED STORE

It says the number of its process and how the run has ended.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.config import Config
from tests.chaos.undisturbed import Shape


def config_of(model: Path, seed: int, store: Path) -> Config:
    """A run whose segments reuse residuals that the store keeps in `store`."""
    values = Shape(context=1, window=2, cached=False, frames=9).config(model, 5).model_dump(mode="json")
    values["sampling"]["seed"] = seed
    values["store"] |= {"directory": str(store), "host_bytes": 2 * 4096}
    return Config.model_validate(values)


async def make(root: Path, run_id: str, config: Config) -> str:
    """Makes the run; its error, or how it has ended."""
    crew = LocalPool()
    scheduler = SegmentSchedulerActor(crew)
    root.mkdir(exist_ok=True)
    await scheduler.submit(run_id, config.model_dump(mode="json"), str(root), str(root), f"{root}/{run_id}")
    async with asyncio.timeout(120):
        while not (status := (await scheduler.wait_segment(run_id, 10**5, 5)).status).ended:
            pass
    await crew.end()
    return status.error or status.state


def main() -> None:
    model, root, run_id, seed, store = sys.argv[1:]
    config = config_of(Path(model), int(seed), Path(store))
    print(os.getpid(), asyncio.run(make(Path(root), run_id, config)))


if __name__ == "__main__":
    main()
