"""HLS playlists (RFC 8216) as text: which fragments a player reads one after the other."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edit_ray import files
from edit_ray.video.fragments import Form, place, read_form, split

ENDLIST = "#EXT-X-ENDLIST\n"


@dataclass(frozen=True)
class Entry:
    """One fragment in a playlist; `uri` is relative to the playlist's."""

    uri: str
    num_frames: int


@dataclass(frozen=True)
class MediaPlaylist:
    """The form of a run's media playlist.

    Args:
        fps: frames a second.
        longest: frames of the longest fragment that will ever be in it; the target duration covers it from the start.
        sliding: whether fragments leave it at the front. One that does not may only grow (`EVENT`).
        init: URI of the file that every fragment needs before it.
    """

    fps: float
    longest: int
    sliding: bool = False
    init: str = "init.mp4"

    def text(self, entries: Iterable[Entry], *, first: int = 0, ended: bool = False) -> str:
        """The playlist of `entries`, the first of which is fragment number `first` of the video."""
        target_s = math.ceil(self.longest / self.fps)
        lines = [
            *("#EXTM3U", "#EXT-X-VERSION:7", f"#EXT-X-TARGETDURATION:{target_s}", f"#EXT-X-MEDIA-SEQUENCE:{first}"),
            *([] if self.sliding else ["#EXT-X-PLAYLIST-TYPE:EVENT"]),
            *("#EXT-X-INDEPENDENT-SEGMENTS", f'#EXT-X-MAP:URI="{self.init}"'),
        ]
        return "\n".join(lines) + "\n" + "".join(map(self.lines_of, entries)) + (ENDLIST if ended else "")

    def lines_of(self, entry: Entry) -> str:
        """What one entry adds to the text."""
        return f"#EXTINF:{entry.num_frames / self.fps:.6f},\n{entry.uri}\n"

    def replaces(self, text: str, present: str) -> bool:
        """Whether players that have read `present` may find `text` in its place."""
        if self.sliding:
            return not present.endswith(ENDLIST) or text == present
        return text.startswith(present if present.endswith(ENDLIST) else _named_by(present))


def _named_by(text: str) -> str:
    """The text up to the last entry that players can read: of one that is being added they see comments alone.

    Zeros are bytes that a loss of power has taken.
    """
    lines = text.partition("\0")[0].splitlines(keepends=True)
    while lines and (lines[-1].startswith("#") or not lines[-1].endswith("\n")):
        lines.pop()
    return "".join(lines)


def multivariant(media_playlist: str, *, bandwidth: int, form: Form | None, fps: float) -> str:
    """The playlist that names one media playlist; `bandwidth` is the highest bit rate of a fragment in it.

    Where `form` is not known it is left out, and players find it in the init.
    """
    shape = f'CODECS="{form.codec}",RESOLUTION={form.width}x{form.height},' if form is not None else ""
    said = f"BANDWIDTH={bandwidth},{shape}FRAME-RATE={fps:.3f}"
    return f"#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-STREAM-INF:{said}\n{media_playlist}\n"


def named_in(multivariant_playlist: str) -> str | None:
    """The media playlist that a text of `multivariant` names; None if it is something else."""
    lines = multivariant_playlist.splitlines()
    return lines[3] if len(lines) == 4 and lines[2].startswith("#EXT-X-STREAM-INF:") else None


def bandwidth_in(multivariant_playlist: str) -> int:
    """The bit rate that a text of `multivariant` says; 0 where it says none."""
    match = re.search(r"[:,]BANDWIDTH=([0-9]{1,18})", multivariant_playlist)
    return int(match[1]) if match else 0


_BOX_HEADER = 8
_PLAYLIST = re.compile(r"live-([0-9]{1,6})\.m3u8")


@dataclass(frozen=True)
class Part:
    """One segment's fragment: its path relative to the run's folder, and its frames in the video."""

    path: str
    first_frame: int
    num_frames: int


