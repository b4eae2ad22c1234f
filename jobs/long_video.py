"""One long video from one configuration, on Ray.

    ray job submit -- python jobs/long_video.py [--config configs/tiny.yaml] [--set sampling.seed=7 ...]

Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from edit_ray.client import LongVideoClient, Segment

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # the code beside the job, also where the package is not installed

from edit_ray.config import Config, dump_yaml, load_config, output_root  # noqa: E402
from edit_ray.errors import EditRayError, RunCancelled  # noqa: E402
from edit_ray.runs.ids import check_run_id  # noqa: E402

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        if options.print_config:
            print(dump_yaml(config), end="")
            return DONE
        if options.run_id is not None:
            check_run_id(options.run_id)
        root = output_root(options.output or config.output.directory, os.environ)
        return _run(config, root, options.run_id)
    except EditRayError as error:
        for sentence in getattr(error, "problems", None) or [str(error)]:
            print(f"error: {sentence}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ValueError) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="long_video.py", description="Generate one long video, segment by segment.")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "tiny.yaml", help="a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value, e.g. sampling.seed=7"
    )
    parser.add_argument("--run-id", help="the name of the run's folder (default: made from the time)")
    parser.add_argument("--output", help="the folder that holds runs (default: $EDIT_RAY_OUTPUT or ~/edit_ray_outputs)")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    return parser


def _run(config: Config, root: Path, run_id: str | None) -> int:
    from edit_ray.cli.plan import what_does_not_fit
    from edit_ray.client import LongVideoClient

    print(f"output: {root}", flush=True)
    client = LongVideoClient(output=root)
    run_id = client.submit(config, run_id=run_id)
    _stop_on_signals(client, run_id)
    print(
        f"run: {run_id}, {config.num_segments} segments, {config.num_frames_total} frames at {config.sampling.fps} fps",
        flush=True,
    )
    with contextlib.suppress(EditRayError, ValueError):  # where the run is made this was checked; here may be no model
        if (unkept := what_does_not_fit(config)) is not None:
            print(f"reuse: {unkept}", flush=True)
    started, frames, figures = time.perf_counter(), 0, list[Mapping[str, float]]()
    try:
        with _live_bar(client, run_id, config):
            for segment in client.stream(run_id, frames=False):
                frames += segment.num_frames
                figures.append(segment.statistics)
                print(_line(segment), flush=True)
    except RunCancelled as stopped:
        print(f"stopped: {stopped}; what is committed stays in {root / run_id}")
        return STOPPED
    elapsed = time.perf_counter() - started
    video_s = frames / config.sampling.fps
    print(f"done: {frames} frames ({video_s:.1f} s of video) in {elapsed:.1f} s, {frames / elapsed:.2f} frames/s")
    print(f"output: {root / run_id / 'final.mp4'}", flush=True)
    for line in cache_lines(config, figures):
        print(line, flush=True)
    return DONE


def cache_lines(config: Config, figures: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """What the cache has skipped, and what the segments have reused of each other."""

    def total(name: str) -> int:
        return int(sum(segment.get(name, 0) for segment in figures))

    computed, skipped = total("units_computed"), total("units_skipped")
    if computed + skipped:
        yield f"cache: {config.cache.policy} skipped {skipped / (computed + skipped):.0%} of the steps"
    if "entries_read" in (figures[-1] if figures else {}):
        peak = {name: max(segment[name] for segment in figures) for name in ("host_bytes", "disk_bytes")}
        yield (
            f"reuse: {total('entries_written')} residuals stored and {total('entries_read')} read; at most "
            f"{peak['host_bytes'] / 2**20:.1f} MiB in host memory (of {config.store.host_bytes / 2**20:.1f}) and "
            f"{peak['disk_bytes'] / 2**20:.1f} MiB on disk"
        )
        outcomes = ("useful", "late", "wasted", "unfulfilled", "cancelled")
        counts = ", ".join(f"{figures[-1][f'prefetch_{outcome}']:.0f} {outcome}" for outcome in outcomes)
        waited = sum(segment["reuse_wait_s"] for segment in figures)
        yield f"prefetch: {figures[-1]['prefetch_requested']:.0f} from disk, {counts}; waited {waited:.2f} s"


def _line(segment: Segment) -> str:
    took = {name.removesuffix("_s"): value for name, value in segment.statistics.items() if name.endswith("_s")}
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in took.items())
    return f"segment {segment.index}: {segment.num_frames} frames, {seconds} | {segment.prompt}"


@contextlib.contextmanager
def _live_bar(client: LongVideoClient, run_id: str, config: Config) -> Iterator[None]:
    """On a terminal, a bar over all denoising steps; elsewhere nothing, the log lines say enough."""
    if not sys.stdout.isatty():
        yield
        return
    from rich.progress import Progress

    steps, over = config.sampling.num_inference_steps, threading.Event()

    def follow(bar: Progress) -> None:
        task = bar.add_task("denoising", total=steps * config.num_segments)
        while not over.wait(0.5):
            with contextlib.suppress(Exception):  # a bar is no reason to fail
                at = client.status(run_id).progress
                bar.update(task, completed=at.segment_index * steps + at.step if at else None)

    with Progress(transient=True) as bar:
        follower = threading.Thread(target=follow, args=(bar,), daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()


def _stop_on_signals(client: LongVideoClient, run_id: str) -> None:
    """From now on SIGTERM and SIGINT stop the run too. Installed after Ray's own handlers, which it replaces."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            client.cancel(run_id, timeout_s=1.0)
            print(f"stopped: run {run_id} was asked to stop", flush=True)
        finally:
            os._exit(STOPPED)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


if __name__ == "__main__":
    sys.exit(main())
