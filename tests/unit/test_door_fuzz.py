"""Any request to the HTTP door has an answer in its form: no 5xx, no traceback, nothing written but runs."""

import contextlib
import json
import os
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edit_ray.server.gate import Limits
from edit_ray.server.refusals import CODES
from edit_ray.server.video_request import CONTINUITY, ENTRY, FIELDS, OUR_FIELDS
from tests.door_here import PROMPT, ClientHere, SchedulerHere, browser, offer_of, until_ended

REQUESTS = int(os.environ.get("EDIT_RAY_FUZZED_REQUESTS", "400"))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scheduler():
    scheduler = SchedulerHere()
    yield scheduler
    scheduler.end()


@pytest.fixture(scope="module")
def door(scheduler, model, tmp_path_factory):
    """A client of HTTP, the folder of runs, and the id of a video in it."""
    root = tmp_path_factory.mktemp("runs")
    boundless = Limits(changes_per_s=1e9, changes_at_once=10**9, reads_per_s=1e9, reads_at_once=10**9)
    http = browser(ClientHere(root, scheduler), [offer_of(model)], limits=boundless, raise_server_exceptions=True)
    body = {"prompt": PROMPT, "edit_ray": {"num_segments": 1}}
    video_id = http.post("/v1/videos", json=body, headers={"Idempotency-Key": "kept"}).json()["id"]
    assert until_ended(http, video_id)["status"] == "completed"
    return http, root, video_id


TEXT = st.text(max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([PROMPT, "1", "32x32", "tiny"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXT, below, max_size=3),
    max_leaves=6,
)


def some(names, values=VALUE):
    return st.dictionaries(st.sampled_from(names) | TEXT, values, max_size=3)


ENTRIES = st.lists(some(ENTRY), max_size=3) | VALUE
OURS = st.fixed_dictionaries(
    {},
    optional={
        "storyboard": ENTRIES,
        "continuity": some(CONTINUITY) | VALUE,
        "num_segments": st.integers(-1, 2) | VALUE,
    },
)
BODY = (
    st.builds(lambda top, ours, more: {**top, "edit_ray": {**more, **ours}}, some(FIELDS), OURS, some(OUR_FIELDS))
    | VALUE
)
PARTS = (
    *(
        "videos",
        "models",
        "content",
        "events",
        "segments",
        "latents",
        "thumbnail",
        "live.m3u8",
        "live-0.m3u8",
        "0",
        "1",
    ),
    *(
        "init.mp4",
        "stream.mp4",
        "00000-t0.m4s",
        "remix",
        "extensions",
        "edits",
        "ID",
        "..",
        ".",
        "",
        "%2e%2e",
        "%00",
        "%0d%0a",
    ),
    *("session", "openapi.json", "healthz", "v1", "reroll", "branch"),
)
CHANGED = ("at", "from_segment", "steer", "paused", "approve", "video", "prompt", "seed", "num_segments", "seconds")
STEERED = some(("from_segment", "prompt", "negative_prompt", "guidance_scale", "seed"))
CHANGE = st.builds(
    lambda top, steer: {**top, **steer}, some(CHANGED), st.one_of(st.just({}), st.builds(dict, steer=STEERED))
)
PATH = st.one_of(
    st.lists(
        st.sampled_from(PARTS) | st.text(max_size=6).map(lambda text: quote(text, errors="replace")), max_size=6
    ).map(lambda parts: "/" + "/".join(parts)),
    st.sampled_from(PARTS).map(lambda part: f"/v1/videos/ID/{part}"),
    st.sampled_from(PARTS).map(lambda part: f"/v1/videos/ID/segments/{part}"),
    st.just("/v1/videos"),
)
QUERY = st.lists(
    st.tuples(
        st.sampled_from(["after", "limit", "order", "variant", "_HLS_msn"]) | TEXT,
        st.sampled_from(["1", "asc", "video", "thumbnail"]) | TEXT,
    ),
    max_size=2,
)
HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=20).map(
    lambda text: text.encode("latin-1")
)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["range", "last-event-id", "idempotency-key", "content-type", "if-range", "accept", "expect", "cookie"]
    ),
    HEADER
    | st.sampled_from(
        [b"bytes=0-1", b"bytes=5-1,7-", b"0-0-0", b"multipart/form-data; boundary=x", b"application/json"]
    ),
    max_size=3,
)
CONTENT = st.one_of(
    (BODY | CHANGE).map(lambda body: {"content": json.dumps(body).encode(), "kind": "application/json"}),
    st.binary(max_size=60).map(lambda data: {"content": data, "kind": "application/json"}),
    st.binary(max_size=60).map(
        lambda data: {"content": b"--x\r\n" + data + b"\r\n--x--", "kind": "multipart/form-data; boundary=x"}
    ),
    st.lists(
        st.tuples(st.sampled_from([*FIELDS, "edit_ray[seed]", "edit_ray[storyboard][]", "video[id]"]) | TEXT, TEXT),
        max_size=4,
    ).map(lambda fields: {"data": dict(fields), "kind": None}),
)
METHOD = st.sampled_from(["GET", "GET", "GET", "POST", "POST", "POST", "HEAD", "DELETE", "PATCH", "PUT", "OPTIONS"])


@given(METHOD, PATH, QUERY, HEADERS, CONTENT)
@settings(max_examples=REQUESTS, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_every_request_is_answered_in_form(door, method, path, query, headers, content):
    http, root, video_id = door
    if method == "DELETE" and path.rstrip("/").endswith("ID"):
        path = path.rstrip("/") + "x"
    about = dict(headers)
    if content["kind"] is not None:
        about.setdefault("content-type", content["kind"].encode())
    sent = {name: value for name, value in content.items() if name != "kind"} if method not in ("GET", "HEAD") else {}
    try:
        answer = http.request(method, path.replace("ID", video_id), params=query, headers=about, **sent)
    except (UnicodeEncodeError, httpx2.InvalidURL):
        return  # which no client can send
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and method != "HEAD":
        error = answer.json()["error"]
        assert CODES[error["code"]] == answer.status_code
        assert error["message"].isprintable()
        assert str(root) not in answer.text
    if method == "POST" and answer.status_code == 200:
        with contextlib.suppress(KeyError):
            assert http.delete(f"/v1/videos/{answer.json()['id']}").status_code == 200
    strangers = {entry.name for entry in root.iterdir()} - {video_id, ".uploads"}
    assert strangers == set()
