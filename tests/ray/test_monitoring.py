"""A real Prometheus scrapes a real run whose actors die: every panel has something to show, and it is true."""

import contextlib
import os
import re
import signal
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import pytest
import ray

from edit_ray import LongVideoClient
from edit_ray.actors import launch
from edit_ray.errors import StaleLease
from edit_ray.metrics.catalog import CATALOG, LABELS
from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan
from monitoring.alerts import ALERTS, Durations
from monitoring.boards import DASHBOARDS
from tests.prometheus import Prometheus, page_of, samples_of
from tests.ray.conftest import REUSE, pid_of, wait_until

FAST = replace(Durations().scaled(1 / 60), scrape=1.0)
TOLD_BY_THE_FIRST = (
    "rate(edit_ray_first_segment_seconds_count[10s])",
    'rate(edit_ray_actor_restarts_total{actor="denoiser"}[10s])',
    "edit_ray_reuse_wait_seconds_total",
    "edit_ray_stream_lag_segments",  # the client waits, and so the run is as far ahead of it as it may be
)
NEEDS_GPU = {"edit_ray_gpu_memory_bytes"}


def ray_targets():
    """Where the Ray of this session names what Prometheus may scrape of it."""
    node = ray._private.worker.global_worker.node
    return os.path.join(node.get_temp_dir_path(), "prom_metrics_service_discovery.json")


def kill(name):
    """Kills an actor that lives; it is started again."""
    os.kill(pid_of(name), signal.SIGKILL)


@contextlib.contextmanager
def stuttering(name):
    """An actor that stands still most of the time, and then has 2 ms of CPU time, however busy the machine is."""
    pid, over = pid_of(name), threading.Event()

    def stutter():
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)
            worked = cpu_seconds(pid)
            os.kill(pid, signal.SIGCONT)
            while cpu_seconds(pid) < worked + 0.002 and not over.wait(0.0005):
                pass

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def cpu_seconds(pid):
    """What a process has used, by the clock that clock_getcpuclockid(3) names: to the nanosecond, ended threads too."""
    return time.clock_gettime(~pid << 3 | 2)


def damage(folder):
    """Another last byte for every residual that waits on disk."""
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:  # it may be read for the last time
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))


def counted(manifest):
    """What the counters of committed work must say, from the manifest alone."""
    told = Counter()
    for segment in manifest.segments:
        figures = defaultdict(float, segment.statistics)
        told["edit_ray_segments_total",] += 1
        told["edit_ray_frames_total",] += segment.num_frames
        told["edit_ray_media_bytes_total",] += figures["media_bytes"]
        for direction in LABELS["direction"]:
            told["edit_ray_reuse_bytes_total", ("direction", direction)] += figures[f"reuse_{direction}_bytes"]
        for what, decision, branch in product(("steps", "units"), LABELS["decision"], LABELS["branch"]):
            of = (("branch", branch), ("decision", decision), ("policy", "warmstart_reuse"))
            told[f"edit_ray_{what}_total", *of] += figures[f"{what}_{decision}_{branch}"]
    return told


def check_counters(page, manifest):
    samples, told = samples_of(page), counted(manifest)
    assert told["edit_ray_segments_total",] == manifest.num_segments
    assert {of: samples(of[0], **dict(of[1:])) for of in told} == dict(told)
    steps = {of: value for of, value in told.items() if of[0] == "edit_ray_steps_total"}
    assert all(steps.values()), "both branches computed steps and skipped some"
    policies = {sample for sample in LABELS["policy"] if sample != "warmstart_reuse"}
    assert all(samples("edit_ray_steps_total", branch="cond", decision="computed", policy=p) == 0 for p in policies)


def empty_panels(prometheus, began):
    """The queries that have no finite value in the time since, and the legends that name what is not there."""
    found = []
    for board in DASHBOARDS:
        for panel in board.panels:
            for target in () if panel.needs_gpu or panel.needs_door else panel.targets:
                expr = target.expr.replace("$__rate_interval", "10s").replace("$__range", "60s")
                expr = re.sub(r"\$(job|instance|run)\b", ".*", expr)
                series = prometheus.series(expr, began, time.time())
                named = re.findall(r"\{\{(\w+)\}\}", target.legend)
                if not any(values for _, values in series) or not all(
                    of.get(name) for of, _ in series for name in named
                ):
                    found.append(f"{board.name}, {panel.title}: {target.expr}")
    return found


