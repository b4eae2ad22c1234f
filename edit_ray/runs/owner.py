"""The owner of a run: who submitted it, and through which Ray job."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from edit_ray.errors import ConfigError

OWNER_VARIABLE = "EDIT_RAY_OWNER"
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a submitted job


@dataclass(frozen=True)
class Owner:
    """`job` is the submission id of the Ray job, empty where there is none."""

    name: str
    job: str = ""

    def owns(self, owner: str) -> bool:
        """Whether a run of `owner` is this owner's. A run without an owner is everybody's."""
        return owner in ("", self.name)


def owner_here(environ: Mapping[str, str]) -> Owner:
    """The owner of what this process submits: `$EDIT_RAY_OWNER`, else the login name.

    Raises:
        ConfigError: the variable holds no name.
    """
    name = environ.get(OWNER_VARIABLE) or _login_name()
    if len(name) > 64 or not name.isprintable() or not name.strip():
        raise ConfigError([f"${OWNER_VARIABLE} is {name[:80]!r}; it must be a name of 1 to 64 printable characters"])
    return Owner(name, _submission_id(environ))


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run as a number without a name
        return f"uid-{os.getuid()}"


def _submission_id(environ: Mapping[str, str]) -> str:
    try:
        return str(json.loads(environ[_JOB_VARIABLE])["metadata"]["job_submission_id"])
    except (KeyError, TypeError, ValueError):
        return ""
