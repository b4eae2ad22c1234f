"""The one guard around work that may fail: figures, clean-up, notes for later."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Logs an error of what is done inside, and drops it. `what` says what was tried, such as "count a segment"."""
    try:
        yield
    except Exception as error:
        _log.warning("could not %s: %s: %s", what, type(error).__name__, error)
