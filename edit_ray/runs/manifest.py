"""The manifest: what a run has made, as the fold of the lines that were appended one after the other.

Nothing here touches a file. Every line carries the incarnation of the segment scheduler that wrote it; a line of an
earlier incarnation than the latest `Opened` changes nothing, wherever in the file it came to stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from edit_ray.runs.events import EndState
from edit_ray.runs.layout import FrameLayout
from edit_ray.runs.plan import Take, take_of

SCHEMA = 2

DiskState = Literal["open", "done", "failed", "cancelled"]
"""What a manifest alone can tell: `open` until an end is recorded, whether anybody works on the run or not."""

_FILE = re.compile(r"(latents|segments)/[0-9]{5,9}-t[0-9]{1,9}\.[a-z0-9]{2,16}")

_NO_FIGURES: Mapping[str, float] = {}


@dataclass(frozen=True)
class Begun:
    """The first line. `submission` tells whose run this is when a client must ask again whether it was taken.

    `owner` is who submitted the run, and `job` the submission id of the Ray job that did; each is empty if unknown.
    """

    run_id: str
    version: str
    height: int
    width: int
    layout: FrameLayout
    num_segments: int | None  # None: until it is stopped
    submission: str
    provenance: Mapping[str, str | int]
    schema: int = SCHEMA
    incarnation: int = 1
    owner: str = ""
    job: str = ""


@dataclass(frozen=True)
class Opened:
    """Another incarnation works on the run from here on, on this hardware.

    `replans`: what segments reuse of each other is planned anew, from the first segment that is not committed.
    """

    incarnation: int
    provenance: Mapping[str, str | int]
    replans: bool = False


@dataclass(frozen=True)
class Extended:
    """The run has so many segments from here on.

    What they reuse of earlier ones follows from the plan so far; manifests of earlier versions `replans`.
    """

    incarnation: int
    num_segments: int
    replans: bool = True


@dataclass(frozen=True)
class Rerolled:
    """From `take.start` on another take is made; what is there of earlier ones is kept, and is no part of the video."""

    incarnation: int
    take: Take


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """One committed segment; paths are relative to the run's folder."""

    index: int
    take: int
    prompt: str
    seed: int
    first_frame: int
    num_frames: int
    latents: str
    media: str
    statistics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in (self.latents, self.media):
            if _FILE.fullmatch(path) is None:
                raise ValueError(f"{path!r} is no file of a segment")


@dataclass(frozen=True)
class Committed:
    """A segment's files are durable."""

    incarnation: int
    segment: SegmentRecord


@dataclass(frozen=True)
class Tiled:
    """From segment `start` on latents are decoded in tiles, as the GPU's memory did not do for whole frames."""

    incarnation: int
    start: int


@dataclass(frozen=True)
class Moved:
    """Other hardware works on the run from here on; what segments reuse is planned anew from `start`, the first segment
    that has no latents yet.
    """

    incarnation: int
    provenance: Mapping[str, str | int]
    start: int


@dataclass(frozen=True)
class Dropped:
    """The media of all segments before `before` are gone, to make room (`output.keep_segments`)."""

    incarnation: int
    before: int


@dataclass(frozen=True)
class Ended:
    """The run is over; an `Opened` after it goes on."""

    incarnation: int
    state: EndState
    error: str | None = None
    final: str | None = None


Line = Begun | Opened | Extended | Rerolled | Committed | Tiled | Moved | Dropped | Ended


@dataclass(frozen=True)
class Manifest:
    """What a run has made so far. `segments` is complete from 0 to its length, in order."""

    begun: Begun
    incarnation: int
    provenance: Mapping[str, str | int]
    num_segments: int | None
    segments: tuple[SegmentRecord, ...] = ()
    takes: tuple[Take, ...] = ()
    earlier_takes: tuple[SegmentRecord, ...] = ()
    planned_from: int = 0  # the segment with which what segments reuse of each other was planned anew
    replanned: int = 0  # how often that was
    dropped_before: int = 0
    tiled_from: int | None = None  # the segment from which on frames are decoded in tiles
    end: Ended | None = None

    @classmethod
    def start(cls, begun: Begun) -> Manifest:
        return cls(begun, begun.incarnation, begun.provenance, begun.num_segments)

    @property
    def state(self) -> DiskState:
        return "open" if self.end is None else self.end.state

    @property
    def error(self) -> str | None:
        return None if self.end is None else self.end.error

    @property
    def final(self) -> str | None:
        return None if self.end is None else self.end.final

    @property
    def num_frames(self) -> int | None:
        """Frames of the whole video, None where it goes on until it is stopped."""
        return None if self.num_segments is None else self.begun.layout.total_frames(self.num_segments)

    def without_figures(self, first: int, before: int) -> Manifest:
        """The same for who keeps it in memory for weeks: of segments `first` to `before` - 1, whose media are gone, the
        statistics are left to the file.
        """
        less = tuple(replace(segment, statistics=_NO_FIGURES) for segment in self.segments[first:before])
        return replace(self, segments=self.segments[:first] + less + self.segments[before:])

    def after(self, line: Line) -> Manifest:
        """The manifest with one line more. Raises ValueError where the line cannot follow."""
        if line.incarnation < self.incarnation:
            return self
        match line:
            case Begun():
                raise ValueError("a run begins twice")
            case Opened(incarnation, provenance, replans):
                if incarnation == self.incarnation:
                    raise ValueError(f"incarnation {incarnation} opens the run twice")
                opened = replace(self, incarnation=incarnation, provenance=provenance, end=None)
                return opened._planned_from(len(self.segments)) if replans else opened
            case _ if line.incarnation > self.incarnation:
                raise ValueError(f"incarnation {line.incarnation} writes, and has not opened the run")
            case Extended(_, num_segments, replans):
                extended = replace(self, num_segments=num_segments)
                return extended._planned_from(len(self.segments)) if replans else extended
            case Rerolled(_, take):
                return self._rerolled(take)
            case Committed(_, segment):
                return self._committed(segment)
            case Tiled(_, start):
                if start < len(self.segments):
                    raise ValueError(f"segment {start} is committed, and was not decoded in tiles")
                return replace(self, tiled_from=start)
            case Moved(_, provenance, start):
                if start < len(self.segments):
                    raise ValueError(f"segment {start} is committed, and was planned before")
                return replace(self, provenance=provenance)._planned_from(start)
            case Dropped(_, before):
                return replace(self, dropped_before=before)
            case Ended():
                return replace(self, end=line)

    def _rerolled(self, take: Take) -> Manifest:
        if take.number != len(self.takes) + 1 or take.start > len(self.segments):
            raise ValueError(f"take {take.number} from segment {take.start} does not follow")
        kept, replaced = self.segments[: take.start], self.segments[take.start :]
        rerolled = replace(
            self, takes=(*self.takes, take), segments=kept, earlier_takes=(*self.earlier_takes, *replaced)
        )
        return rerolled._planned_from(take.start)

    def _planned_from(self, start: int) -> Manifest:
        return replace(self, planned_from=start, replanned=self.replanned + 1)

    def _committed(self, segment: SegmentRecord) -> Manifest:
        if (segment.index, segment.take) != (len(self.segments), take_of(segment.index, self.takes)):
            raise ValueError(f"segment {segment.index} of take {segment.take} does not follow")
        return replace(self, segments=(*self.segments, segment))
