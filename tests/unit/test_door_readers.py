"""Very many readers of a run's events who mostly wait: nobody waits for them, each is told all, and nothing stays."""

import asyncio
import contextlib
import gc
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest

from benchmarks.long_folder import LongFolder
from edit_ray.client import LongVideoClient
from edit_ray.server.app import make_app
from edit_ray.server.event_stream import KEEP_ALIVE_S
from edit_ray.server.gate import Limits
from tests.door_here import PROMPT, offer_of, serving
from tests.sockets import open_files

pytestmark = pytest.mark.usefixtures("one_thread")

TOO_MANY = 20  # readers beyond the limit
SEGMENTS = 3
POOLS = 70  # threads of the door's pools, which do not grow with its readers
ANSWER_S = 10.0  # for a GET: far above what it takes, far below waiting for as many readers as there are
TOLD_S, RELEASED_S = 120.0, 60.0
REFUSED_FOR_NOW = (429, 503)


class Reader:
    """A reader of events over a plain socket."""

    def __init__(self):
        self.status, self.headers, self.told, self.comments, self.last_id = 0, {}, [], 0, None

    async def open(self, url, video_id, last_id=None):
        where = urlsplit(url)
        self._from, self._to = await asyncio.open_connection(where.hostname, where.port)
        known = f"Last-Event-ID: {last_id}\r\n" if last_id else ""
        # A client of HTTP/1.0 is sent the events as they are, without the sizes of chunks between them.
        request = f"GET /v1/videos/{video_id}/events HTTP/1.0\r\nHost: {where.netloc}\r\n{known}\r\n"
        self._to.write(request.encode())
        first, *lines = (await self._from.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return self

    @property
    def segments(self):
        return [data["index"] for name, data in self.told if name == "segment"]

    async def until(self, name, count=1):
        """Read until so many events of this name were told of."""
        while sum(told == name for told, _ in self.told) < count:
            await self._event()

    async def _event(self):
        said = (await self._from.readuntil(b"\n\n")).decode().splitlines()
        fields = dict(line.partition(": ")[::2] for line in said)
        self.comments += ": still here" in said
        self.last_id = fields.get("id", self.last_id)
        if "event" in fields:
            self.told.append((fields["event"], json.loads(fields["data"])))

    async def leave(self):
        self._to.close()
        with contextlib.suppress(OSError):
            await self._to.wait_closed()


@dataclass
class Used:
    """What this process holds, which is the door's and its readers'."""

    files: int
    tasks: int

    @classmethod
    def now(cls):
        tasks = [found for found in gc.get_objects() if issubclass(type(found), asyncio.Task) and not found.done()]
        return cls(psutil.Process().num_fds(), len(tasks))


async def admitted(url, video_id, last_id=None):
    """A reader that is let in, or refused for another reason than that too many come at once."""
    while True:
        reader = await Reader().open(url, video_id, last_id)
        if reader.status in REFUSED_FOR_NOW:
            assert int(reader.headers["retry-after"]) > 0
        if reader.status != 429:
            return reader
        await reader.leave()
        await asyncio.sleep(int(reader.headers["retry-after"]))


async def all_until(readers, name, count=1):
    async with asyncio.timeout(TOLD_S):
        await asyncio.gather(*(reader.until(name, count) for reader in readers))


async def all_leave(readers):
    await asyncio.gather(*(reader.leave() for reader in readers))


async def until_used(files, tasks):
    """Wait until no more than so many are open."""
    deadline = time.monotonic() + RELEASED_S
    while (used := Used.now()).files > files or used.tasks > tasks:
        assert time.monotonic() < deadline, f"{used} are left, and there were {files} files and {tasks} tasks"
        await asyncio.sleep(0.5)


async def status_is_told(http, video_id):
    for path in ("/healthz", f"/v1/videos/{video_id}", "/v1/models", "/v1/videos") * 4:
        began = time.monotonic()
        assert (await http.get(path)).status_code == 200
        assert time.monotonic() - began < ANSWER_S, path


async def approved(http, video_id, segment):
    answer = await http.patch(f"/v1/videos/{video_id}", json={"approve": segment})
    assert answer.status_code == 200, answer.text


async def many_read(url, http, count, idle_s):
    made = await http.post("/v1/videos", json={"prompt": PROMPT, "edit_ray": {"approve": "each"}})
    video_id = made.json()["id"]
    first = await admitted(url, video_id)
    await all_until([first], "segment")
    await first.leave()
    await status_is_told(http, video_id)
    await asyncio.sleep(0.5)
    before, threads = Used.now(), threading.active_count()

    came = await asyncio.gather(*(admitted(url, video_id) for _ in range(count + TOO_MANY)))
    assert Counter(reader.status for reader in came) == {200: count, 503: TOO_MANY}, "the limit is the one that is said"
    readers = [reader for reader in came if reader.status == 200]
    await all_leave(reader for reader in came if reader.status == 503)
    await all_until(readers, "segment")
    assert threading.active_count() < threads + POOLS < threads + count

    await status_is_told(http, video_id)
    await asyncio.sleep(idle_s)
    await status_is_told(http, video_id)
    await approved(http, video_id, 0)
    await all_until(readers, "segment", 2)
    assert all(reader.comments for reader in readers) or idle_s < KEEP_ALIVE_S

    gone, stayed = readers[: count // 2], readers[count // 2 :]
    await all_leave(gone)
    each = (len(stayed) * 2, len(stayed) * 4)  # both ends of a connection; tasks of a reader here and in the door
    await until_used(before.files + each[0], before.tasks + each[1])
    again = await asyncio.gather(*(admitted(url, video_id, reader.last_id) for reader in gone))
    assert {reader.status for reader in again} == {200}, "the places of those who left are free"
    await approved(http, video_id, 1)
    await all_until(again + stayed, "segment", 1)
    await all_until(stayed, "segment", SEGMENTS)
    await approved(http, video_id, SEGMENTS - 1)
    await all_until(again + stayed, "ended")
    assert all(reader.segments == list(range(SEGMENTS)) for reader in stayed), "nothing is lost, or told twice"
    assert all(old.segments + new.segments == list(range(SEGMENTS)) for old, new in zip(gone, again, strict=True))

    await all_leave(again + stayed)
    await until_used(before.files, before.tasks)


@pytest.mark.parametrize(
    ("count", "idle_s"), [(200, 2), pytest.param(Limits().readers, KEEP_ALIVE_S + 5, marks=pytest.mark.slow)]
)
def test_readers_of_events_cost_little_and_leave_nothing(model, tmp_path, count, idle_s):
    open_files(2 * (count + TOO_MANY) + 500)

    async def read(url):
        async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
            await many_read(url, http, count, idle_s)

    with serving(model, tmp_path, limits=Limits(readers=count), video={"num_segments": SEGMENTS}) as url:
        asyncio.run(read(url))


class Asked:
    """A request for events, made of the application itself, so that many are looked at in one turn of its loop."""

    def __init__(self, app, video_id):
        path = f"/v1/videos/{video_id}/events"
        self._scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
        self._scope |= {"method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
        self._scope |= {"scheme": "http", "headers": [(b"host", b"127.0.0.1")]}
        self._scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
        self.answered, self.left = asyncio.get_running_loop().create_future(), asyncio.Event()
        self._body = [{"type": "http.request", "body": b"", "more_body": False}]
        self.ended = asyncio.create_task(app(self._scope, self._receive, self._send))

    async def _receive(self):
        if self._body:
            return self._body.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, said):
        if said["type"] == "http.response.start":
            self.answered.set_result(said["status"])
        await asyncio.sleep(0)

    async def leave(self):
        self.left.set()
        await self.ended


@pytest.fixture(scope="module")
def idle(model, tmp_path_factory):
    """The application with five places for readers, over a run that nobody works on."""
    root = tmp_path_factory.mktemp("idle")
    offer = offer_of(model)
    LongFolder(root, "idle", offer.base.model_dump(mode="json", exclude_unset=True), 2, float("inf"))
    return make_app(LongVideoClient(output=root, connect=False), [offer], None, Limits(readers=5))


def test_as_many_readers_as_the_limit_says_are_let_in_however_many_come_at_once(idle):
    async def ask():
        for _ in range(3):
            asked = [Asked(idle, "idle") for _ in range(60)]
            statuses = Counter(await asyncio.gather(*(one.answered for one in asked)))
            assert statuses == {200: 5, 503: 55}
            await asyncio.gather(*(one.leave() for one in asked))

    asyncio.run(ask())


def test_readers_who_leave_before_their_first_event_leave_their_places(idle):
    async def ask():
        for _ in range(3):
            asked = [Asked(idle, "idle") for _ in range(5)]
            await asyncio.gather(*(one.leave() for one in asked))
        asked = [Asked(idle, "idle") for _ in range(5)]
        assert await asyncio.gather(*(one.answered for one in asked)) == [200] * 5
        await asyncio.gather(*(one.leave() for one in asked))

    asyncio.run(ask())
