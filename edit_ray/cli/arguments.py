"""The commands of `edit-ray`, and what each takes."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

import edit_ray

_PLACES = (
    ("--address", "the Ray to join (default: the one that Ray itself finds)"),
    ("--output", "the folder that holds runs (default: $EDIT_RAY_OUTPUT or ~/edit_ray_outputs)"),
)
_WAIT: dict[str, Any] = {"type": float, "default": 30.0, "metavar": "S", "help": "for the run to begin (default: 30)"}


class _Parser(argparse.ArgumentParser):
    """Names the choice that was most likely meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentError(action, f"{value!r} is unknown{meant} (known: {', '.join(known)})")


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = _Parser(prog="edit-ray", description="Looks after the actors and runs of edit_ray.")
    top.add_argument("--version", action="version", version=f"edit-ray {edit_ray.__version__}")
    places = _Parser(add_help=False)  # the same options again behind the command
    for name, says in _PLACES:
        top.add_argument(name, help=says)
        places.add_argument(name, default=argparse.SUPPRESS, help=says)
    commands = top.add_subparsers(dest="command", required=True)
    _add_runs(commands, places)
    _add_removal(commands, places)
    _add_pages(commands, places)
    _add_measuring(commands)
    _add_making(commands)
    commands.add_parser("doctor", parents=[places], help="whether this machine has what runs need")
    return top


_Commands = argparse._SubParsersAction


def _add_runs(commands: _Commands[_Parser], places: _Parser) -> None:
    """Looking at runs, stopping them, going on with them."""

    def add(name: str, says: str, *, run: bool = True, force: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[places], help=says)
        if run:
            command.add_argument("run_id")
        if force is not None:
            command.add_argument("--force", action="store_true", help=force)
        return command

    others = "also where the run belongs to another owner"
    add("list", "the runs on disk and in this Ray", run=False).add_argument(
        "--all", action="store_true", help="also those of other owners"
    )
    add("status", "where one run stands")
    add("verify", "whether a run's files are as they were written")
    watched = add("watch", "follow a run: live on a terminal, elsewhere a line a segment")
    watched.add_argument("--wait", **_WAIT)
    add("cancel", "stop one run; what is committed stays", force=others)
    add("down", "end all actors", run=False, force="also where runs are at work, which end where they are")
    going_on = {
        "resume": add("resume", "go on with a run at its first segment that is not committed", force=others),
        "extend": add("extend", "give an ended run more segments", force=others),
        "reroll": add("reroll", "make an ended run's segments again, with another seed or prompt", force=others),
    }
    for command in going_on.values():
        command.add_argument(
            "--allow-different-hardware", action="store_true", help="even where the frames' bits will be others"
        )
    going_on["resume"].add_argument(
        "--remake-damaged", action="store_true", help="make committed files again that are not as they were written"
    )
    going_on["extend"].add_argument("--segments", type=int, required=True, help="how many more")
    reroll = going_on["reroll"]
    reroll.add_argument("--from", dest="start", type=int, required=True, metavar="SEGMENT", help="the first of them")
    reroll.add_argument("--seed", type=int, help="(default: one that follows from the run's own)")
    reroll.add_argument("--prompt", help="instead of the storyboard's, from there on")


def _add_removal(commands: _Commands[_Parser], places: _Parser) -> None:
    removed = commands.add_parser("delete", parents=[places], help="remove a run that nobody works on")
    removed.add_argument("run_id")
    removed.add_argument("--force", action="store_true", help="also where the run belongs to another owner")
    pruned = commands.add_parser("prune", parents=[places], help="remove your runs that have not changed for a while")
    pruned.add_argument("--older-than", required=True, metavar="AGE", help="since the last change, such as 30d or 12h")
    ended = ["done", "failed", "cancelled"]
    says = "of the runs (default: every one that has ended)"
    pruned.add_argument("--state", nargs="+", choices=[*ended, "open"], default=ended, help=says)
    for command in (removed, pruned):
        command.add_argument("--yes", action="store_true", help="without asking")


def _add_pages(commands: _Commands[_Parser], places: _Parser) -> None:
    told = commands.add_parser("report", parents=[places], help="a run, or what a cache decided, as one HTML page")
    told.add_argument("source", metavar="RECORD_OR_RUN", help="a record of decisions (JSON), or a run's id or folder")
    told.add_argument("--page", type=Path, help="where to write it (default: report.html in the run, or beside)")
    served = commands.add_parser("serve", parents=[places], help="a run's page and media, for browsers on this machine")
    served.add_argument("run_id")
    served.add_argument("--port", type=int, default=8642, help="of 127.0.0.1 (default: 8642; 0: any free one)")
    served.add_argument("--wait", **_WAIT)
    drawn = commands.add_parser("dashboards", help="make Grafana's dashboards and Prometheus' rules from the catalog")
    drawn.add_argument("--into", type=Path, default=Path(), help="the clone, or any folder (default: this one)")


def _add_measuring(commands: _Commands[_Parser]) -> None:
    """Commands that read a run's configuration."""

    def add(name: str, says: str, config: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=says)
        command.add_argument("--config", type=Path, required=True, help=config)
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one of its values")
        return command

    model = "model and sampling of a run's configuration"
    calibrate = add("calibrate", "measure what a policy has to know of a model", model)
    tune = add("tune", "find the policy that computes least at a likeness to the uncached frames", model)
    for command in (calibrate, tune):
        command.add_argument("--prompts", type=Path, required=True, help="a text file, one prompt a line")
    calibrate.add_argument("--policy", choices=["teacache", "magcache", "ranked"], required=True)
    calibrate.add_argument("--file", type=Path, required=True, help="the calibration to write to (JSON)")
    calibrate.add_argument("--use-ret-steps", action="store_true", help="teacache: watch e0 instead of e")
    calibrate.add_argument("--batch-size", type=int, default=1, help="ranked: prompts that are denoised together")
    tune.add_argument("--psnr", type=float, required=True, help="the least likeness, in dB, as a mean over the prompts")
    tune.add_argument("--seeds", type=int, default=1, help="videos of each prompt")
    tune.add_argument("--policies", help="some of them, such as teacache,dicache")
    planned = add(
        "plan", "what a run's segments will reuse of each other, and what that costs", "a run's configuration"
    )
    planned.add_argument("--forward-ms", type=float, help="milliseconds of one forward of the transformer")


def _add_making(commands: _Commands[_Parser]) -> None:
    made = commands.add_parser("make-model", help="a published Wan's configuration with random weights")
    made.add_argument("--variant", choices=["t2v-1.3B", "t2v-14B", "ti2v-5B"], required=True)
    made.add_argument("--output", dest="folder", type=Path, required=True, help="a new folder, in diffusers' layout")
    made.add_argument(
        "--text-encoder", choices=["full", "tiny", "none"], default="full", help="UMT5-XXL, a small one, or none"
    )
    made.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the weights")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where weights are drawn")
    made.add_argument("--seed", type=int, default=0)
