"""How many GPU actors may be used: as many as a run asks for, if the nodes of the cluster hold them."""

from __future__ import annotations

from edit_ray.actors.best_effort import best_effort
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.pool import ActorPool

LOOK_AGAIN_S = 30.0  # at the nodes, while a run waits for a GPU actor


async def usable_workers(pool: ActorPool, spec: RunSpec) -> int:
    """At least one: whether that finds a place is seen when it is started."""
    asked, places = spec.config.engine.gpu_actors, None
    if asked > 1:
        with best_effort("count the places for GPU actors"):
            places = await pool.places(spec)
    return asked if places is None else max(1, min(asked, places))


def missing(spec: RunSpec, usable: int) -> str | None:
    """One sentence where a run asks for more GPU actors than there are places."""
    asked = spec.config.engine.gpu_actors
    if usable >= asked:
        return None
    return (
        f"engine.gpu_actors asks for {asked} GPU actors, and the nodes of this Ray cluster have places for {usable}; "
        "further runs wait until one of those is free"
    )