def write_part(folder: Path, part: Part, number: int, encoded: bytes) -> tuple[int, int]:
    """Makes what `encode` returned the fragment of segment `number`, and its init the run's if that has none yet.

    Returns the digests of the two, the init's first. Raises ValueError if the init differs from the run's: then its
    frames cannot be played behind the others.
    """
    init, fragment = split(encoded)
    path = folder / "init.mp4"
    if not path.exists():
        files.write_atomic(path, init)
    elif files.read_bytes(path) != init:
        raise ValueError(
            f"segment {number} is encoded in another way than {path} says, and cannot follow what is there"
        )
    placed = place(fragment, sequence_number=number + 1, first_frame=part.first_frame)
    files.write_atomic(folder / part.path, placed)
    return files.digest_of(init), files.digest_of(placed)


class StreamFiles:
    """Keeps `stream.mp4` and the playlists of one run's folder telling of the same segments.

    `keep` bounds how many of the latest segments they tell of (None: all); `longest` is the most frames of a segment.
    A folder that has such files already begins with `rebuild`. One caller at a time. Methods raise OSError, and may
    then be called again.
    """

    def __init__(self, folder: Path, *, fps: float, longest: int, keep: int | None = None) -> None:
        self.part_written: Callable[[], None] = lambda: None  # called after each segment that a long copy writes
        self._folder = folder
        self._keep = keep
        self._playlist = MediaPlaylist(fps, longest, sliding=keep is not None)
        self._parts: list[Part] = []
        self._first = 0  # number of the first of them
        self._bytes = 0  # of stream.mp4 with all of them
        self._name: str | None = None  # of the newest playlist, once it is known
        self._told, self._beyond = 0, ""  # bytes of it that tell of all of them, and what it tells beyond
        self._peak = 0  # the highest bit rate of a segment

    def rebuild(self, parts: Sequence[Part], first: int = 0, *, anew: bool = False) -> None:
        """Starts from exactly these segments, `parts[0]` being segment `first`, whatever the files hold.

        A playlist that already names more is left as it is until another segment than it names is appended. A
        `stream.mp4` that ends with the last of these segments is taken to hold them all, unless it is to be made
        `anew`.
        """
        self._parts, self._first, self._name = list(parts), first, None
        self._slide()
        sizes = [self._size_of(part.path) for part in self._parts]
        self._peak = max(map(self._bits_a_second, self._parts, sizes), default=0)
        if anew or not self._cut_stream(sum(sizes)):
            self._write_stream()
        self._tell_all()

    def append(self, part: Part) -> None:
        """Adds the segment that follows; the last one again changes nothing.

        Raises ValueError if its first frame is not the next one.
        """
        if part in self._parts[-1:]:
            return
        end = self._parts[-1].first_frame + self._parts[-1].num_frames if self._parts else part.first_frame
        if part.first_frame != end:
            raise ValueError(f"{part.path} begins at frame {part.first_frame}, the next one is frame {end}")
        length = self._bytes
        self._parts.append(part)
        try:
            self._slide()
            self._extend_stream(part)
            self._peak = max(self._peak, self._bits_a_second(part, self._size_of(part.path)))
            self._tell_next(part)
        except BaseException:
            self._parts.pop()
            self._bytes, self._name = length, None
            raise

    def end(self) -> None:
        """Says in the playlist that nothing follows."""
        self._tell_all(ENDLIST)

    def _slide(self) -> None:
        """Lets go of what is too old."""
        dropped = 0 if self._keep is None else max(0, len(self._parts) - self._keep)
        self._first += dropped
        del self._parts[:dropped]

    def _cut_stream(self, size: int) -> bool:
        """Makes `stream.mp4` end behind `size` bytes of fragments, durably; False if the last does not end there."""
        path = self._folder / "stream.mp4"
        if not self._parts or not path.exists():
            return False
        last = files.read_bytes(self._folder / self._parts[-1].path)
        self._bytes = self._size_of("init.mp4") + size
        with files.opened(path, os.O_RDWR) as stream:
            if files.read_at(stream, self._bytes - len(last), len(last)) != last:
                return False
            files.disk.truncate(stream, self._bytes)
            files.disk.fsync(stream)
        return True

    def _extend_stream(self, part: Part) -> None:
        """Adds a fragment durably: nothing makes the file anew before the run ends."""
        path = self._folder / "stream.mp4"
        if len(self._parts) == 1 or self._keep is not None or self._size_of("stream.mp4") < self._bytes:
            self._write_stream()
            return
        fragment = files.read_bytes(self._folder / part.path)
        with files.opened(path, os.O_RDWR) as stream:
            files.disk.truncate(stream, self._bytes)  # half a fragment may be there, from a write that failed
            # Its first box begins with zeros until all of it is there: readers take such a box for the end.
            length = files.write_all(stream, fragment[_BOX_HEADER:], self._bytes + _BOX_HEADER)
            files.write_all(stream, fragment[:_BOX_HEADER], self._bytes)
            files.disk.fsync(stream)
        self._bytes = length

    def _write_stream(self) -> None:
        path = self._folder / "stream.mp4"
        if not self._parts:
            files.remove(path)
            self._bytes = 0
            return
        with files.replacing(path) as stream:
            for name in ("init.mp4", *(part.path for part in self._parts)):
                stream.write(files.read_bytes(self._folder / name))
                self.part_written()
        self._bytes = stream.size

    def _tell_all(self, ending: str = "") -> None:
        """Writes the playlist whole: the newest one, unless its readers could not follow."""
        if not self._parts:
            return
        text = self._playlist.text(map(_entry, self._parts), first=self._first) + ending
        name, content = _newest(self._folder) or (None, "")
        if name is None or not content.startswith(text):
            if name is None or not self._playlist.replaces(text, content):
                name = f"live-{self._next_number()}.m3u8"
            files.write_atomic(self._folder / name, text.encode())
            content = text
        self._name, self._told = name, len(text) - len(ending)
        self._beyond = content[self._told :]
        self._announce(name)

    def _tell_next(self, part: Part) -> None:
        """Adds the last segment to the playlist, where that tells of all before it and of no other."""
        lines = self._playlist.lines_of(_entry(part))
        told = self._beyond.startswith(lines)
        if self._keep is not None or self._name is None or not (told or self._may_grow(self._name)):
            return self._tell_all()
        if not told:
            self._add_to(self._name, lines)
        self._told, self._beyond = self._told + len(lines), self._beyond[len(lines) :]
        self._announce(self._name)
        return None

    def _may_grow(self, name: str) -> bool:
        return not self._beyond and self._size_of(name) == self._told

    def _add_to(self, name: str, lines: str) -> None:
        """The URI is a comment until all of it is there: whoever reads in between sees what there was."""
        uri = lines.index("\n") + 1
        with files.opened(self._folder / name, os.O_RDWR) as playlist:
            files.write_all(playlist, f"{lines[:uri]}#{lines[uri + 1 :]}".encode(), self._told)
            files.write_all(playlist, lines[uri].encode(), self._told + uri)

    def _announce(self, name: str) -> None:
        """Names the playlist, with the highest bit rate that was ever in it, in `live.m3u8`."""
        path = self._folder / "live.m3u8"
        present = _text(path) or ""
        peak = max(self._peak, bandwidth_in(present)) if named_in(present) == name else self._peak
        text = multivariant(name, bandwidth=peak, form=self._form(), fps=self._playlist.fps)
        if text != present:
            files.write_atomic(path, text.encode())

    def _form(self) -> Form | None:
        """What the run's init says; None where it is damaged, which is the matter of who checks digests."""
        init = files.read_bytes(self._folder / "init.mp4")
        try:
            return read_form(init)
        except ValueError:
            return None

    def _next_number(self) -> int:
        """After the one that is named: a later one that is there was never told to anybody."""
        match = _PLAYLIST.fullmatch(newest_playlist(self._folder) or "")
        return int(match[1]) + 1 if match else 0

    def _bits_a_second(self, part: Part, size: int) -> int:
        return math.ceil(8 * size * self._playlist.fps / part.num_frames)

    def _size_of(self, name: str) -> int:
        """Bytes of a file; 0 where there is none."""
        try:
            return (self._folder / name).stat().st_size
        except FileNotFoundError:
            return 0


def _entry(part: Part) -> Entry:
    return Entry(part.path, part.num_frames)


def newest_playlist(folder: Path) -> str | None:
    """The media playlist that a run's `live.m3u8` names; None where there is none yet, or it names nothing of ours."""
    name = named_in(_text(folder / "live.m3u8") or "")
    return name if name is not None and _PLAYLIST.fullmatch(name) else None


def _newest(folder: Path) -> tuple[str, str] | None:
    name = newest_playlist(folder)
    content = _text(folder / name) if name is not None else None
    return (name, content) if name is not None and content is not None else None


def _text(path: Path) -> str | None:
    try:
        return files.read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return None
