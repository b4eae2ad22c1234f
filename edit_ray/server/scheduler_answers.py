"""What the segment scheduler says of runs, as recent as it answers: one that is silent delays no reader for long."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

from edit_ray.actors.messages import RunStatus
from edit_ray.errors import UnknownRun

STATUS_AGE_S = 0.5  # an answer that young is not asked for again
STALE_S = 1.0  # one that young stands while another is on its way: many readers do not wait for each other's question
PATIENCE_S = 2.0  # for an answer, after which the last one stands
KEPT = 256  # answers

_log = logging.getLogger(__name__)


class Asks(Protocol):
    """What asks the segment scheduler."""

    def status(self, run_id: str) -> RunStatus:
        """The status of a run. Raises UnknownRun."""

    def runs(self) -> list[RunStatus]:
        """The runs that the segment scheduler knows."""


@dataclass
class _LastAnswer:
    """The last answer to a question, when it came, and the question that is open since then; monotonic seconds."""

    value: Any
    at: float = -math.inf
    open: Future[Any] | None = None
    since: float = 0.0


class SchedulerAnswers:
    """Asks in threads of its own. Any thread may call it."""

    def __init__(self, asks: Asks) -> None:
        self._asks = asks
        self._threads = ThreadPoolExecutor(4, "ask")
        self._kept: OrderedDict[str, _LastAnswer] = OrderedDict()
        self._lock = Lock()

    def known(self, *, fresh: bool = False) -> Mapping[str, RunStatus]:
        """The runs that it knows in the order of submission, by their folders' paths; `fresh`: asked for now."""
        found: Mapping[str, RunStatus] = self._answer("", self._ask_known, {}, fresh)
        return found

    def status(self, run_id: str, *, fresh: bool = False) -> RunStatus | None:
        """The status of a run with its step; None if nobody knows the run."""
        found: RunStatus | None = self._answer(run_id, lambda: self._ask_status(run_id), None, fresh)
        return found

    def _ask_known(self) -> Mapping[str, RunStatus]:
        return {os.path.realpath(run.path): run for run in self._asks.runs()}

    def _ask_status(self, run_id: str) -> RunStatus | None:
        try:
            return self._asks.status(run_id)
        except UnknownRun:
            return None

    def _answer(self, name: str, ask: Callable[[], Any], nothing: Any, fresh: bool) -> Any:
        now = time.monotonic()
        with self._lock:
            kept = self._kept.setdefault(name, _LastAnswer(nothing))
            self._kept.move_to_end(name)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            if not fresh and now - kept.at <= STATUS_AGE_S:
                return kept.value
            if kept.open is None or fresh:
                kept.open, kept.since = self._threads.submit(self._asked, kept, ask, now), now
            if not fresh and now - kept.at <= STALE_S:
                return kept.value
            question, left = kept.open, kept.since + PATIENCE_S - now
        try:
            return question.result(max(0.0, left))
        except TimeoutError:
            return kept.value

    def _asked(self, kept: _LastAnswer, ask: Callable[[], Any], since: float) -> Any:
        """Keep the answer, unless one to a later question is there."""
        try:
            value = ask()
        except Exception as error:  # whatever keeps it from answering, the runs' folders still answer
            _log.warning("the segment scheduler was not asked: %s", error)
            value = kept.value
        with self._lock:
            if since >= kept.since:
                kept.value, kept.at, kept.open = value, time.monotonic(), None
        return value
