"""The metrics of the segment scheduler and of its crew: asks the actors once a second, and lets Prometheus ask here."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import edit_ray
from edit_ray.actors.best_effort import best_effort
from edit_ray.actors.crew import Crew
from edit_ray.actors.live_run import LiveRun
from edit_ray.errors import RunCancelled, StaleWork
from edit_ray.metrics.catalog import Role
from edit_ray.metrics.collect import ActorMetrics, MetricValues, Snapshot
from edit_ray.metrics.exporter import Exporter, remove_targets, write_targets
from edit_ray.metrics.options import MetricsOptions
from edit_ray.metrics.run_metrics import RunMetrics, Standing
from edit_ray.runs.events import RunState, Work

ASK_S = 1.0
TELL_TIMEOUT_S = 15.0  # for a folder to take or give up the file that Prometheus reads
Live = Callable[[], Iterable[tuple[LiveRun, RunState]]]
"""The runs that have not ended, and where they stand."""


class MetricsCollector:
    """Told of what the segment scheduler does, it keeps the totals. All in the event loop, but for scrapes.

    Only `serve` raises: nothing that is told here may fail a run.
    """

    def __init__(self, crew: Crew, live: Live, waiting: Callable[[], int]) -> None:
        self._crew, self._live, self._waiting = crew, live, waiting
        self.values = MetricValues()
        self._runs, self._actors = RunMetrics(self.values), ActorMetrics(self.values)
        self._incarnation, self._ticks = secrets.token_hex(8), 0
        self._taken: dict[str, int] = {}  # by run: segments that a client has taken
        self._exporter: Exporter | None = None
        self._serving: MetricsOptions | None = None
        self._beginning = asyncio.Lock()
        self._targets: dict[str, str] = {}  # the address that each file tells
        self._tasks: dict[tuple[Role, int], asyncio.Task[None]] = {}
        self.values.set("edit_ray_build_info", 1, version=edit_ray.__version__)

    async def serve(self, options: MetricsOptions, root: Path) -> None:
        """Lets Prometheus know in `root` where to ask. Where it asks stays as it is while any run lives.

        Raises ConfigError where that place cannot be had.
        """
        async with self._beginning:
            await self._serve(options, root)

    async def serve_again(self, runs: Sequence[LiveRun]) -> None:
        """The same for runs that have come back, as far as it is possible; others have their turn meanwhile.

        Nobody is served before all their segments are counted: what Prometheus sees must not go back.
        """
        async with self._beginning:
            for run in runs:
                while self._committed(run):
                    await asyncio.sleep(0)
            for run in runs:
                with best_effort(f"serve the metrics of run {run.spec.run_id}"):
                    await self._serve(run.spec.config.metrics, run.spec.root)

    async def _serve(self, options: MetricsOptions, root: Path) -> None:
        if not options.enabled:
            return
        if self._exporter is None or (options != self._serving and not list(self._live())):
            self.close()
            self._exporter = await asyncio.to_thread(Exporter, self.values, self._actors, options)
            self._serving = options
            self._begin("segment_scheduler", 0)
        with best_effort("tell Prometheus where to ask"):
            writing = asyncio.to_thread(write_targets, root, self._exporter.address)
            path = await asyncio.wait_for(writing, TELL_TIMEOUT_S)
            self._targets[str(path)] = self._exporter.address
            await self._crew.remember_targets(self._targets)

    async def forget_earlier(self) -> None:
        """What an incarnation that has died told Prometheus holds no longer, be there runs to go on with or not."""
        with best_effort("remove the metrics targets of the segment scheduler before this one"):
            for path, address in (await self._crew.recall_targets()).items():
                await asyncio.wait_for(asyncio.to_thread(remove_targets, Path(path), address), TELL_TIMEOUT_S)

    def close(self) -> None:
        """Nobody asks here any more."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        for path, address in self._targets.items():
            remove_targets(Path(path), address)
        self._targets.clear()
        if self._exporter is not None:
            self._exporter.close()
        self._exporter = self._serving = None

    def opened(self, run: LiveRun, *, recovered: bool) -> None:
        """A run begins or goes on. `serve_again` counts what an earlier segment scheduler has committed of it."""
        manifest = run.manifest
        known = len(manifest.segments) + len(manifest.earlier_takes)
        is_new = manifest.incarnation == 1 and not recovered
        with best_effort("count a run"):
            self._runs.opened(run.spec.run_id, run.spec.config.cache.policy, 0 if recovered else known, is_new=is_new)

    def ended(self, run: LiveRun) -> None:
        self._taken.pop(run.spec.run_id, None)
        if run.end is not None:
            with best_effort("count the end of a run"):
                self._runs.ended(run.spec.run_id, run.end.state)

    @contextlib.contextmanager
    def work(self, run: LiveRun, work: Work) -> Iterator[None]:
        """What is carried out meanwhile, and what came of it."""
        which = (work.run_id, work.stage, work.segment_index)
        with best_effort("count work"):
            if self._exporter is not None:
                self._begin("denoiser", work.worker)
                self._begin("cache_store", work.worker)
            self._runs.began(*which)
        trouble: str | None = "stopped"
        try:
            yield
            trouble = None
        except Exception as error:
            trouble = _trouble(error)
            raise
        finally:
            with best_effort("count work"):
                self._runs.finished(*which, trouble)
            self._committed(run)

    def consumer(self) -> contextlib.AbstractContextManager[None]:
        """A client waits for a segment meanwhile."""
        return self._runs.consumer()

    def taken(self, run_id: str, segments: int) -> None:
        """Clients have taken so many segments."""
        self._taken[run_id] = max(segments, self._taken.get(run_id, 0))

    def _committed(self, run: LiveRun) -> bool:
        """Returns whether there are more to count."""
        with best_effort("count segments"):
            return self._runs.committed(run.spec.run_id, run.manifest.segments, run.manifest.earlier_takes)
        return False

    def _begin(self, role: Role, worker: int) -> None:
        """Begins to ask an actor, if that is not done already; it ends with the event loop."""
        if (role, worker) not in self._tasks:
            loop = asyncio.get_running_loop()
            task = loop.create_task(self._look() if role == "segment_scheduler" else self._ask(role, worker))
            self._tasks[role, worker] = task

    async def _ask(self, role: Role, worker: int) -> None:
        """A call that is not answered holds up the next one, and nothing else."""
        call = self._crew.denoiser if role == "denoiser" else self._crew.store
        while True:
            snapshot: Snapshot | None = None
            with best_effort("ask an actor for its metrics"), contextlib.suppress(ConnectionError):  # a dead actor
                snapshot = await call(worker, "metrics")
            with self._on_our_account():
                self._actors.take(role, worker, snapshot)
            await asyncio.sleep(ASK_S)

    async def _look(self) -> None:
        """Where the runs stand."""
        try:
            while True:
                with self._on_our_account():
                    waiting = [Standing("waiting", 0, 0)] * self._waiting()
                    self._runs.standing(waiting + [self._standing(run, state) for run, state in self._live()])
                    self._ticks += 1
                    self._actors.take("segment_scheduler", 0, Snapshot(self._incarnation, self._ticks))
                await asyncio.sleep(ASK_S)
        finally:
            if self._exporter is not None and asyncio.current_task() in self._tasks.values():
                self.close()  # the event loop ends

    def _standing(self, run: LiveRun, state: RunState) -> Standing:
        committed = len(run.manifest.segments)
        remaining = 0 if run.manifest.num_segments is None else run.manifest.num_segments - committed
        return Standing(state, remaining, max(0, committed - self._taken.get(run.spec.run_id, 0)))

    @contextlib.contextmanager
    def _on_our_account(self) -> Iterator[None]:
        began = time.thread_time()
        with best_effort("keep the metrics"):
            yield
        self.values.inc("edit_ray_metrics_cpu_seconds_total", time.thread_time() - began)


def _trouble(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ConnectionError):
        return "actor_died"
    return "stopped" if isinstance(cause, RunCancelled | StaleWork) else "error"
