"""What many clients do at the HTTP door at once: readers of a video, followers of its events, and HLS players."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field

import aiohttp

RETRY_S = 1.0  # until a player asks again for what is not there yet
PATIENCE_S = 60.0  # for one answer, and for clients to come to an end behind the end of a run
_URI = re.compile(r'^#EXT-X-MAP:URI="([^"]+)"|^([^#\n].*)$', re.MULTILINE)
_TARGET = re.compile(r"^#EXT-X-TARGETDURATION:([0-9]+)$", re.MULTILINE)


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def named_in(playlist: str) -> list[str]:
    """What a playlist names, in order: the init first."""
    return [init or path for init, path in _URI.findall(playlist)]


@dataclass
class Attendance:
    """What clients have got: seconds of each answer by kind of request, statuses that were none of 200, and media.

    `segments` are those that each follower was told of, `fragments` the number that each player has fetched.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    others: Counter[str] = field(default_factory=Counter)
    segments: list[list[int]] = field(default_factory=list)
    fragments: list[int] = field(default_factory=list)

    def check(self, segments: int) -> None:
        """Raise AssertionError unless every client has got all of a run of so many segments, and no request failed."""
        assert not self.others, self.others
        assert all(of == list(range(segments)) for of in self.segments), self.segments
        assert all(of == segments for of in self.fragments), self.fragments

    def figures(self) -> dict[str, dict[str, float]]:
        """By kind of request: how many, and milliseconds until half of the answers, and 99 of 100, were there."""
        return {
            kind: {
                "answers": len(of),
                "p50_ms": round(1000 * quantile(of, 0.5), 1),
                "p99_ms": round(1000 * quantile(of, 0.99), 1),
                "most_ms": round(1000 * max(of), 1),
            }
            for kind, of in sorted(self.seconds.items())
        }


class Crowd:
    """Clients of one video, each with a connection of its own, in the event loop of the caller.

    `readers` ask for the video every `poll_s`, evenly spread; `followers` read its events; `players` fetch the playlist
    and the fragments.
    """

    def __init__(
        self, url: str, video_id: str, *, readers: int = 0, followers: int = 0, players: int = 0, poll_s: float = 5.0
    ) -> None:
        self._base, self._count, self._poll_s = f"{url}v1/videos/{video_id}", (readers, followers, players), poll_s
        self.seen = Attendance()

    async def attend(self, until: asyncio.Event) -> Attendance:
        """Ask on and on `until` the run has ended; followers and players then read what is left."""
        readers, followers, players = self._count
        timeout = aiohttp.ClientTimeout(total=None, sock_read=PATIENCE_S, connect=PATIENCE_S)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4 * self._poll_s), timeout=timeout
        ) as http:
            ends = [self._follow(http) for _ in range(followers)] + [self._play(http, until) for _ in range(players)]
            working = [asyncio.create_task(work) for work in ends]
            reading = [
                asyncio.create_task(self._read(http, until, self._poll_s * at / readers)) for at in range(readers)
            ]
            await asyncio.gather(until.wait(), *reading)
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*working)
        return self.seen

    async def _get(self, http: aiohttp.ClientSession, kind: str, path: str, allowed: int = 200) -> bytes | None:
        """The body of an answer of 200; None of another one, which is counted unless it is `allowed`."""
        began = time.perf_counter()
        try:
            async with http.get(self._base + path) as answer:
                body, status = await answer.read(), str(answer.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            body, status = b"", type(error).__name__
        if status == "200":
            self.seen.seconds[kind].append(time.perf_counter() - began)
            return body
        if status != str(allowed):
            self.seen.others[f"{kind}: {status}"] += 1
        return None

    async def _read(self, http: aiohttp.ClientSession, until: asyncio.Event, first_s: float) -> None:
        at = time.monotonic() + first_s
        while await _slept(until, at - time.monotonic()):
            await self._get(http, "video", "")
            at = max(at + self._poll_s, time.monotonic())

    async def _follow(self, http: aiohttp.ClientSession) -> None:
        told = list[int]()
        self.seen.segments.append(told)
        async with http.get(self._base + "/events") as answer:
            if answer.status != 200:
                self.seen.others[f"events: {answer.status}"] += 1
                return
            async for name, data in events_in(answer.content):
                if name == "segment":
                    told.append(json.loads(data)["index"])
                if name in ("ended", "gone"):
                    return

    async def _play(self, http: aiohttp.ClientSession, until: asyncio.Event) -> None:
        """As a player: the playlists, then what is new in the media playlist, at the pace that it says."""
        at = len(self.seen.fragments)
        self.seen.fragments.append(0)
        over = False
        while (master := await self._get(http, "playlist", "/live.m3u8", allowed=404)) is None:
            if over:
                return
            over = not await _slept(until, RETRY_S)
        (media,) = named_in(master.decode())
        have: set[str] = set()
        while (body := await self._get(http, "playlist", f"/{media}")) is not None:
            playlist = body.decode()
            for name in [name for name in named_in(playlist) if name not in have]:
                await self._get(http, "fragment", f"/{name}")
                have.add(name)
            self.seen.fragments[at] = len(have) - 1  # less the init
            if "#EXT-X-ENDLIST" in playlist:
                return
            target = _TARGET.search(playlist)
            await asyncio.sleep(int(target[1]) if target else RETRY_S)


async def events_in(lines: AsyncIterable[bytes]) -> AsyncIterator[tuple[str, str]]:
    """The Server-Sent Events of a stream: names with their data."""
    name = ""
    async for line in lines:
        key, _, value = line.decode().strip().partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, value


async def _slept(until: asyncio.Event, seconds: float) -> bool:
    """Whether so many seconds have passed and `until` is not set."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await until.wait()
    except TimeoutError:
        return True
    return False
