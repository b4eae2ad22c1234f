"""How a run ends: what it holds is freed, its end recorded. Whatever fails here, it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from edit_ray.actors.best_effort import best_effort
from edit_ray.actors.live_run import LiveRun
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.pool import ActorPool, NoAnswer, NotStarted
from edit_ray.actors.watchdog import Watchdog, answered
from edit_ray.runs.events import CloseRun
from edit_ray.runs.manifest import Ended
from edit_ray.runs.scheduler import SegmentScheduler

RELEASE_PAUSE_S = 1.0  # between two questions to a store that is being started again


_log = logging.getLogger(__name__)


async def stop_work(pool: ActorPool, run: LiveRun, worker: int, machine: SegmentScheduler) -> None:
    """Asks for the end of what is in flight for a run; where it has none within `answer_timeout_s`, its GPU actor is
    killed.
    """
    run_id, engine, loop = run.spec.run_id, run.spec.config.engine, asyncio.get_running_loop()
    until = loop.time() + engine.answer_timeout_s
    with contextlib.suppress(ConnectionError):  # where the actor is gone the work says so itself
        await answered(pool.denoiser(worker, "stop_run", run_id), engine.answer_timeout_s, "a cancel")
    if not await run.wait(lambda: run.ended or not machine.at_work(run_id), max(0.1, until - loop.time())):
        _log.warning("run %s did not stop within %g s; its GPU actor is killed", run_id, engine.answer_timeout_s)
        await pool.restart_denoiser(worker)


async def close_run(pool: ActorPool, watchdog: Watchdog, run: LiveRun, close: CloseRun) -> None:
    """Ends a run that nothing is in flight of. Afterwards its lock is free."""
    spec = run.spec
    # Before anyone is told: whoever waits for the end may end the actors, and then nothing must be left behind.
    with best_effort(f"free what run {close.run_id} has left in memory and on disk"):
        if close.worker is not None:
            await release_run(pool, watchdog, spec, close.worker)
    final = spec.folder.relative(spec.folder.final) if close.state == "done" else None
    digest = run.final_digest if final else None
    if failure := await run.record_end(Ended(spec.incarnation, close.state, close.error, final, digest)):
        _log.error("the end of run %s cannot be recorded: %s", close.run_id, failure)
    await run.close()


async def release_run(pool: ActorPool, watchdog: Watchdog, spec: RunSpec, worker: int) -> None:
    """Frees what the actors hold for a run. If it goes on, segments whose residuals are missed are made again.

    Raises NoAnswer where the store is there, and its disk does not answer.
    """
    engine = spec.config.engine
    with contextlib.suppress(ConnectionError):  # it holds nothing then
        await answered(pool.denoiser(worker, "release_run", spec.run_id), engine.answer_timeout_s, "the end of a run")
    until = asyncio.get_running_loop().time() + engine.start_timeout_s
    while asyncio.get_running_loop().time() < until:
        try:
            call = pool.store(worker, "drop_run", spec.residuals_id, spec.residuals_directory)
            return await watchdog.watch_store(worker, call, engine)
        except NoAnswer:
            raise
        except NotStarted:
            return
        except ConnectionError:  # the store that comes after it finds on disk what this one has left
            await asyncio.sleep(RELEASE_PAUSE_S)
