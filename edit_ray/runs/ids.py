"""Names and numbers of a run: its id, its owner, and the bounds of what a manifest may hold."""

from __future__ import annotations

import getpass
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from pydantic import Field

from edit_ray.errors import ConfigError

MAX_SEGMENTS = 100_000
MAX_REQUEST = 200  # characters that identify a request

Count = Annotated[int, Field(ge=0, lt=10**9)]
"""Segments, takes, frames, pixels or incarnations: bounded, so that readers can loop over it and add it up."""
SegmentCount = Annotated[int, Field(ge=0, lt=MAX_SEGMENTS + 1)]
"""The number of segments that a run is to have."""
Frame = Annotated[int, Field(ge=0, lt=10**15)]
"""The position of a frame in the video."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
SegmentFile = Annotated[str, Field(pattern=r"^(latents|segments)/[0-9]{5,9}-t[0-9]{1,9}\.[a-z0-9]{2,16}$")]
"""A segment's file, relative to the run's folder and inside it."""

RUN_ID_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"
"""Run ids are safe as a folder's name, on a command line and in a URL."""

OWNER_VARIABLE = "EDIT_RAY_OWNER"
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a submitted job


def check_run_id(run_id: str) -> str:
    """The run id itself. Raises ConfigError where it is not valid."""
    # fullmatch, because `$` also matches before a final newline.
    if not isinstance(run_id, str) or re.fullmatch(RUN_ID_PATTERN, run_id) is None:
        shown = repr(run_id) if len(repr(run_id)) <= 80 else f"{repr(run_id)[:76]}…"
        raise ConfigError(
            [
                f"The run id {shown} is not valid; it must be 1 to 64 of a-z, 0-9, '_' and '-', "
                "beginning with a letter or a digit."
            ]
        )
    return run_id


def new_run_id(now: datetime, token: str) -> str:
    """A run id that sorts by time, such as `20261123-101500-3f2a`; `token` distinguishes two of one second."""
    return check_run_id(f"{now:%Y%m%d-%H%M%S}-{token}")


def check_segment_index(index: int) -> int:
    """The index itself. Raises ConfigError where no run can have a segment of this index."""
    if type(index) is not int or index < 0:
        raise ConfigError([f"the segment's index is {index!r}; it must be a whole number of at least 0"])
    return index


@dataclass(frozen=True)
class Owner:
    """Who submits runs. `job` is the submission id of the Ray job, empty where there is none."""

    name: str
    job: str = ""

    def owns(self, owner: str) -> bool:
        """Whether a run of `owner` belongs to this owner. A run without an owner belongs to everybody."""
        return owner in ("", self.name)


def owner_here(environ: Mapping[str, str]) -> Owner:
    """The owner of what this process submits: `$EDIT_RAY_OWNER`, else the login name.

    Raises ConfigError where the variable holds no name.
    """
    try:
        name = environ.get(OWNER_VARIABLE) or getpass.getuser()
    except (OSError, KeyError):  # a container may run as a number without a name
        name = f"uid-{os.getuid()}"
    if len(name) > 64 or not name.isprintable() or not name.strip():
        raise ConfigError([f"${OWNER_VARIABLE} is {name[:80]!r}; it must be a name of 1 to 64 printable characters"])
    try:
        job = str(json.loads(environ[_JOB_VARIABLE])["metadata"]["job_submission_id"])
    except (KeyError, TypeError, ValueError):
        job = ""
    return Owner(name, job)