def still(prometheus, began):
    """The metrics that have not moved in the time since."""
    names = [f"{name}_count" if metric.kind == "histogram" else name for name, metric in CATALOG.items()]
    moved = [
        any(max(values, default=0) > 0 for _, values in prometheus.series(name, began, time.time())) for name in names
    ]
    return {name for name, has_moved in zip(CATALOG, moved, strict=True) if not has_moved}


def causal(folder):
    """A run of a causal model, whose later segments compute K/V of earlier ones again."""
    options = {"chunk_size": 1, "window": 3, "sink": 1, "timesteps": [1000.0, 750.0]}
    return {
        "model": {"path": str(save_random_wan(folder / "causal", causal=options))},
        "sampling": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0},
        "continuity": {"mode": "causal", "chunk_size": 1, "chunks": 2},
        "video": {"num_segments": 3},
        "prompt_segments": [{"segment": 0, "prompt": "a red circle"}],
        "engine": {"cpu_threads": 1, "max_ahead": 1},
    }


@pytest.fixture
def prometheus(ray_head, tmp_path):
    (tmp_path / "runs").mkdir()
    with Prometheus(tmp_path / "prometheus", tmp_path / "runs", ray_targets(), FAST) as started:
        yield started


def test_every_panel_has_something_to_show_and_it_is_true(prometheus, config, tmp_path, run_id):
    client, began = LongVideoClient(output=tmp_path / "runs"), time.time()
    client.submit(config(steps=1, segments=1), run_id=f"{run_id}-before")
    wait_until(lambda: prometheus.up("edit_ray") == 1)  # so that all of the next run is seen
    path = config(steps=12, segments=8, more=REUSE)
    # What dies must die before the run is made: so it waits for its client.
    path.write_text(path.read_text().replace("engine: {", "engine: {max_ahead: 2, "))
    client.submit(path, run_id=run_id)
    slow = contextlib.ExitStack()
    for segment in client.stream(run_id, frames=False):
        if segment.index == 0:  # what the next ones read comes late
            slow.enter_context(stuttering("cache_store"))
        if segment.index == 2:
            slow.close()
        victim = {1: "denoiser", 3: "segment_scheduler", 4: "cache_store"}.get(segment.index)
        if victim == "segment_scheduler":  # what it has counted is to be seen before it dies
            for expr in TOLD_BY_THE_FIRST:
                wait_until(lambda expr=expr: prometheus.series(f"{expr} > 0", began, time.time()))
        if victim is not None:
            kill(victim)
        if segment.index == 5:  # what segment 7 will read
            damage(tmp_path / "runs" / ".cache_store")
    with pytest.raises(StaleLease):  # a run that it was not told of
        ray.get(ray.get_actor(launch.CACHE_STORE, namespace="edit_ray").call.remote("missing", "nobody", []))
    manifest = RunFolder(tmp_path / "runs", run_id).read_manifest()
    page = page_of(tmp_path / "runs")
    check_counters(page, manifest)
    client.submit(causal(tmp_path), run_id=f"{run_id}-causal")
    for _ in client.stream(f"{run_id}-causal", frames=False):  # it waits for its client, and its K/V for a scrape
        wait_until(lambda: prometheus.series("edit_ray_kv_bytes > 0", began, time.time()))
    assert wait_until(lambda: prometheus.up("ray") >= 1)
    with contextlib.suppress(AssertionError):  # what the last scrapes tell; if it does not come, it is named below
        wait_until(lambda: still(prometheus, began) == NEEDS_GPU, 20)
    assert still(prometheus, began) == NEEDS_GPU
    assert empty_panels(prometheus, began) == []


