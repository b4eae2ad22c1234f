"""HLS playlists (RFC 8216) as text: which fragments a player reads one after the other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from edit_ray.video.fmp4 import Form

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
