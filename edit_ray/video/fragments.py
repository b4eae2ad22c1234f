"""The bytes of fragmented MP4 (ISO/IEC 14496-12): taking a segment's file apart, moving it to its place in the video.

An encoder that is told one segment writes a whole file: `ftyp` and `moov` (the init, alike for all segments of a run),
then one `moof` and one `mdat` (the fragment) that begin at time 0. Placed fragments behind one init are one video.
Only what our encoder writes is understood; everything else is refused before a byte of it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction


def time_scale(fps: float) -> tuple[int, int]:
    """Ticks a second and ticks a frame; exact, also for 24000/1001 frames a second, which `fps` is nearest to."""
    rate = Fraction(fps).limit_denominator(1001)
    return (1000 * rate.numerator, 1000) if rate.denominator == 1 else (rate.numerator, rate.denominator)


_FIELDS_BEFORE = {b"stsd": 8, b"avc1": 78}
"""Bytes of a box's own fields, before the boxes in it."""

_LARGEST_HEADER = 1 << 20  # bytes of one init, or of a fragment up to its mdat

_TFHD_BASE_DATA_OFFSET, _TFHD_BASE_IS_MOOF = 0x000001, 0x020000
_TFHD_FIELDS = ((0x000001, 8), (0x000002, 4), (0x000008, 4), (0x000010, 4), (0x000020, 4))
_TFHD_DURATION, _TFHD_SIZE = 0x000008, 0x000010
_TRUN_OFFSET, _TRUN_FIRST_FLAGS = 0x000001, 0x000004
_TRUN_DURATION, _TRUN_SIZE, _TRUN_FLAGS, _TRUN_COMPOSITION = 0x000100, 0x000200, 0x000400, 0x000800


@dataclass(frozen=True)
class Fragment:
    """What a fragment says of itself. `decode_time` is that of its first frame, `frame_ticks` how long each lasts."""

    sequence_number: int
    decode_time: int
    num_frames: int
    frame_ticks: int = 1000


@dataclass(frozen=True)
class _Box:
    kind: bytes
    start: int  # of its header
    body: int
    end: int


def split(data: bytes) -> tuple[bytes, bytes]:
    """The init and the fragment of an encoded segment; an index (`mfra`) behind them is left out.

    Raises ValueError if `data` is not `ftyp moov moof mdat [mfra]` with a fragment that `read_fragment` understands.
    """
    boxes = list(_boxes(data, 0, len(data)))
    kinds = [box.kind for box in boxes]
    if kinds[:4] != [b"ftyp", b"moov", b"moof", b"mdat"] or kinds[4:] not in ([], [b"mfra"]):
        raise ValueError(f"an encoded segment consists of {_listed(kinds)}, not of ftyp, moov, moof and mdat")
    if boxes[1].end > _LARGEST_HEADER:
        raise ValueError(f"the init of a segment has {boxes[1].end} bytes, at most {_LARGEST_HEADER} are valid")
    fragment = data[boxes[2].start : boxes[3].end]
    read_fragment(fragment)
    return data[: boxes[1].end], fragment


@dataclass(frozen=True)
class Form:
    """What a player has to know before it loads a video: RFC 6381's name of the codec, and pixels."""

    codec: str
    width: int
    height: int


def read_form(init: bytes) -> Form:
    """What an init says of its one H.264 track. Raises ValueError if it is anything else."""
    start, end = 0, len(init)
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1", b"avcC"):
        box = next((box for box in _boxes(init, start, end) if box.kind == kind), None)
        if box is None:
            raise ValueError(f"an init has no {kind.decode()}")
        start, end = box.body + _FIELDS_BEFORE.get(kind, 0), box.end
        if kind == b"avc1":
            width, height = _number(init, box.body + 24, 2, end), _number(init, box.body + 26, 2, end)
    return Form(f"avc1.{_number(init, start + 1, 3, end):06x}", width, height)


def read_fragment(data: bytes) -> Fragment:
    """Checks a whole fragment: its frames' sizes add up to its media, and all last as long.

    Raises ValueError if it is anything else.
    """
    return _located(data)[0]


def place(fragment: bytes, *, sequence_number: int, first_frame: int) -> bytes:
    """The fragment as number `sequence_number` (from 1) of the video, its first frame being `first_frame` (from 0).

    Raises ValueError if it is no fragment or a number does not fit its field.
    """
    found, mfhd, tfdt = _located(fragment)
    placed = bytearray(fragment)
    _write(placed, mfhd.body + 4, 4, sequence_number, "sequence number")
    _write(placed, tfdt.body + 4, tfdt.end - tfdt.body - 4, first_frame * found.frame_ticks, "decode time")
    return bytes(placed)


