"""What the door counts of its requests: each once, under labels of which no client can make more."""

import asyncio
import re
from collections import Counter

import pytest
from starlette.testclient import TestClient

from edit_ray.server.app import make_app
from edit_ray.server.door import COUNTER
from edit_ray.server.gate import Entrance, Limits
from edit_ray.server.refusals import CODES
from edit_ray.server.request_counts import LABELS, LEFT, METHODS, OTHER, OUTCOMES, Counted
from monitoring.boards import DASHBOARDS
from monitoring.page import metrics_page
from tests.door_here import PROMPT, TOKEN, ClientHere, SchedulerHere, offer_of, until_ended

pytestmark = pytest.mark.usefixtures("one_thread")
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


class Counting:
    """A client of an application, and what that has counted."""

    def __init__(self, app_of, **more):
        self.counted = Counter()
        self.app = app_of(self._count)
        self.http = TestClient(self.app, base_url="http://127.0.0.1", raise_server_exceptions=False, **more)

    def _count(self, labels):
        assert tuple(labels) == LABELS
        self.counted[tuple(labels.values())] += 1

    def asked(self, method, path, **more):
        """What is counted of one request."""
        self.counted.clear()
        self.http.request(method, path, **more)
        ((labels, times),) = self.counted.items()
        assert times == 1
        return labels


@pytest.fixture(scope="module")
def scheduler():
    scheduler = SchedulerHere()
    yield scheduler
    scheduler.end()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def door(model, root, scheduler):
    client, offers = ClientHere(root, scheduler), [offer_of(model)]
    return Counting(lambda count: make_app(client, offers, Entrance(token=TOKEN), None, count), headers=AUTHORIZED)


@pytest.fixture(scope="module")
def video_id(door):
    made = door.http.post("/v1/videos", json={"prompt": PROMPT, "edit_ray": {"num_segments": 1}})
    assert until_ended(door.http, made.json()["id"])["status"] == "completed"
    return made.json()["id"]


@pytest.mark.parametrize(
    ("method", "path", "route", "outcome"),
    [
        ("GET", "/v1/videos", "/v1/videos", "answered"),
        ("GET", "/v1/videos?limit=0", "/v1/videos", "invalid_value"),
        ("POST", "/v1/videos", "/v1/videos", "wrong_media_type"),
        ("GET", "/v1/videos/ID", "/v1/videos/{video_id}", "answered"),
        ("GET", "/v1/videos/another", "/v1/videos/{video_id}", "video_not_found"),
        ("PATCH", "/v1/videos/ID", "/v1/videos/{video_id}", "wrong_media_type"),
        ("HEAD", "/v1/videos/ID/content", "/v1/videos/{video_id}/content", "answered"),
        ("GET", "/v1/videos/ID/events", "/v1/videos/{video_id}/events", "answered"),
        ("GET", "/v1/videos/ID/segments/0", "/v1/videos/{video_id}/segments/{segment}", "answered"),
        ("GET", "/v1/videos/ID/segments/7", "/v1/videos/{video_id}/segments/{segment}", "segment_not_found"),
        ("GET", "/v1/videos/ID/stream.mp4", "/v1/videos/{video_id}/{name}.mp4", "answered"),
        ("POST", "/v1/videos/edits", "/v1/videos/edits", "not_supported"),
        ("PUT", "/v1/videos", "/v1/videos", "method_not_allowed"),
        ("GET", "/v1/models/a/b", "/v1/models/{model:path}", "not_found"),
        ("GET", "/nowhere", OTHER, "not_found"),
        ("BREW", "/v1/coffee", OTHER, "not_found"),
    ],
)
def test_a_request_is_counted_by_the_template_of_its_route_and_by_what_came_of_it(
    door, video_id, method, path, route, outcome
):
    seen = door.asked(method, path.replace("ID", video_id))
    assert seen == (method if method in METHODS else OTHER, route, outcome)


def test_a_part_of_a_file_and_one_that_there_is_not(door, video_id):
    path = f"/v1/videos/{video_id}/content"
    assert door.asked("GET", path, headers={"Range": "bytes=0-3"})[2] == "answered"
    assert door.asked("GET", path, headers={"Range": "bytes=999999999-"})[2] == "wrong_range"


