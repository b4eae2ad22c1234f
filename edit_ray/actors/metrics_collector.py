"""The metrics of the segment scheduler and its pool: polls the actors once a second and serves Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import edit_ray
from edit_ray.actors.live_run import LiveRun
from edit_ray.actors.pool import TARGETS, ActorPool
from edit_ray.actors.watchdog import best_effort
from edit_ray.errors import RunCancelled, StaleWork
from edit_ray.metrics.catalog import Role
from edit_ray.metrics.collect import ActorMetrics, MetricValues, RunMetrics, Snapshot, Standing
from edit_ray.metrics.exporter import Exporter, MetricsOptions, remove_targets, write_targets
from edit_ray.runs.events import RunState, Work

POLL_S = 1.0
TARGETS_TIMEOUT_S = 15.0  # for a folder to write or remove the file that Prometheus reads
Live = Callable[[], Iterable[tuple[LiveRun, RunState]]]
"""The runs that have not ended, and their states."""


class MetricsCollector:
    """Counts what the segment scheduler does, in its event loop. Only `serve` raises: no count may fail a run."""

    def __init__(self, pool: ActorPool, live: Live, waiting: Callable[[], int]) -> None:
        self._pool, self._live, self._waiting = pool, live, waiting
        self.values = MetricValues()
        self._runs, self._actors = RunMetrics(self.values), ActorMetrics(self.values)
        self._exporter: Exporter | None = None
        self._serving: MetricsOptions | None = None
        self._beginning = asyncio.Lock()
        self._targets: dict[str, str] = {}  # the address in each file of targets
        self._tasks: dict[tuple[Role, int], asyncio.Task[None]] = {}
        self.values.set("edit_ray_build_info", 1, version=edit_ray.__version__)

    async def serve(self, options: MetricsOptions, root: Path) -> None:
        """Serve Prometheus, and write into `root` where. The address stays the same while any run is live.

        Raises ConfigError if the address cannot be used.
        """
        async with self._beginning:
            await self._serve(options, root)

    async def serve_again(self, runs: Sequence[LiveRun]) -> None:
        """Serve Prometheus for recovered runs, as far as possible; other tasks run in between.

        All their segments are counted first: the counters that Prometheus sees must not fall.
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
        with best_effort("write the targets for Prometheus"):
            writing = asyncio.to_thread(write_targets, root, self._exporter.address)
            path = await asyncio.wait_for(writing, TARGETS_TIMEOUT_S)
            self._targets[str(path)] = self._exporter.address
            await self._pool.remember(self._targets, TARGETS)

    async def forget_earlier(self) -> None:
        """Remove the files with scrape targets that the last incarnation left, even if there is no run to resume."""
        with best_effort("remove the metrics targets of the segment scheduler before this one"):
            for path, address in (await self._pool.recall(TARGETS)).items():
                await asyncio.wait_for(asyncio.to_thread(remove_targets, Path(path), address), TARGETS_TIMEOUT_S)

    def close(self) -> None:
        """Stop serving."""
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
        """Count a run that starts or resumes. `serve_again` counts the committed segments of a recovered one."""
        manifest = run.manifest
        known = len(manifest.segments) + len(manifest.earlier_takes)
        is_new = manifest.incarnation == 1 and not recovered
        with best_effort("count a run"):
            self._runs.opened(run.spec.run_id, run.spec.config.cache.policy, 0 if recovered else known, is_new=is_new)

    def ended(self, run: LiveRun) -> None:
        if run.end is not None:
            with best_effort("count the end of a run"):
                self._runs.ended(run.spec.run_id, run.end.state)

    @contextlib.contextmanager
    def work(self, run: LiveRun, work: Work) -> Iterator[None]:
        """Time the block, which carries out a piece of work, and count its outcome."""
        which = (work.run_id, work.stage, work.segment_index)
        with best_effort("count work"):
            if self._exporter is not None:
                self._begin("denoiser", work.worker)
                self._begin("cache_store", work.worker)
            self._runs.began(*which)
        trouble: str | None = "stopped"  # where a BaseException cancels the task
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
        """A client waits for a segment during the block."""
        return self._runs.consumer()

    def _committed(self, run: LiveRun) -> bool:
        """Count committed segments; returns whether there are more."""
        with best_effort("count segments"):
            return self._runs.committed(run.spec.run_id, run.manifest.segments, run.manifest.earlier_takes)
        return False

    def _begin(self, role: Role, worker: int) -> None:
        """Begin to poll an actor, unless it is polled already, until the event loop ends."""
        if (role, worker) not in self._tasks:
            polling = self._poll_runs() if role == "segment_scheduler" else self._poll(role, worker)
            self._tasks[role, worker] = asyncio.get_running_loop().create_task(polling)

    async def _poll(self, role: Role, worker: int) -> None:
        """An actor that does not answer delays only its own next poll."""
        call = self._pool.denoiser if role == "denoiser" else self._pool.store
        while True:
            snapshot: Snapshot | None = None
            with best_effort("ask an actor for its metrics"), contextlib.suppress(ConnectionError):  # a dead actor
                snapshot = await call(worker, "metrics")
            with self._counting_cpu():
                self._actors.take(role, worker, snapshot)
            await asyncio.sleep(POLL_S)

    async def _poll_runs(self) -> None:
        """Show the states of the runs."""
        try:
            while True:
                with self._counting_cpu():
                    waiting = [Standing("waiting", 0, 0)] * self._waiting()
                    self._runs.standing(waiting + [self._standing(run, state) for run, state in self._live()])
                    self._actors.take("segment_scheduler", 0, Snapshot("this one"))
                await asyncio.sleep(POLL_S)
        finally:
            if self._exporter is not None and asyncio.current_task() in self._tasks.values():
                self.close()  # the event loop ends

    def _standing(self, run: LiveRun, state: RunState) -> Standing:
        committed = len(run.manifest.segments)
        remaining = 0 if run.manifest.num_segments is None else run.manifest.num_segments - committed
        return Standing(state, remaining, max(0, committed - run.consumed))

    @contextlib.contextmanager
    def _counting_cpu(self) -> Iterator[None]:
        began = time.thread_time()
        with best_effort("update the metrics"):
            yield
        self.values.inc("edit_ray_metrics_cpu_seconds_total", time.thread_time() - began)


def _trouble(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ConnectionError):
        return "actor_died"
    return "stopped" if isinstance(cause, RunCancelled | StaleWork) else "error"
