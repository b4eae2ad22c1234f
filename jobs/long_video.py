"""One long video from one configuration, on Ray.

    ray job submit -- python jobs/long_video.py [--config configs/tiny.yaml] [--set sampling.seed=7 ...]
    ray job submit -- python jobs/long_video.py --run-id mine --resume

Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from edit_ray.client import LongVideoClient, Segment

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # the code beside the job, even if the package is not installed

from edit_ray.cli.follow_run import live_bar  # noqa: E402
from edit_ray.cli.main import escaping  # noqa: E402
from edit_ray.config import Config, dump_yaml, load_config, output_root  # noqa: E402
from edit_ray.config.model_checks import training_warning  # noqa: E402
from edit_ray.errors import ConfigError, EditRayError, RunCancelled  # noqa: E402
from edit_ray.runs.ids import check_run_id  # noqa: E402

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130
DEFAULT_CONFIG = REPOSITORY / "configs" / "tiny.yaml"


@escaping()
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config or DEFAULT_CONFIG, options.set)
        if options.print_config:
            print(dump_yaml(config, empty=True), end="")
            return DONE
        if options.run_id is not None:
            check_run_id(options.run_id)
        elif options.resume:
            raise ConfigError(["--resume needs --run-id, the run to continue"])
        if (beyond := training_warning(config)) is not None:
            print(f"warning: this run is {beyond}")
        root = output_root(options.output or config.output.directory, os.environ)
        return _run(config, root, options)
    except EditRayError as error:
        for sentence in getattr(error, "problems", None) or [str(error)]:
            print(f"error: {sentence}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ValueError) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="long_video.py", description="Generate one long video, segment by segment.")
    parser.add_argument("--config", type=Path, help=f"a YAML file (default: {DEFAULT_CONFIG.name})")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value, e.g. sampling.seed=7"
    )
    parser.add_argument("--run-id", help="the name of the run's folder (default: made from the time)")
    parser.add_argument("--output", help="the folder of runs (default: $EDIT_RAY_OUTPUT or ~/edit_ray_outputs)")
    parser.add_argument("--resume", action="store_true", help="continue the run if its folder exists; else start it")
    parser.add_argument(
        "--allow-different-hardware", action="store_true", help="resume even if the frames will not be bit-identical"
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    return parser


def _run(config: Config, root: Path, options: argparse.Namespace) -> int:
    from edit_ray.cli.reuse_estimate import what_can_be_skipped, what_does_not_fit
    from edit_ray.client import LongVideoClient

    print(f"output: {root}", flush=True)
    client = LongVideoClient(output=root, answer_timeout_s=config.engine.answer_timeout_s)
    print("starting the actors, which load the model: up to a minute the first time", flush=True)
    run_id, start = _begin(client, config, root, options)
    _stop_on_signals(client, root, run_id)
    status = client.status(run_id)
    length = "until it is stopped" if status.num_segments is None else f"{status.num_segments} segments"
    frames_in_all = "" if status.num_frames is None else f", {status.num_frames} frames"
    print(f"run: {run_id}, {length}{frames_in_all} at {status.fps:.6g} fps", flush=True)
    if start:
        print(f"resumed: segments 0 to {start - 1} were committed before", flush=True)
    with contextlib.suppress(EditRayError, ValueError):  # the model may exist only on the nodes of the run
        if (skipped := what_can_be_skipped(config)) is not None:
            print(f"steps: {skipped}", flush=True)
        if (unkept := what_does_not_fit(config)) is not None:
            print(f"reuse: {unkept}", flush=True)
    started, frames, figures = time.perf_counter(), 0, list[Mapping[str, float]]()
    try:
        with live_bar(client, run_id):
            for segment in client.stream(run_id, start, frames=False):
                frames += segment.num_frames
                figures.append(segment.statistics)
                print(_line(segment), flush=True)
    except RunCancelled as stopped:
        print(f"stopped: {stopped}; {_how_to_go_on(root, run_id)}")
        return STOPPED
    elapsed = time.perf_counter() - started
    video_s = frames / config.sampling.fps
    print(f"done: {frames} frames ({video_s:.1f} s of video) in {elapsed:.1f} s, {frames / elapsed:.2f} frames/s")
    print(f"output: {root / run_id / 'final.mp4'}", flush=True)
    for line in cache_lines(config, figures):
        print(line, flush=True)
    return DONE


def _begin(client: LongVideoClient, config: Config, root: Path, options: argparse.Namespace) -> tuple[str, int]:
    """The run's id, and the first segment that this job makes."""
    if not options.resume or not (root / options.run_id).exists():
        return client.submit(config, run_id=options.run_id, checked=True), 0
    given = config if options.config or options.set else None
    check_resumable(root / options.run_id / "run.yaml", given)
    allow = options.allow_different_hardware
    return options.run_id, client.resume(options.run_id, allow_different_hardware=allow).committed


def check_resumable(run_yaml: Path, given: Config | None) -> None:
    """Raises ConfigError with every key that differs between the given configuration and the run's."""
    if given is None or not run_yaml.exists():
        return
    own, asked = (_leaves(c.model_dump(mode="json")) for c in (load_config(run_yaml, check_model=False), given))
    differing = sorted(key for key in own.keys() | asked.keys() if own.get(key) != asked.get(key))
    if differing:
        raise ConfigError(
            [f"{key} is {asked.get(key)!r}, and the run to resume has {own.get(key)!r}" for key in differing]
        )


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf value by its dotted key."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if below is None:
        return {path: value}
    return {key: leaf for name, inner in below for key, leaf in _leaves(inner, f"{path}.{name}".lstrip(".")).items()}


def cache_lines(config: Config, figures: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Summaries of skipped steps and of reuse between segments."""

    def total(name: str) -> int:
        return int(sum(segment.get(name, 0) for segment in figures))

    computed, skipped = total("units_computed"), total("units_skipped")
    if computed + skipped:
        yield f"cache: {config.cache.policy} skipped {skipped / (computed + skipped):.0%} of the steps"
    figures = [segment for segment in figures if "entries_read" in segment]  # a crash may have lost some of them
    if figures:
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


def _how_to_go_on(root: Path, run_id: str) -> str:
    return f"committed segments stay in {root / run_id}; continue with `edit-ray --output {root} resume {run_id}`"


def _stop_on_signals(client: LongVideoClient, root: Path, run_id: str) -> None:
    """Makes SIGTERM and SIGINT stop the run too. Replaces Ray's own handlers."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            client.cancel(run_id, timeout_s=1.0)
            print(f"stopped: run {run_id} was asked to stop; {_how_to_go_on(root, run_id)}", flush=True)
            client.close()
        finally:
            os._exit(STOPPED)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


if __name__ == "__main__":
    sys.exit(main())
