"""The entry point of `edit-ray`: its commands, their arguments, and the exit code."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import edit_ray
from edit_ray.cli import follow_run, inspect_run, model_commands, plan_reuse, run_commands, setup_commands
from edit_ray.config.mistakes import printable
from edit_ray.errors import EditRayError

_COMMON = (
    ("--address", "the Ray cluster to join (default: the one that Ray finds)"),
    ("--output", "the folder of runs (default: $EDIT_RAY_OUTPUT or ~/edit_ray_outputs)"),
)
_FORCE = "also if the run belongs to another owner"
MADE_VARIANTS = (
    *("t2v-1.3B", "t2v-14B", "t2v-A14B", "i2v-14B", "i2v-A14B", "ti2v-5B", "vace-1.3B", "vace-14B"),
    *("causal-1.3B", "causal-14B"),
)
_WAIT: dict[str, Any] = {
    "type": float,
    "default": 30.0,
    "metavar": "S",
    "help": "seconds to wait for the run to start (default: 30)",
}

_OTHER_BITS = "also if the frames will not be bit-identical"

Command = Callable[[argparse.Namespace], int]


class _Escaping:
    """A stream that prints every unprintable character except the newline as its escape sequence."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write("\n".join(map(printable, text.split("\n"))))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def escaping() -> Iterator[None]:
    """Escapes control characters in stdout and stderr: prompts, manifests and errors come from others."""
    with contextlib.redirect_stdout(_Escaping(sys.stdout)), contextlib.redirect_stderr(_Escaping(sys.stderr)):
        yield


