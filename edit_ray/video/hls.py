"""The files of a run's folder that play while the run continues, with their HLS playlists (RFC 8216).

RUN/init.mp4              what every fragment needs before it
RUN/segments/NNNNN-tT.m4s one segment's fragment, at its place in the video; T is the take
RUN/stream.mp4            init and all fragments so far: can be opened at any moment
RUN/live-N.m3u8           a media playlist; a re-roll or an extension begins another, as one may only grow
RUN/live.m3u8             names the newest of them

A fragment is durable before a playlist names it. `stream.mp4` and the playlists follow from the fragments alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edit_ray import files
from edit_ray.video.fragments import Part, stream_form

ENDLIST = "#EXT-X-ENDLIST\n"
_BOX_HEADER = 8
_MULTIVARIANT = re.compile(
    r"#EXTM3U\n.*\n#EXT-X-STREAM-INF:(?:.*,)?BANDWIDTH=(?P<peak>[0-9]{1,18}).*\n"
    r"(?P<name>live-(?P<number>[0-9]{1,6})\.m3u8)\n?"
)


@dataclass(frozen=True)
class MediaPlaylist:
    """Formats a run's media playlist as HLS text (RFC 8216).

    Args:
        fps: frames a second.
        longest: frames of the longest fragment that will ever be in it; the target duration covers it from the start.
        sliding: whether old fragments are removed from it. A playlist that is not sliding may only grow (`EVENT`).
    """

    fps: float
    longest: int
    sliding: bool = False

    def text(self, parts: Iterable[Part], *, first: int = 0) -> str:
        """The playlist of `parts`, the first of which is fragment number `first` of the video."""
        target_s = math.ceil(self.longest / self.fps)
        lines = [
            *("#EXTM3U", "#EXT-X-VERSION:7", f"#EXT-X-TARGETDURATION:{target_s}", f"#EXT-X-MEDIA-SEQUENCE:{first}"),
            *([] if self.sliding else ["#EXT-X-PLAYLIST-TYPE:EVENT"]),
            *("#EXT-X-INDEPENDENT-SEGMENTS", '#EXT-X-MAP:URI="init.mp4"'),
        ]
        return "\n".join(lines) + "\n" + "".join(map(self.lines_of, parts))

    def lines_of(self, part: Part) -> str:
        """The lines that list one fragment; its path is relative to the playlist."""
        return f"#EXTINF:{part.num_frames / self.fps:.6f},\n{part.path}\n"

    def may_replace(self, text: str, present: str) -> bool:
        """Whether players that have read `present` may find `text` in its place."""
        if self.sliding:
            return not present.endswith(ENDLIST) or text == present
        return text.startswith(present if present.endswith(ENDLIST) else _readable(present))


def _readable(text: str) -> str:
    """The text up to the last entry that players can read: an entry that is being added consists of comments.

    Zeros are bytes that a loss of power has taken.
    """
    lines = text.partition("\0")[0].splitlines(keepends=True)
    while lines and (lines[-1].startswith("#") or not lines[-1].endswith("\n")):
        lines.pop()
    return "".join(lines)


def multivariant(media_playlist: str, *, bandwidth: int, form: str, fps: float) -> str:
    """The playlist that names one media playlist.

    `bandwidth` is the highest bit rate of a fragment in it, `form` that of `stream_form`: where it is empty, players
    find it in the init.
    """
    attributes = f"BANDWIDTH={bandwidth},{form}FRAME-RATE={fps:.3f}"
    return f"#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-STREAM-INF:{attributes}\n{media_playlist}\n"


def newest_playlist(folder: Path) -> str | None:
    """The media playlist that a run's `live.m3u8` names; None where there is none yet, or it names another file."""
    named = _named_in(folder)
    return named["name"] if named else None


def _named_in(folder: Path) -> re.Match[str] | None:
    return _MULTIVARIANT.fullmatch(_text(folder / "live.m3u8") or "")


