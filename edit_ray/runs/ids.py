"""The names of runs, safe as a folder's name, on a command line and in a URL; the numbers of their segments."""

import re
from datetime import datetime

from edit_ray.errors import ConfigError

RUN_ID_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"


def check_run_id(run_id: str) -> str:
    """The run id itself.

    Raises:
        ConfigError: it is no valid run id.
    """
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
    """A run id that sorts by time, such as `20261123-101500-3f2a`; `token` keeps two of one second apart."""
    return check_run_id(f"{now:%Y%m%d-%H%M%S}-{token}")


def check_segment_index(index: int) -> int:
    """Raises ConfigError where no run can have a segment of this index."""
    if type(index) is not int or index < 0:
        raise ConfigError([f"the segment's index is {index!r}; it must be a whole number of at least 0"])
    return index
