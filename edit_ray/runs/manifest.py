"""The manifest: what a run has made, as the fold of the lines that were appended to its file.

Nothing here touches a file. Every line has the incarnation of the segment scheduler that wrote it. A line of an earlier
incarnation than the latest `Opened` changes nothing, wherever it is in the file. Nor does a second `Opened` of one
incarnation: where a lock was lost, the writer whose line comes first owns the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, overload

from edit_ray.runs.events import EndState
from edit_ray.runs.ids import Count, Frame, Seed, SegmentCount, SegmentFile
from edit_ray.runs.run_plan import Change, Edit, FrameLayout, Take, take_of

SCHEMA = 4
READABLE = (2, 3, SCHEMA)
"""2: without digests; an extension or a re-roll was a line of its own behind `Opened`. 3: without edits and holds."""

Provenance = Mapping[str, str | Count]
"""What the bits of a run depend on besides its configuration: device, versions, threads, digests."""


@dataclass(frozen=True)
class Begun:
    """The first line. `submission` identifies the request that began the run, so that a client can repeat it.

    `owner` submitted the run, through the Ray job with submission id `job`; each is empty if unknown. `branched_from`
    is the run that it shares its first segments with, empty if there is none.
    """

    run_id: str
    version: str
    height: Count
    width: Count
    layout: FrameLayout
    num_segments: SegmentCount | None  # None: until it is stopped
    submission: str
    provenance: Provenance
    schema: Count = SCHEMA
    incarnation: Count = 1
    owner: str = ""
    job: str = ""
    branched_from: str = ""
    kind: Literal["begun"] = field(default="begun", kw_only=True)


@dataclass(frozen=True)
class Extended:
    """The run has `num_segments` segments from here on, whose reuse follows the plan so far.

    `replans`: it is planned again, as in manifests of earlier versions.
    """

    incarnation: Count
    num_segments: SegmentCount
    replans: bool = True
    kind: Literal["extended"] = field(default="extended", kw_only=True)


@dataclass(frozen=True)
class Rerolled:
    """From `take.start` on another take is made; earlier ones are kept, and are no longer part of the video."""

    incarnation: Count
    take: Take
    kind: Literal["rerolled"] = field(default="rerolled", kw_only=True)


@dataclass(frozen=True)
class Edited:
    """The storyboard of segments that are not committed is another one from here on."""

    incarnation: Count
    edit: Edit
    kind: Literal["edited"] = field(default="edited", kw_only=True)


@dataclass(frozen=True)
class Paused:
    """No further segment begins until a line says `paused=False`."""

    incarnation: Count
    paused: bool
    kind: Literal["paused"] = field(default="paused", kw_only=True)


@dataclass(frozen=True)
class Approved:
    """Segments 0 … `before`-1 are approved (`video.approve`)."""

    incarnation: Count
    before: Count
    kind: Literal["approved"] = field(default="approved", kw_only=True)


@dataclass(frozen=True)
class Opened:
    """Another incarnation works on the run from here on, on this hardware, beginning with a `change`.

    `replans`: the reuse between segments is planned again, from the first uncommitted segment.
    `writer` is random, so that two that open the run at once write different lines.
    """

    incarnation: Count
    provenance: Provenance
    replans: bool = False
    change: Extended | Rerolled | None = None
    writer: str = ""
    kind: Literal["opened"] = field(default="opened", kw_only=True)


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """One committed segment; paths are relative to the run's folder.

    `digests` are those of the files that the segment's frames are read from: `latents`, `media` and `init` (init.mp4),
    each xxh3_64 as 16 hexadecimal digits. Segments made by earlier versions have none.
    """

    index: Count
    take: Count
    prompt: str
    seed: Seed
    first_frame: Frame
    num_frames: Count
    latents: SegmentFile
    media: SegmentFile
    statistics: Mapping[str, float] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed:
    """A segment's files are durable."""

    incarnation: Count
    segment: SegmentRecord
    kind: Literal["committed"] = field(default="committed", kw_only=True)


