"""Fragmented MP4 (ISO/IEC 14496-12): a segment's file as ffmpeg writes it, taken apart and put into the run's folder.

The encoder writes `ftyp` and `moov` (the init, equal for all segments of a run), then one `moof` and one `mdat` (the
fragment, which holds its own number and time). Fragments in order behind one init are one video.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edit_ray import files

_SAMPLE_DESCRIPTION = re.compile(rb"stsd.{12}avc1.{24}(.{2})(.{2}).*?avcC.(.{3})", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One segment's fragment: its path relative to the run's folder, and its frames in the video."""

    path: str
    first_frame: int
    num_frames: int


def write_part(folder: Path, part: Part, encoded: bytes) -> tuple[int, int]:
    """Writes what `encode` returned as the fragment `part`, durably, and its init as the run's if there is none yet.

    Returns the digests of the two, the init's first. Raises ValueError if the init differs from the run's: then its
    frames cannot be played behind the others.
    """
    init, fragment = split(encoded)
    path = folder / "init.mp4"
    if not path.exists():
        files.write_atomic(path, init)
    elif files.read_bytes(path) != init:
        raise ValueError(f"{part.path} is encoded in another way than {path} says, and cannot follow what is there")
    files.write_atomic(folder / part.path, fragment)
    return files.digest_of(init), files.digest_of(fragment)


def split(encoded: bytes) -> tuple[bytes, bytes]:
    """The init and the fragment of an encoded segment. Raises ValueError if it is not `ftyp moov moof mdat`."""
    kinds, ends = _boxes(encoded)
    if kinds != [b"ftyp", b"moov", b"moof", b"mdat"]:
        raise ValueError(f"an encoded segment consists of {kinds[:6]}, not of ftyp, moov, moof and mdat")
    return encoded[: ends[1]], encoded[ends[1] :]


def frames_in(fragment: bytes) -> int:
    """The number of frames that a fragment declares; 0 where it declares none."""
    count = re.search(rb"trun.{4}(.{4})", fragment, re.DOTALL)
    return int.from_bytes(count[1], "big") if count else 0


def stream_form(init: bytes) -> str:
    """What a player needs to know before it loads the video, as HLS attributes with a final comma; empty if unknown.

    That is RFC 6381's name of the codec, and pixels: `CODECS="avc1.64000a",RESOLUTION=48x32,`.
    """
    try:
        whole = _boxes(init)[0] == [b"ftyp", b"moov"]
    except ValueError:
        whole = False
    found = _SAMPLE_DESCRIPTION.search(init) if whole else None
    if found is None:
        return ""
    width, height = (int.from_bytes(number, "big") for number in found.groups()[:2])
    return f'CODECS="avc1.{found[3].hex()}",RESOLUTION={width}x{height},'


def _boxes(data: bytes) -> tuple[list[bytes], list[int]]:
    """The kinds of the boxes that fill the data, and where each ends. Raises ValueError where a box does not fit."""
    kinds, ends, at = [], [], 0
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if not 8 <= size <= len(data) - at:
            raise ValueError(f"a box of {size} bytes at byte {at} does not fit into what holds it")
        at += size
        kinds.append(kind)
        ends.append(at)
    return kinds, ends