def test_what_the_gate_refuses_is_counted_under_its_route(door, video_id):
    refused = {"Authorization": "Bearer x"}
    assert door.asked("GET", f"/v1/videos/{video_id}", headers=refused) == (
        "GET",
        "/v1/videos/{video_id}",
        "invalid_api_key",
    )
    assert door.asked("GET", "/nowhere", headers=refused) == ("GET", OTHER, "invalid_api_key")
    assert door.asked("GET", "/v1/models", headers={"Host": "elsewhere"}) == ("GET", "/v1/models", "wrong_host")


def test_requests_beyond_a_limit_are_counted(model, root, scheduler):
    client, limits = ClientHere(root, scheduler), Limits(reads_per_s=1e-9, reads_at_once=1)
    door = Counting(lambda count: make_app(client, [offer_of(model)], None, limits, count))
    assert door.asked("GET", "/v1/videos")[2] == "answered"
    assert door.asked("GET", "/v1/videos")[2] == "rate_limited"


def test_a_failure_of_the_server_is_counted(model, root, scheduler, monkeypatch):
    door = Counting(lambda count: make_app(ClientHere(root, scheduler), [offer_of(model)], None, None, count))
    monkeypatch.setattr(ClientHere, "check_mine", lambda *_: 1 / 0)
    made = next(path.name for path in root.iterdir() if path.name.startswith("20"))
    assert door.asked("GET", f"/v1/videos/{made}") == ("GET", "/v1/videos/{video_id}", "internal_error")


def test_there_are_no_more_labels_than_routes_methods_and_codes(model, root, scheduler):
    client, limits = ClientHere(root, scheduler), Limits(changes_at_once=10**6, reads_at_once=10**6)
    door = Counting(lambda count: make_app(client, [offer_of(model)], None, limits, count))
    for number in range(300):
        door.http.get(f"/v1/videos/{number}")
        door.http.request(f"M{number}", f"/{number}")
        door.http.get(f"/v1/models/{number}?{number}={number}")
    assert door.counted == {
        ("GET", "/v1/videos/{video_id}", "video_not_found"): 300,
        (OTHER, OTHER, "not_found"): 300,
        ("GET", "/v1/models/{model:path}", "unknown_field"): 300,
    }
    assert len(OUTCOMES) == len(set(OUTCOMES)) == len(CODES) + 2


def test_panels_of_requests_name_what_is_counted():
    panels = [panel for board in DASHBOARDS for panel in board.panels if panel.needs_door]
    assert len(panels) == 2
    for target in (target for panel in panels for target in panel.targets):
        assert f"(ray_{COUNTER}" in target.expr
        (by,) = re.findall(rf"sum by \(([^)]*)\) \(rate\(ray_{COUNTER}", target.expr)
        assert set(by.split(", ")) <= set(LABELS)
        assert set(re.findall(r'outcome!="(\w+)"', target.expr)) <= set(OUTCOMES)
    first, second, third = LABELS
    assert f"`ray_{COUNTER}`, a counter, has the labels `{first}`, `{second}` and `{third}`." in metrics_page()


@pytest.mark.parametrize("how", ["cancelled", "unanswered"])
def test_a_client_that_has_left_is_counted_once(door, how):
    counted, begun = [], asyncio.Event()

    async def waits(scope, receive, send):
        begun.set()
        if how == "cancelled":
            await asyncio.Event().wait()

    async def leave():
        scope = {"type": "http", "method": "GET", "path": "/v1/videos", "app": door.app}
        asking = asyncio.create_task(Counted(waits, counted.append)(scope, None, None))
        await begun.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    assert counted == [{"method": "GET", "route": "/v1/videos", "outcome": LEFT}]


def test_a_client_that_leaves_in_its_body_is_no_failure_of_the_server(door):
    said = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    headers += [(name.lower().encode(), value.encode()) for name, value in AUTHORIZED.items()]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": "/v1/videos", "query_string": b"", "headers": headers, "root_path": ""}

    async def receive():
        return said.pop(0)

    async def send(message):
        """Nobody reads it."""

    door.counted.clear()
    asyncio.run(door.app(scope, receive, send))  # which raises nothing, or its log would have a traceback
    assert door.counted == {("POST", "/v1/videos", LEFT): 1}