def _located(data: bytes) -> tuple[Fragment, _Box, _Box]:
    """What the fragment says, and where its numbers stand."""
    moof, mdat = _only(data, 0, len(data), b"moof", b"mdat")
    if moof.end > _LARGEST_HEADER:
        raise ValueError(f"a moof has {moof.end} bytes, at most {_LARGEST_HEADER} are valid")
    mfhd, traf = _only(data, moof.body, moof.end, b"mfhd", b"traf")
    tfhd, tfdt, trun = _only(data, traf.body, traf.end, b"tfhd", b"tfdt", b"trun")
    version, _ = _version_and_flags(data, tfdt)
    time_bytes = 8 if version == 1 else 4
    if version > 1 or tfdt.end - tfdt.body != 4 + time_bytes or mfhd.end - mfhd.body != 8:
        raise ValueError("a fragment's mfhd or tfdt has another form than the standard's")
    num_frames, media_bytes, ticks = _samples(data, tfhd, trun, mdat.body)
    if media_bytes != mdat.end - mdat.body:
        raise ValueError(f"a fragment's frames take {media_bytes} bytes, its mdat holds {mdat.end - mdat.body}")
    sequence_number = _number(data, mfhd.body + 4, 4)
    return Fragment(sequence_number, _number(data, tfdt.body + 4, time_bytes), num_frames, ticks), mfhd, tfdt


def _samples(data: bytes, tfhd: _Box, trun: _Box, media_start: int) -> tuple[int, int, int]:
    """Frames of a track run, the bytes that they take together, the ticks that each lasts."""
    _, flags = _version_and_flags(data, tfhd)
    if flags & _TFHD_BASE_DATA_OFFSET or not flags & _TFHD_BASE_IS_MOOF:
        raise ValueError("a fragment counts from elsewhere than its own moof, so it cannot be moved")
    defaults, at = dict.fromkeys((flag for flag, _ in _TFHD_FIELDS), 0), tfhd.body + 8
    for flag, width in _TFHD_FIELDS:
        if flags & flag:
            defaults[flag] = _number(data, at, width, tfhd.end)
            at += width
    _, flags = _version_and_flags(data, trun)
    count, at = _number(data, trun.body + 4, 4, trun.end), trun.body + 8
    if not flags & _TRUN_OFFSET or _number(data, at, 4, trun.end) != media_start:
        raise ValueError("a fragment's frames do not begin where its mdat does")
    at += 4 + (4 if flags & _TRUN_FIRST_FLAGS else 0)
    fields = [f for f in (_TRUN_DURATION, _TRUN_SIZE, _TRUN_FLAGS, _TRUN_COMPOSITION) if flags & f]
    if count == 0 or at + 4 * len(fields) * count != trun.end:
        raise ValueError(f"a fragment says {count} frames and lists another number of them")
    rows = struct.unpack(f">{len(fields) * count}I", data[at : trun.end])
    columns = {field: rows[index :: len(fields)] for index, field in enumerate(fields)}
    durations = columns.get(_TRUN_DURATION, (defaults[_TFHD_DURATION],))
    if len(set(durations)) != 1 or durations[0] < 1 or any(columns.get(_TRUN_COMPOSITION, ())):
        raise ValueError("a fragment has frames that last unlike long, or come out of order")
    sizes = columns.get(_TRUN_SIZE)
    return count, sum(sizes) if sizes is not None else count * defaults[_TFHD_SIZE], durations[0]


def _boxes(data: bytes, start: int, end: int) -> Iterator[_Box]:
    """The boxes that fill `data[start:end]`."""
    while start < end:
        size, header, kind = _number(data, start, 4, end), 8, data[start + 4 : start + 8]
        if size == 1:
            size, header = _number(data, start + 8, 8, end), 16
        if not header <= size <= end - start:
            raise ValueError(f"a box of {size} bytes at byte {start} does not fit into what holds it")
        yield _Box(kind, start, start + header, start + size)
        start += size


def _only(data: bytes, start: int, end: int, *kinds: bytes) -> list[_Box]:
    """The boxes of `data[start:end]`, which must be of these kinds, in this order."""
    boxes = []
    for box in _boxes(data, start, end):
        boxes.append(box)
        if len(boxes) > len(kinds):
            break
    found = [box.kind for box in boxes]
    if found != list(kinds):
        raise ValueError(f"a fragment has {_listed(found)} where {_listed(kinds)} must be")
    return boxes


def _version_and_flags(data: bytes, box: _Box) -> tuple[int, int]:
    word = _number(data, box.body, 4, box.end)
    return word >> 24, word & 0xFFFFFF


def _number(data: bytes, at: int, width: int, end: int | None = None) -> int:
    if at + width > (len(data) if end is None else end):
        raise ValueError(f"the data ends within a number at byte {at}")
    return int.from_bytes(data[at : at + width], "big")


def _write(data: bytearray, at: int, width: int, value: int, name: str) -> None:
    if not 0 <= value < 1 << 8 * width:
        raise ValueError(f"{name} {value} does not fit into {width} bytes")
    data[at : at + width] = value.to_bytes(width, "big")


def _listed(kinds: list[bytes] | tuple[bytes, ...]) -> str:
    return ", ".join(ascii(kind.decode("latin-1"))[1:-1] for kind in kinds[:6]) or "nothing"
