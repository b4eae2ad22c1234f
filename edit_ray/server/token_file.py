"""Where the door's token comes from."""

from __future__ import annotations

import os
from pathlib import Path

from edit_ray.errors import ConfigError

TOKEN_VARIABLE = "EDIT_RAY_HTTP_TOKEN"
_MAX_TOKEN_BYTES = 4096


def token_of(file: Path | None, name: str = "--token-file") -> str | None:
    """The token in a file, else in `$EDIT_RAY_HTTP_TOKEN`; None if there is none. Raises ConfigError."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_TOKEN_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise ConfigError([f"{name} is {str(file)!r}, which cannot be read ({reason})"]) from None
