"""`edit-ray`: a look at the runs and at what their cache did, calibration, and an end to the actors."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edit_ray.errors import ConfigError, EditRayError, UnknownRun
from edit_ray.runs.ids import RUN_ID_PATTERN

if TYPE_CHECKING:
    from edit_ray.cache.records import Record
    from edit_ray.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code: 0 done, 1 failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except EditRayError as error:
        print(f"edit-ray: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | LookupError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edit-ray", description="Looks after the actors and runs of edit_ray.")
    parser.add_argument("--address", help="the Ray to join (default: the one that Ray itself finds)")
    parser.add_argument("--output", help="the folder that holds runs (default: $EDIT_RAY_OUTPUT or ~/edit_ray_outputs)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("down", help="end all actors; runs in progress end where they are")
    commands.add_parser("list", help="the runs that the segment scheduler knows")
    for name, says in (("status", "where one run stands"), ("cancel", "stop one run; what is committed stays")):
        commands.add_parser(name, help=says).add_argument("run_id")
    report = commands.add_parser("report", help="what a cache decided, as one HTML page")
    report.add_argument("source", metavar="RECORD_OR_RUN", help="a record of decisions (JSON), or a run's id or folder")
    report.add_argument("--page", type=Path, help="where to write it (default: report.html in the run, or beside)")
    calibrate = commands.add_parser("calibrate", help="measure what a policy has to know of a model")
    calibrate.add_argument("--config", type=Path, required=True, help="model and sampling of a run's configuration")
    calibrate.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one of its values")
    calibrate.add_argument("--policy", choices=["teacache", "magcache"], required=True)
    calibrate.add_argument("--prompts", type=Path, required=True, help="a text file, one prompt a line")
    calibrate.add_argument("--file", type=Path, required=True, help="the calibration to write to (JSON)")
    calibrate.add_argument("--use-ret-steps", action="store_true", help="teacache: watch e0 instead of e")
    return parser


def _down(options: argparse.Namespace) -> int:
    from edit_ray.actors import launch

    if not launch.connect_if_running(options.address):
        print("no Ray is running")
        return 0
    ended = launch.end_actors()
    print(f"ended: {', '.join(ended)}" if ended else "no actors were alive")
    return 0


def _list(options: argparse.Namespace) -> int:
    from edit_ray.client import LongVideoClient

    for status in LongVideoClient(output=options.output, address=options.address).runs():
        print(f"{status.run_id}  {status.state}  {status.committed}/{status.num_segments} segments  {status.path}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from edit_ray.client import LongVideoClient

    status = LongVideoClient(output=options.output, address=options.address).status(options.run_id)
    print(f"{status.run_id}  {status.state}  {status.committed}/{status.num_segments} segments  {status.path}")
    if status.progress:
        at = status.progress
        print(f"segment {at.segment_index}: step {at.step} of {at.num_steps}")
    if status.error:
        print(status.error)
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from edit_ray.client import LongVideoClient

    LongVideoClient(output=options.output, address=options.address).cancel(options.run_id)
    print(f"asked {options.run_id} to stop")
    return 0


def _report(options: argparse.Namespace) -> int:
    from edit_ray.cache.report import render_report
    from edit_ray.config import output_root

    source = Path(options.source)
    if not source.exists():
        if re.fullmatch(RUN_ID_PATTERN, options.source) is None:
            raise UnknownRun(f"{options.source} is no file, no folder and no run's id")
        source = output_root(options.output, os.environ) / options.source
    page = options.page or (source / "report.html" if source.is_dir() else source.with_suffix(".html"))
    text = render_report(_read_records(source), f"What the cache did in {source.resolve().stem}")
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"the page {page} cannot be written: {error.strerror}"]) from None
    print(page)
    return 0


def _read_records(source: Path) -> dict[str, Record]:
    """The records of a run's folder by segment, or the one in a file. Raises UnknownRun, ConfigError."""
    from edit_ray.cache.records import Record

    files = sorted((source / "records").glob("*.json")) if source.is_dir() else [source]
    if not source.exists() or not files:
        raise UnknownRun(
            f"{source} is no record and no run with records; a run has some if its cache.policy is not none"
        )
    records = {}
    for file in files:
        try:
            records[f"segment {int(file.stem)}" if file.stem.isdigit() else file.stem] = Record.from_json(
                file.read_text()
            )
        except (OSError, ValueError) as error:
            raise ConfigError([f"{file} cannot be read: {error}"]) from None
    return records


def _calibrate(options: argparse.Namespace) -> int:
    from edit_ray.engine import calibrate
    from edit_ray.engine.calibration import write_calibration
    from edit_ray.engine.loading import load_pipeline, with_flow_shift

    config, prompts = _uncached_config(options), _read_prompts(options.prompts)
    _check_calibration(options.file)
    pipe, sampling = load_pipeline(config.model), config.sampling
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = with_flow_shift(pipe.scheduler, sampling.flow_shift)
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt")
    call = {name: getattr(sampling, name) for name in names}
    measured = calibrate.observe(pipe, prompts, sampling.seed, call, use_ret_steps=options.use_ret_steps)
    try:
        if options.policy == "teacache":
            fitted = calibrate.fit_teacache(measured, options.use_ret_steps)
        else:
            fitted = calibrate.fit_magcache(measured, sampling.num_inference_steps)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    write_calibration(options.file, options.policy, fitted, {"prompts": len(prompts), "seed": sampling.seed, **call})
    print(options.file)
    if importlib.util.find_spec("matplotlib") is not None:
        plot = options.file.with_suffix(f".{options.policy}.png")
        calibrate.plot_fit(measured, fitted).savefig(plot)
        print(plot)
    return 0


def _uncached_config(options: argparse.Namespace) -> Config:
    """The configuration without its cache, which may lack the very calibration that is to come. Raises ConfigError."""
    from edit_ray.cache.options import CacheOptions
    from edit_ray.config import check_config, load_config

    config = load_config(options.config, options.set, check_model=False).model_copy(update={"cache": CacheOptions()})
    problems = check_config(config)
    if problems:
        raise ConfigError([f"{options.config}: {problem}" for problem in problems])
    return config


def _check_calibration(path: Path) -> None:
    """Raises ConfigError, before anything is measured, if the calibration could not be written to this file."""
    from edit_ray.engine.calibration import read_calibration

    try:
        read_calibration(path)
    except ValueError as error:
        raise ConfigError([f"--file: {error}"]) from None
    if not path.parent.is_dir():
        raise ConfigError([f"--file is {path}, and {path.parent} is no folder"])


def _read_prompts(path: Path) -> list[str]:
    """One prompt a line, blank lines left out. Raises ConfigError."""
    try:
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--prompts {path} cannot be read: {error}"]) from None
    if not prompts:
        raise ConfigError([f"--prompts {path} holds no prompt; there must be one a line"])
    return prompts


_COMMANDS = {
    "down": _down,
    "list": _list,
    "status": _status,
    "cancel": _cancel,
    "report": _report,
    "calibrate": _calibrate,
}

if __name__ == "__main__":
    sys.exit(main())