class StreamFiles:
    """Keeps `stream.mp4` and the playlists of one run's folder consistent: they hold the same segments.

    `keep` bounds how many of the latest segments they hold (None: all); `longest` is the most frames of a segment.
    A folder that has such files already begins with `rebuild`. One caller at a time. Methods raise OSError, and may
    then be called again.
    """

    def __init__(self, folder: Path, *, fps: float, longest: int, keep: int | None = None) -> None:
        self.copied = 0  # segments, by long copies of many: it shows that one makes progress
        self._folder = folder
        self._keep = keep
        self._playlist = MediaPlaylist(fps, longest, sliding=keep is not None)
        self._parts: list[Part] = []
        self._first = 0  # number of the first of them
        self._bytes = 0  # of stream.mp4 with all of them
        self._name: str | None = None  # of the newest playlist, once it is known
        self._listed, self._beyond = 0, ""  # bytes of it that list all of them, and the text behind those
        self._peak = 0  # the highest bit rate of a segment

    def rebuild(self, parts: Sequence[Part], first: int = 0, *, anew: bool = False) -> None:
        """Start from exactly these segments, `parts[0]` being segment `first`, regardless of what the files hold.

        A playlist that already lists more stays as it is until another segment than it lists is appended. A
        `stream.mp4` that ends with the last of these segments is taken to hold them all, unless it is to be made
        `anew`.
        """
        self._parts, self._first, self._name = list(parts), first, None
        self._slide()
        sizes = [self._size_of(part.path) for part in self._parts]
        self._peak = max(map(self._bits_a_second, self._parts, sizes), default=0)
        if anew or not self._cut_stream(sum(sizes)):
            self._write_stream()
        self._write_playlist()

    def append(self, part: Part) -> None:
        """Add the segment that follows; the last one again changes nothing. Raises ValueError for any other."""
        if part in self._parts[-1:]:
            return
        end = self._parts[-1].first_frame + self._parts[-1].num_frames if self._parts else part.first_frame
        if part.first_frame != end:
            raise ValueError(f"{part.path} begins at frame {part.first_frame}, the next one is frame {end}")
        size = self._bytes
        self._parts.append(part)
        try:
            self._slide()
            self._extend_stream(part)
            self._peak = max(self._peak, self._bits_a_second(part, self._size_of(part.path)))
            self._extend_playlist(part)
        except BaseException:
            self._parts.pop()
            self._bytes, self._name = size, None
            raise

    def end(self) -> None:
        """Mark the playlist as complete."""
        self._write_playlist(ENDLIST)

    def _slide(self) -> None:
        """Remove segments that are too old."""
        dropped = 0 if self._keep is None else max(0, len(self._parts) - self._keep)
        self._first += dropped
        del self._parts[:dropped]

    def _cut_stream(self, size: int) -> bool:
        """Cut `stream.mp4` behind `size` bytes of fragments, durably; False if it does not end with the last there."""
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
        """Add a fragment durably: nothing writes the file again before the run ends."""
        path = self._folder / "stream.mp4"
        if len(self._parts) == 1 or self._keep is not None or self._size_of("stream.mp4") < self._bytes:
            self._write_stream()
            return
        fragment = files.read_bytes(self._folder / part.path)
        with files.opened(path, os.O_RDWR) as stream:
            files.disk.truncate(stream, self._bytes)  # half a fragment may be there, from a write that failed
            # Its first box begins with zeros until all of it is there: readers take such a box for the end.
            size = files.write_all(stream, fragment[_BOX_HEADER:], self._bytes + _BOX_HEADER)
            files.write_all(stream, fragment[:_BOX_HEADER], self._bytes)
            files.disk.fsync(stream)
        self._bytes = size

    def _write_stream(self) -> None:
        path = self._folder / "stream.mp4"
        if not self._parts:
            files.remove(path)
            self._bytes = 0
            return
        with files.replacing(path) as stream:
            for name in ("init.mp4", *(part.path for part in self._parts)):
                stream.write(files.read_bytes(self._folder / name))
                self.copied += 1
        self._bytes = stream.size

    def _write_playlist(self, ending: str = "") -> None:
        """Write the playlist whole: the newest one, unless its readers could not follow."""
        if not self._parts:
            return
        text = self._playlist.text(self._parts, first=self._first) + ending
        named = _named_in(self._folder)
        name = named["name"] if named else "live-0.m3u8"
        content = _text(self._folder / name) if named else None
        if content is None or not content.startswith(text):
            if named and (content is None or not self._playlist.may_replace(text, content)):
                name = f"live-{int(named['number']) + 1}.m3u8"  # one of that name that is there was never announced
            files.write_atomic(self._folder / name, text.encode())
            content = text
        self._name, self._listed = name, len(text) - len(ending)
        self._beyond = content[self._listed :]
        self._announce(name)

    def _extend_playlist(self, part: Part) -> None:
        """Add the last segment to the playlist, where that lists all before it and no other."""
        lines, name = self._playlist.lines_of(part), self._name
        is_listed = self._beyond.startswith(lines)
        may_grow = name is not None and not self._beyond and self._size_of(name) == self._listed
        if self._keep is not None or name is None or not (is_listed or may_grow):
            return self._write_playlist()
        if not is_listed:
            uri = lines.index("\n") + 1
            with files.opened(self._folder / name, os.O_RDWR) as playlist:
                # The URI is a comment until all of it is there: readers in between see what there was.
                files.write_all(playlist, f"{lines[:uri]}#{lines[uri + 1 :]}".encode(), self._listed)
                files.write_all(playlist, lines[uri].encode(), self._listed + uri)
        self._listed, self._beyond = self._listed + len(lines), self._beyond[len(lines) :]
        self._announce(name)
        return None

    def _announce(self, name: str) -> None:
        """Names the playlist, with the highest bit rate that was ever in it, in `live.m3u8`."""
        named = _named_in(self._folder)
        peak = max(self._peak, int(named["peak"])) if named and named["name"] == name else self._peak
        form = stream_form(files.read_bytes(self._folder / "init.mp4"))  # its digest is checked elsewhere
        text = multivariant(name, bandwidth=peak, form=form, fps=self._playlist.fps)
        if named is None or text != named.string:
            files.write_atomic(self._folder / "live.m3u8", text.encode())

    def _bits_a_second(self, part: Part, size: int) -> int:
        return math.ceil(8 * size * self._playlist.fps / part.num_frames)

    def _size_of(self, name: str) -> int:
        """Bytes of a file; 0 where there is none."""
        try:
            return (self._folder / name).stat().st_size
        except FileNotFoundError:
            return 0


def _text(path: Path) -> str | None:
    try:
        return files.read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return None
