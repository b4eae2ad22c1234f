"""What becomes of a prefetch: whatever was not in place when it was asked for ends as exactly one outcome."""

from __future__ import annotations

from edit_ray.cache.tiering.account import Entry
from edit_ray.cache.tiering.counters import Outcome, Prefetches
from edit_ray.cache.tiering.requests import Request, Wanted


class Ahead:
    """Follows each prefetch from its request to its outcome: on its read, then, if it was a hint, on its entry."""

    def __init__(self, prefetches: Prefetches) -> None:
        self._prefetches = prefetches

    def ask(self, request: Request, read: Wanted) -> None:
        """A read was not in place when it was asked for; one of which this is known already is not counted again."""
        if request.kind in ("segment", "hint") and not read.counted:
            read.counted, read.late = True, request.needed
            self._prefetches.requested += 1

    def need(self, reads: list[Wanted]) -> None:
        """These are waited for now."""
        for read in reads:
            read.late = read.late or not read.settled

    def end(self, read: Wanted, outcome: Outcome) -> None:
        """The outcome of a read, if it is a prefetch; what came in time for others may have come late for this one."""
        if read.counted:
            if outcome == "wasted" and read.entry is not None:
                self._prefetches.wasted_bytes += read.entry.size
            self._prefetches.end("late" if read.late and outcome == "useful" else outcome)
            read.counted = False

    def brought(self, read: Wanted, entry: Entry) -> None:
        """A hint has come true; whether it was of use is seen when the entry is read, or leaves."""
        if read.counted and not read.late and not entry.doomed:
            entry.prefetches += 1
            read.counted = False
        self.end(read, "wasted" if entry.doomed else "useful")

    def used(self, entry: Entry) -> None:
        """It was read where a hint had brought it."""
        self._prefetches.end("useful", entry.prefetches)
        entry.prefetches = 0

    def wasted(self, entry: Entry) -> None:
        """It leaves the place where a hint had brought it."""
        self._prefetches.end("wasted", entry.prefetches)
        self._prefetches.wasted_bytes += entry.size * entry.prefetches
        entry.prefetches = 0