@escaping()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    options = parser().parse_args(arguments)
    try:
        command: Command = options.command
        return command(options)
    except EditRayError as error:
        print(f"edit-ray: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | LookupError) else 1
    except KeyboardInterrupt:
        print("edit-ray: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest choice for an unknown one."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentError(action, f"{value!r} is unknown{meant} (known: {', '.join(known)})")


class _Commands:
    """Adds commands to the parser; `command` in the parsed options is the function to call."""

    def __init__(self, top: _Parser) -> None:
        self._common = _Parser(add_help=False)  # the top-level options are accepted after the command as well
        for name, says in _COMMON:
            top.add_argument(name, help=says)
            self._common.add_argument(name, default=argparse.SUPPRESS, help=says)
        self._parsers = top.add_subparsers(metavar="COMMAND", required=True)

    def add(
        self, name: str, run: Command, says: str, *, run_id: bool = False, force: str | None = None, common: bool = True
    ) -> argparse.ArgumentParser:
        command = self._parsers.add_parser(name, parents=[self._common] if common else [], help=says)
        command.set_defaults(command=run)
        if run_id:
            command.add_argument("run_id", help="the run's id")
        if force is not None:
            command.add_argument("--force", action="store_true", help=force)
        return command


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = _Parser(prog="edit-ray", description="Manage the runs, models and actors of EDiT on Ray.")
    top.add_argument("--version", action="version", version=f"edit-ray {edit_ray.__version__}")
    commands = _Commands(top)
    _add_runs(commands)
    _add_steering(commands)
    _add_removal(commands)
    _add_pages(commands)
    _add_models(commands)
    commands.add("doctor", setup_commands.doctor, "check that this machine has what runs need")
    return top


def _add_runs(commands: _Commands) -> None:
    listed = commands.add("list", run_commands.list_runs, "list the runs on disk and in this Ray cluster")
    listed.add_argument("--all", action="store_true", help="also runs of other owners")
    commands.add("status", run_commands.status, "show the state of a run", run_id=True)
    watched = commands.add(
        "watch", follow_run.watch, "follow a run: a progress bar on a terminal, else a line per segment", run_id=True
    )
    watched.add_argument("--wait", **_WAIT)
    commands.add("cancel", run_commands.cancel, "stop a run; committed segments stay", run_id=True, force=_FORCE)
    commands.add("down", run_commands.down, "end all actors", force="also while runs are active; they stop at once")
    for name, run, says in (
        ("resume", run_commands.resume, "continue a run at its first uncommitted segment"),
        ("extend", run_commands.extend, "add segments to an ended run"),
        ("reroll", run_commands.reroll, "generate a run's last segments again, with another seed or prompt"),
    ):
        command = commands.add(name, run, says, run_id=True, force=_FORCE)
        command.add_argument("--allow-different-hardware", action="store_true", help=_OTHER_BITS)
        if name == "resume":
            command.add_argument("--remake-damaged", action="store_true", help="generate damaged files again")
        elif name == "extend":
            command.add_argument("--segments", type=int, required=True, help="the number of segments to add")
        else:
            command.add_argument(
                "--from", dest="start", type=int, required=True, metavar="SEGMENT", help="the first segment"
            )
            command.add_argument("--seed", type=int, help="(default: derived from the run's seed)")
            command.add_argument("--prompt", help="replaces the storyboard from that segment on")


def _add_steering(commands: _Commands) -> None:
    steer = commands.add(
        "steer", run_commands.steer, "edit the storyboard of an active run while it is made", run_id=True, force=_FORCE
    )
    steer.add_argument(
        "--from", dest="start", type=int, metavar="SEGMENT", help="(default: the first one that has not begun)"
    )
    steer.add_argument("--prompt", help="replaces the storyboard from that segment on")
    steer.add_argument("--negative-prompt", metavar="PROMPT")
    steer.add_argument("--guidance-scale", type=float, metavar="G")
    steer.add_argument("--seed", type=int, metavar="S")
    for name, run, says in (
        ("pause", run_commands.pause, "let no further segment of an active run begin; what has begun is made"),
        ("unpause", run_commands.unpause, "let further segments of an active run begin again"),
        ("approve", run_commands.approve, "approve a segment that a run waits at (video.approve: each)"),
    ):
        command = commands.add(name, run, says, run_id=True, force=_FORCE)
        if name == "approve":
            command.add_argument("--segment", type=int, metavar="K", help="and all before it (default: the latest one)")
    branch = commands.add(
        "branch", run_commands.branch, "start a new run that shares the first segments of a run", run_id=True
    )
    branch.add_argument("--at", type=int, required=True, metavar="SEGMENT", help="the first segment of its own")
    branch.add_argument("--new-id", metavar="ID", help="the new run's id (default: made from the time)")
    branch.add_argument("--prompt", help="replaces the storyboard from that segment on")
    branch.add_argument("--seed", type=int, help="replaces the seed from that segment on")
    branch.add_argument("--num-segments", type=int, metavar="N", help="of the whole new run (default: as many)")
    branch.add_argument("--allow-different-hardware", action="store_true", help=_OTHER_BITS)


def _add_removal(commands: _Commands) -> None:
    ended = ["done", "failed", "cancelled"]
    deleted = commands.add("delete", run_commands.delete, "delete an inactive run", run_id=True, force=_FORCE)
    pruned = commands.add("prune", run_commands.prune, "delete your own runs that have not changed for some time")
    pruned.add_argument("--older-than", required=True, metavar="AGE", help="time since the last change: 30d, 12h")
    pruned.add_argument(
        "--state", nargs="+", choices=[*ended, "open"], default=ended, help="(default: every state of an ended run)"
    )
    for command in (deleted, pruned):
        command.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def _add_pages(commands: _Commands) -> None:
    report = commands.add("report", inspect_run.report, "write an HTML report of a run or of a cache record")
    report.add_argument("source", metavar="RECORD_OR_RUN", help="a cache record (JSON), a run's id or a run's folder")
    report.add_argument("--page", type=Path, help="the file to write (default: report.html in the run's folder)")
    commands.add("verify", inspect_run.verify, "check a run's files against their digests", run_id=True)
    _add_serve(commands)
    boards = commands.add("dashboards", setup_commands.dashboards, "generate Grafana dashboards and Prometheus rules")
    boards.add_argument("--into", type=Path, default=Path(), help="the clone, or any folder (default: this folder)")


def _add_serve(commands: _Commands) -> None:
    served = commands.add("serve", follow_run.serve, "serve runs over HTTP: OpenAI's video API, or the page of one run")
    served.add_argument("run_id", nargs="?", help="only this run's page and media, for browsers on this machine")
    served.add_argument("--port", type=int, default=8642, help="(default: 8642; 0, with a run: any free port)")
    served.add_argument("--wait", **_WAIT)
    served.add_argument("--host", default="127.0.0.1", help="the address (default: 127.0.0.1; others need a token)")
    served.add_argument("--token-file", type=Path, help="a file with the token (default: $EDIT_RAY_HTTP_TOKEN)")
    served.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="another name by which clients ask"
    )
    served.add_argument(
        "--config", type=Path, action="append", default=[], help="a model, as a run's YAML; may be repeated"
    )
    served.add_argument("--replicas", type=int, default=1, help="processes that answer (default: 1)")


def _add_models(commands: _Commands) -> None:
    def add(name: str, run: Command, says: str) -> argparse.ArgumentParser:
        command = commands.add(name, run, says, common=False)
        command.add_argument("--config", type=Path, required=True, help="a run's configuration (YAML)")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
        return command

    calibrate = add("calibrate", model_commands.calibrate, "measure a model and fit a policy's options to it")
    tune = add("tune", model_commands.tune, "find the policy with the least computation at a given PSNR")
    for command in (calibrate, tune):
        command.add_argument("--prompts", type=Path, required=True, help="a text file with one prompt per line")
    calibrate.add_argument("--policy", choices=["teacache", "magcache", "ranked", "lemica"], required=True)
    calibrate.add_argument("--file", type=Path, required=True, help="the calibration file to write (JSON)")
    calibrate.add_argument("--use-ret-steps", action="store_true", help="teacache: use e0 instead of e")
    calibrate.add_argument("--batch-size", type=int, default=1, help="ranked, lemica: prompts per batch")
    tune.add_argument("--psnr", type=float, required=True, help="the lowest mean PSNR against uncached frames, in dB")
    tune.add_argument("--seeds", type=int, default=1, help="videos per prompt")
    tune.add_argument("--policies", help="what to try, such as search,teacache,dicache (default: all)")
    tune.add_argument("--budget", type=int, default=400, help="videos that the search may make; 0 for no search")
    tune.add_argument("--file", type=Path, help="where measurements are kept: an interrupted command continues from it")
    plan = add("plan", plan_reuse.plan, "estimate what a run's segments reuse, and what fits on which card")
    plan.add_argument("--forward-ms", type=float, help="time of one transformer forward in milliseconds")
    plan.add_argument("--card", type=float, nargs="+", metavar="GB", help="cards' memory (default: 12 16 24 48 80)")
    made = commands.add(
        "make-model", setup_commands.make_model, "write a published Wan model with random weights", common=False
    )
    made.add_argument("--variant", choices=MADE_VARIANTS, required=True)
    made.add_argument("--output", dest="folder", type=Path, required=True, help="a new folder (diffusers layout)")
    made.add_argument(
        "--text-encoder", choices=["full", "tiny", "none"], default="full", help="UMT5-XXL, a small one, or none"
    )
    made.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the weights")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to draw the weights")
    made.add_argument("--seed", type=int, default=0)
    _add_convert(commands)


def _add_convert(commands: _Commands) -> None:
    converted = commands.add(
        "convert", setup_commands.convert, "write a published causal checkpoint as a model folder", common=False
    )
    converted.add_argument(
        "source", metavar="SOURCE", type=Path, help="the checkpoint: a .pt or .safetensors file, or a diffusers folder"
    )
    converted.add_argument("--base", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="the model that it was made of")
    converted.add_argument("--output", dest="folder", type=Path, required=True, help="a new folder (diffusers layout)")
    for name in ("chunk_size", "window", "sink"):
        converted.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="LATENTS", help="as it was trained")
    converted.add_argument("--rope", choices=["relative", "absolute"], help="(default: relative)")