@dataclass(frozen=True)
class Tiled:
    """From segment `start` on latents are decoded in tiles: the GPU had too little memory for whole frames."""

    incarnation: Count
    start: Count
    kind: Literal["tiled"] = field(default="tiled", kw_only=True)


@dataclass(frozen=True)
class HardwareChanged:
    """Other hardware works on the run from here on; reuse is planned again from `start`, which has no latents yet."""

    incarnation: Count
    provenance: Provenance
    start: Count
    kind: Literal["hardware_changed"] = field(default="hardware_changed", kw_only=True)


@dataclass(frozen=True)
class Dropped:
    """Segments 0 … `before`-1 lose their media (`output.keep_segments`); the files are removed after this line."""

    incarnation: Count
    before: Count
    kind: Literal["dropped"] = field(default="dropped", kw_only=True)


@dataclass(frozen=True)
class Ended:
    """The run is over, unless an `Opened` follows."""

    incarnation: Count
    state: EndState
    error: str | None = None
    final: str | None = None
    final_digest: str | None = None  # xxh3_64
    kind: Literal["ended"] = field(default="ended", kw_only=True)


Steering = Edited | Paused | Approved
Line = Begun | Opened | Extended | Rerolled | Steering | Committed | Tiled | HardwareChanged | Dropped | Ended


class Records(Sequence[SegmentRecord]):
    """Records in order; equal to a tuple of the same.

    Appending copies nothing: the longer sequence shares the list of the shorter one, which keeps its length.
    """

    __slots__ = ("_length", "_shared")

    def __init__(self, records: Iterable[SegmentRecord] = ()) -> None:
        self._shared = list(records)
        self._length = len(self._shared)

    def and_then(self, *records: SegmentRecord) -> Records:
        """These records and the given ones."""
        longer = object.__new__(Records)
        # Where another sequence has already extended the shared list, this one takes its own copy.
        longer._shared = self._shared if len(self._shared) == self._length else list(self)
        longer._shared.extend(records)
        longer._length = self._length + len(records)
        return longer

    def forget_statistics(self, first: int, before: int) -> None:
        """Free the statistics of records `first` to `before` - 1, here and in sequences that share them."""
        for index in range(first, min(before, self._length)):
            self._shared[index] = replace(self._shared[index], statistics={})

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> SegmentRecord: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[SegmentRecord, ...]: ...
    def __getitem__(self, at: int | slice) -> SegmentRecord | tuple[SegmentRecord, ...]:
        if isinstance(at, slice):
            return tuple(self._shared[index] for index in range(*at.indices(self._length)))
        return self._shared[range(self._length)[at]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Records | tuple) and tuple(self) == tuple(other)


