"""The command line of `edit-ray`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edit_ray.cli import measure, plan, runs, watch
from edit_ray.cli.dashboards import dashboards
from edit_ray.cli.make_model import make_model
from edit_ray.cli.report import report
from edit_ray.cli.serve import serve
from edit_ray.errors import EditRayError

_COMMANDS = {
    "down": runs.down,
    "list": runs.list_runs,
    "status": runs.status,
    "cancel": runs.cancel,
    "resume": runs.resume,
    "extend": runs.extend,
    "reroll": runs.reroll,
    "watch": watch.watch,
    "report": report,
    "serve": serve,
    "calibrate": measure.calibrate,
    "tune": measure.tune,
    "plan": plan.plan,
    "dashboards": dashboards,
    "make-model": make_model,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code: 0 done, 1 failed, 2 bad input."""
    options = parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except EditRayError as error:
        print(f"edit-ray: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | LookupError) else 1


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="edit-ray", description="Looks after the actors and runs of edit_ray.")
    top.add_argument("--address", help="the Ray to join (default: the one that Ray itself finds)")
    top.add_argument("--output", help="the folder that holds runs (default: $EDIT_RAY_OUTPUT or ~/edit_ray_outputs)")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("down", help="end all actors; runs in progress end where they are")
    commands.add_parser("list", help="the runs that the segment scheduler knows")
    for name, says in (("status", "where one run stands"), ("cancel", "stop one run; what is committed stays")):
        commands.add_parser(name, help=says).add_argument("run_id")
    _add_going_on(commands)
    told = commands.add_parser("report", help="a run, or what a cache decided, as one HTML page")
    told.add_argument("source", metavar="RECORD_OR_RUN", help="a record of decisions (JSON), or a run's id or folder")
    told.add_argument("--page", type=Path, help="where to write it (default: report.html in the run, or beside)")
    served = commands.add_parser("serve", help="a run's page and media, for browsers on this machine")
    served.add_argument("run_id")
    served.add_argument("--port", type=int, default=8642, help="of 127.0.0.1 (default: 8642; 0: any free one)")
    drawn = commands.add_parser("dashboards", help="make Grafana's dashboards and Prometheus' rules from the catalog")
    drawn.add_argument("--into", type=Path, default=Path(), help="the clone, or any folder (default: this one)")
    calibrate = commands.add_parser("calibrate", help="measure what a policy has to know of a model")
    _add_measuring(calibrate)
    calibrate.add_argument("--policy", choices=["teacache", "magcache", "ranked"], required=True)
    calibrate.add_argument("--file", type=Path, required=True, help="the calibration to write to (JSON)")
    calibrate.add_argument("--use-ret-steps", action="store_true", help="teacache: watch e0 instead of e")
    calibrate.add_argument("--batch-size", type=int, default=1, help="ranked: prompts that are denoised together")
    tune = commands.add_parser("tune", help="find the policy that computes least at a likeness to the uncached frames")
    _add_measuring(tune)
    tune.add_argument("--psnr", type=float, required=True, help="the least likeness, in dB, as a mean over the prompts")
    tune.add_argument("--seeds", type=int, default=1, help="videos of each prompt")
    tune.add_argument("--policies", help="some of them, such as teacache,dicache")
    planned = commands.add_parser("plan", help="what a run's segments will reuse of each other, and what that costs")
    _add_config(planned, "a run's configuration")
    planned.add_argument("--forward-ms", type=float, help="milliseconds of one forward of the transformer")
    _add_making(commands.add_parser("make-model", help="a published Wan's configuration with random weights"))
    return top


def _add_making(made: argparse.ArgumentParser) -> None:
    made.add_argument("--variant", choices=["t2v-1.3B", "t2v-14B", "ti2v-5B"], required=True)
    made.add_argument("--output", dest="folder", type=Path, required=True, help="a new folder, in diffusers' layout")
    made.add_argument(
        "--text-encoder", choices=["full", "tiny", "none"], default="full", help="UMT5-XXL, a small one, or none"
    )
    made.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the weights")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where weights are drawn")
    made.add_argument("--seed", type=int, default=0)


def _add_going_on(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """What an ended run, or one that stands still, can go on with; and following one that goes on."""
    resume = commands.add_parser("resume", help="go on with a run at its first segment that is not committed")
    extend = commands.add_parser("extend", help="give an ended run more segments")
    reroll = commands.add_parser("reroll", help="make an ended run's segments again, with another seed or prompt")
    for command in (resume, extend, reroll):
        command.add_argument("run_id")
        command.add_argument(
            "--allow-different-hardware", action="store_true", help="even where the frames' bits will be others"
        )
    extend.add_argument("--segments", type=int, required=True, help="how many more")
    reroll.add_argument("--from", dest="start", type=int, required=True, metavar="SEGMENT", help="the first of them")
    reroll.add_argument("--seed", type=int, help="(default: one that follows from the run's own)")
    reroll.add_argument("--prompt", help="instead of the storyboard's, from there on")
    watch = commands.add_parser("watch", help="follow a run: live on a terminal, elsewhere a line a segment")
    watch.add_argument("run_id")


def _add_config(command: argparse.ArgumentParser, says: str) -> None:
    command.add_argument("--config", type=Path, required=True, help=says)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one of its values")


def _add_measuring(command: argparse.ArgumentParser) -> None:
    _add_config(command, "model and sampling of a run's configuration")
    command.add_argument("--prompts", type=Path, required=True, help="a text file, one prompt a line")
