"""Stands in for ffmpeg on a machine without one: the frames of a segment stay as they are, in a fragmented MP4.

`use_stand_in` makes the encoder call it. It knows the three calls of `edit_ray.video.encode` and nothing else.
"""

import os
import re
import struct
import sys
from pathlib import Path

_BOX = struct.Struct(">I4s")
_TICKS = 1000  # a frame's duration


def has_ffmpeg() -> bool:
    """Whether the encoder finds a real one, which works."""
    import numpy as np  # here, as the stand-in itself needs neither

    from edit_ray.video.encode import OutputOptions, encode

    try:
        encode(np.zeros((2, 16, 16, 3), np.uint8), fps=8, options=OutputOptions())
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def use_stand_in(folder: Path) -> None:
    """From now on this process, and those that it starts, encode with the stand-in; its program lies in `folder`."""
    program = folder / "ffmpeg"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{Path(__file__).resolve()}" "$@"\n')
    program.chmod(0o700)
    os.environ["IMAGEIO_FFMPEG_EXE"] = str(program)


def main(arguments: list[str]) -> None:
    given = sys.stdin.buffer.read() if "-" in arguments[:-1] else b""
    if "-s" in arguments:
        width, height = map(int, re.split("x", arguments[arguments.index("-s") + 1]))
        sys.stdout.buffer.write(_encoded(given, 3 * width * height))
    elif "rawvideo" in arguments:
        sys.stdout.buffer.write(_frames(given or Path(arguments[arguments.index("-i") + 1]).read_bytes()))
    else:
        Path(arguments[-1]).write_bytes(given)


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return _BOX.pack(len(body) + 8, kind) + body


def _encoded(raw: bytes, frame_bytes: int) -> bytes:
    count = len(raw) // frame_bytes
    init = _box(b"ftyp", b"iso5\0\0\2\0iso5") + _box(b"moov", _box(b"free"))

    def moof(data_offset: int) -> bytes:
        tfhd = _box(b"tfhd", struct.pack(">IIII", 0x020018, 1, _TICKS, frame_bytes))
        tfdt = _box(b"tfdt", struct.pack(">IQ", 1 << 24, 0))
        trun = _box(b"trun", struct.pack(">IIi", 0x000001, count, data_offset))
        return _box(b"moof", _box(b"mfhd", struct.pack(">II", 0, 1)), _box(b"traf", tfhd, tfdt, trun))

    return init + moof(len(moof(0)) + 8) + _BOX.pack(len(raw) + 8, b"mdat") + raw


def _frames(data: bytes) -> bytes:
    """What all `mdat` boxes hold."""
    at, found = 0, []
    while at < len(data):
        size, kind = _BOX.unpack_from(data, at)
        if kind == b"mdat":
            found.append(data[at + 8 : at + size])
        at += size
    return b"".join(found)


if __name__ == "__main__":
    main(sys.argv[1:])