@pytest.mark.slow
@pytest.mark.timed
def test_scrapes_are_quick_and_cost_next_to_nothing(ray_head, config, tmp_path, run_id):
    client = LongVideoClient(output=tmp_path)
    client.submit(config(steps=60, segments=1000, more=REUSE), run_id=run_id)
    wait_until(lambda: client.status(run_id).committed)
    actors = (launch.SCHEDULER, launch.DENOISER, launch.CACHE_STORE)
    spent = -sum(cpu_seconds(pid_of(actor)) for actor in actors)
    cost = -samples_of(page_of(tmp_path))("edit_ray_metrics_cpu_seconds_total")
    for _ in range(20):
        time.sleep(1.0)  # five times as often as monitoring/prometheus asks
        page = page_of(tmp_path)
    spent += sum(cpu_seconds(pid_of(actor)) for actor in actors)
    cost += samples_of(page)("edit_ray_metrics_cpu_seconds_total")
    took = []
    for _ in range(400):
        began = time.perf_counter()
        page_of(tmp_path)
        took.append(time.perf_counter() - began)
    assert client.status(run_id).state == "running"
    client.cancel(run_id)
    p99 = sorted(took)[int(0.99 * len(took))]
    half = sorted(took)[len(took) // 2]
    print(f"{len(took)} scrapes: half within {1000 * half:.1f} ms, 99 of 100 within {1000 * p99:.1f} ms")
    print(f"CPU of the metrics: {cost:.3f} s of {spent:.2f} s, {cost / spent:.2%}")
    assert p99 < 0.020
    assert cost <= 0.01 * spent


def restarts(page):
    return samples_of(page)("edit_ray_actor_restarts_total", actor="denoiser")


# So short that each alert fires in a test's time; only restarts and failures take as long as actors take to start.
ALARMED = Durations(scrape=0.5, window=5, down=2, stalled=3, full=1, late=3, restarts=90, failures=90)


@pytest.mark.slow
def test_every_alert_fires_where_a_run_misbehaves(ray_head, config, tmp_path, run_id):
    """Little disk and less memory; a GPU actor that dies again and again, then hangs; at last the segment scheduler."""
    runs, fired = tmp_path / "runs", []
    runs.mkdir()
    # Of 32 residuals the host tier holds two, and the disk tier could hold all.
    more = REUSE.replace("16KiB", "16KiB, disk_bytes: 256KiB").replace("warm_steps: 4", "warm_steps: 16")
    path = config(steps=40, segments=1000, more=more)
    path.write_text(path.read_text().replace("engine: {", "engine: {segment_retries: 20, "))
    client = LongVideoClient(output=runs)

    def await_alert(name):
        began = time.monotonic()
        wait_until(lambda: name in prometheus.alerts("firing"), 60)
        fired.append(f"{name} after {time.monotonic() - began:.0f} s")

    with Prometheus(tmp_path / "prometheus", runs, ray_targets(), ALARMED) as prometheus:
        client.submit(path, run_id=run_id)
        wait_until(lambda: prometheus.up("edit_ray") == 1)
        assert prometheus.alerts("firing") <= {"TierNearlyFull", "PrefetchLate"}
        await_alert("TierNearlyFull")
        with stuttering("cache_store"):
            await_alert("PrefetchLate")
        for number in (1, 2, 3, 4):
            kill("denoiser")
            wait_until(lambda number=number: restarts(page_of(runs)) >= number)
            # Until it is at work again: dead in the pause before another attempt, it would have failed in nothing.
            then = client.status(run_id).committed + 3
            wait_until(lambda then=then: client.status(run_id).committed >= then)
        await_alert("ActorRestarting")
        await_alert("SegmentFailures")
        wait_until(lambda: "GenerationStalled" not in prometheus.alerts("pending", "firing"))
        hung = pid_of("denoiser")
        os.kill(hung, signal.SIGSTOP)
        await_alert("GenerationStalled")
        os.kill(hung, signal.SIGCONT)
        wait_until(lambda: "GenerationStalled" not in prometheus.alerts("firing"))
        os.kill(pid_of("segment_scheduler"), signal.SIGSTOP)
        await_alert("TargetDown")
        launch.end_actors()
        wait_until(lambda: not prometheus.alerts("firing", "pending") & {"TargetDown"})
    print(*fired, sep="; ")
    assert len(fired) == len(ALERTS)
