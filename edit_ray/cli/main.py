"""The entry point of `edit-ray`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edit_ray.cli import look, measure, plan, remove, runs, watch
from edit_ray.cli.arguments import parser
from edit_ray.cli.dashboards import dashboards
from edit_ray.cli.doctor import doctor
from edit_ray.cli.make_model import make_model
from edit_ray.cli.report import report
from edit_ray.cli.serve import serve
from edit_ray.cli.terminal import escaping
from edit_ray.cli.verify import verify
from edit_ray.errors import EditRayError

_COMMANDS = {
    "down": runs.down,
    "list": look.list_runs,
    "status": look.status,
    "cancel": runs.cancel,
    "resume": runs.resume,
    "extend": runs.extend,
    "reroll": runs.reroll,
    "delete": remove.delete,
    "prune": remove.prune,
    "verify": verify,
    "watch": watch.watch,
    "report": report,
    "serve": serve,
    "calibrate": measure.calibrate,
    "tune": measure.tune,
    "plan": plan.plan,
    "dashboards": dashboards,
    "make-model": make_model,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    with escaping():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except EditRayError as error:
        print(f"edit-ray: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | LookupError) else 1
    except KeyboardInterrupt:
        print("edit-ray: interrupted", file=sys.stderr)
        return 130