@dataclass(frozen=True)
class Manifest:
    """What a run has made so far. `segments` is complete from 0 to its length, in order.

    `changes` are the takes and the edits, in the order of their lines.
    """

    begun: Begun
    incarnation: int
    provenance: Provenance
    num_segments: int | None
    segments: Records = field(default_factory=Records)
    takes: tuple[Take, ...] = ()
    changes: tuple[Change, ...] = ()
    paused: bool = False
    approved: int = 0  # segments 0 … approved-1
    earlier_takes: Records = field(default_factory=Records)
    planned_from: int = 0  # the segment from which the reuse between segments was last planned
    replanned: int = 0  # how many times it was replanned
    dropped_before: int = 0
    tiled_from: int | None = None  # the segment from which on frames are decoded in tiles
    end: Ended | None = None

    @classmethod
    def start(cls, begun: Begun) -> Manifest:
        return cls(begun, begun.incarnation, begun.provenance, begun.num_segments)

    @property
    def state(self) -> Literal["open", "done", "failed", "cancelled"]:
        """`open` until an end is recorded, whether a process works on the run or not."""
        return "open" if self.end is None else self.end.state

    @property
    def error(self) -> str | None:
        return None if self.end is None else self.end.error

    @property
    def final(self) -> str | None:
        return None if self.end is None else self.end.final

    @property
    def num_frames(self) -> int | None:
        """Frames of the whole video, None where it continues until it is stopped."""
        return None if self.num_segments is None else self.begun.layout.total_frames(self.num_segments)

    def after(self, line: Line) -> Manifest:
        """The manifest after one more line. Raises ValueError where the line cannot follow."""
        if line.incarnation < self.incarnation:
            return self
        match line:
            case Begun():
                raise ValueError("a run begins twice")
            case Opened(incarnation, provenance, replans, change):
                if incarnation == self.incarnation:
                    return self
                opened = replace(self, incarnation=incarnation, provenance=provenance, end=None)
                opened = opened._planned_from(len(self.segments)) if replans else opened
                return opened if change is None else opened.after(change)
            case _ if line.incarnation > self.incarnation:
                raise ValueError(f"incarnation {line.incarnation} writes, and has not opened the run")
            case Extended(_, num_segments, replans):
                if num_segments < len(self.segments):
                    raise ValueError(f"the run has {len(self.segments)} segments, and cannot end with {num_segments}")
                extended = replace(self, num_segments=num_segments)
                return extended._planned_from(len(self.segments)) if replans else extended
            case Rerolled(_, take):
                return self._rerolled(take)
            case Edited() | Paused() | Approved() if self.end is not None:
                raise ValueError(f"the run has ended, and its line {line.kind!r} comes too late")
            case Edited(_, edit):
                if edit.start < len(self.segments):
                    raise ValueError(f"segment {edit.start} is committed, and its prompt cannot be edited")
                return replace(self, changes=(*self.changes, edit))
            case Paused(_, paused):
                return replace(self, paused=paused)
            case Approved(_, before):
                if before > len(self.segments):
                    raise ValueError(f"segments before {before} are approved, and only {len(self.segments)} were made")
                return replace(self, approved=before)
            case Committed(_, segment):
                self.check_follows(segment)
                return self.and_then(segment)
            case Tiled(_, start):
                if start < len(self.segments):
                    raise ValueError(f"segment {start} is committed, and was not decoded in tiles")
                return replace(self, tiled_from=start)
            case HardwareChanged(_, provenance, start):
                if start < len(self.segments):
                    raise ValueError(f"segment {start} is committed, and was planned before")
                return replace(self, provenance={**self.provenance, **provenance})._planned_from(start)
            case Dropped(_, before):
                if before > len(self.segments):
                    raise ValueError(f"segments before {before} are gone, and only {len(self.segments)} were made")
                return replace(self, dropped_before=before)
            case Ended():
                return replace(self, end=line)

    def _rerolled(self, take: Take) -> Manifest:
        if take.number != len(self.takes) + 1 or take.start > len(self.segments):
            raise ValueError(f"take {take.number} from segment {take.start} does not follow")
        rerolled = replace(
            self,
            takes=(*self.takes, take),
            changes=(*self.changes, take),
            approved=min(self.approved, take.start),
            segments=Records(self.segments[: take.start]),
            earlier_takes=self.earlier_takes.and_then(*self.segments[take.start :]),
        )
        return rerolled._planned_from(take.start)

    def _planned_from(self, start: int) -> Manifest:
        return replace(self, planned_from=start, replanned=self.replanned + 1)

    def check_follows(self, segment: SegmentRecord, ahead: int = 0) -> None:
        """Raise ValueError where the segment cannot be next, behind `ahead` segments that are not in here yet."""
        take = take_of(segment.index, self.takes) if self.takes else 0
        if segment.index != len(self.segments) + ahead or segment.take != take:
            raise ValueError(f"segment {segment.index} of take {segment.take} does not follow")

    def and_then(self, *segments: SegmentRecord) -> Manifest:
        """The manifest with these segments appended."""
        return replace(self, segments=self.segments.and_then(*segments))
