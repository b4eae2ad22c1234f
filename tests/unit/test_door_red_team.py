"""What an attacker sends to the HTTP door, over a socket as it is, and what comes of it."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import zlib

import pytest
import uvicorn
from PIL import Image

from edit_ray.errors import ConfigError
from edit_ray.server.app import make_app
from edit_ray.server.gate import COOKIE, Entrance, Gate, Limits, TokenBucket
from tests.door_here import PROMPT, TOKEN, ClientHere, SchedulerHere, browser, offer_of, until_ended

pytestmark = pytest.mark.usefixtures("one_thread")
SECRET = b"nothing of anybody's business"


@pytest.fixture(scope="module")
def scheduler():
    scheduler = SchedulerHere()
    yield scheduler
    scheduler.end()


@pytest.fixture(scope="module")
def root(scheduler, model, tmp_path_factory):
    """The folder of runs, with a video in it, and beside it what nobody should see."""
    above = tmp_path_factory.mktemp("above")
    (above / "secret").write_bytes(SECRET)
    (above / "runs").mkdir()
    http = browser(ClientHere(above / "runs", scheduler), [offer_of(model)])
    body = {"prompt": PROMPT, "edit_ray": {"num_segments": 1}}
    video_id = http.post("/v1/videos", json=body, headers={"Idempotency-Key": "one"}).json()["id"]
    assert until_ended(http, video_id)["status"] == "completed"
    return above / "runs"


@pytest.fixture(scope="module")
def video_id(root):
    (found,) = (path.name for path in root.iterdir() if path.name.startswith("key-"))
    return found


@pytest.fixture(scope="module")
def port(root, scheduler, model):
    """That of a server on this machine, without a token, with small limits."""
    limits = Limits(body_bytes=200_000, body_s=1.0, changes_per_s=1000, changes_at_once=1000)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        app = make_app(ClientHere(root, scheduler), [offer_of(model)], Entrance(port=port), limits)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield port
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def send(port, *parts, pause_s=0.0):
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", port), 10) as raw:
        said = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it does not wait for the rest of a body
            for part in parts:
                raw.sendall(part)
                time.sleep(pause_s)
            while data := raw.recv(65536):
                said += data
    return said


def request(port, line, *headers, body=b"", host=None):
    head = [line, f"Host: {host or f'127.0.0.1:{port}'}", "Connection: close", *headers]
    if body:
        head.append(f"Content-Length: {len(body)}")
    said = send(port, "\r\n".join([*head, "", ""]).encode("latin-1"), body)
    status = int(said.split(b" ", 2)[1])
    assert SECRET not in said
    assert b"Traceback" not in said
    return status, said.partition(b"\r\n\r\n")


def refused(port, line, *headers, **more):
    """The status and the code of a refusal, which has OpenAI's form."""
    status, (_, _, body) = request(port, line, *headers, **more)
    return status, json.loads(body)["error"]["code"]


# Where a request goes.

OUTSIDE = [
    "/v1/videos/..",
    "/v1/videos/../../secret",
    "/v1/videos/%2e%2e/%2e%2e/secret",
    "/v1/videos/..%2f..%2fsecret",
    "/v1/videos/ID/segments/..%2frun.yaml",
    "/v1/videos/ID/segments/../run.yaml",
    "/v1/videos/ID/segments/..%2f..%2f..%2fsecret.m4s",
    "/v1/videos/ID/segments/%2e%2e/latents",
    "/v1/videos/ID/segments/00000-t0.m4s%00",
    "/v1/videos/ID/segments/00000-t0.m4s%0a",
    "/v1/videos/ID/segments/-1",
    "/v1/videos/ID/segments/0x0/latents",
    "/v1/videos/ID/segments/99999999999999999999/latents",
    "/v1/videos/ID/segments/%D9%A0/latents",
    "/v1/videos/ID/live-0%2f..%2frun.yaml.m3u8",
    "/v1/videos/ID/live-%0d%0aX:y.m3u8",
    "/v1/videos/ID/..%2fsecret.mp4",
    "/v1/videos/ID/manifest.jsonl",
    "/v1/videos/ID/run.yaml",
    "/v1/videos/ID/latents/00000-t0.safetensors",
    "/v1/videos/ID%00",
    "/v1/videos/ID%0d%0aSet-Cookie:%20x=y",
    "/v1/videos/ID/",
    "/v1/videos//ID",
    "//etc/passwd",
    "/v1/models/..%2f..%2fsecret",
    "/.uploads/x.png",
    "/v1/videos/.uploads",
    "/v1/videos/" + "a" * 5000,
    "/v1/videos/%ff%fe",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_path_leads_anywhere_else(port, video_id, path):
    status, (head, _, _) = request(port, f"GET {path.replace('ID', video_id)} HTTP/1.1")
    assert status in (400, 404), head
    assert b"set-cookie" not in head.lower()


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "CONNECT", "<script>", "GET\tX"])
def test_other_methods_are_refused(port, method):
    status, (_, _, body) = request(port, f"{method} /v1/videos HTTP/1.1")
    assert status in (400, 405)
    assert b"<script>" not in body or status == 405


def test_links_in_a_runs_folder_are_not_followed(port, root, video_id):
    folder = root / video_id
    (folder / "segments" / "00009-t0.m4s").symlink_to(root.parent / "secret")
    (folder / "live-9.m3u8").symlink_to(root.parent / "secret")
    for name in ("segments/00009-t0.m4s", "live-9.m3u8"):
        assert refused(port, f"GET /v1/videos/{video_id}/{name} HTTP/1.1") == (404, "not_found")


# Who asks.


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "127.0.0.1:1", "localhost:1", "127.0.0.1@evil", "x"],
)
def test_another_name_of_this_machine_is_refused(port, video_id, host):
    assert refused(port, f"GET /v1/videos/{video_id} HTTP/1.1", host=host) == (403, "wrong_host")
    assert refused(port, f"DELETE /v1/videos/{video_id} HTTP/1.1", host=host) == (403, "wrong_host")


def test_own_names_are_answered(port, video_id):
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
        assert request(port, f"GET /v1/videos/{video_id} HTTP/1.1", host=host)[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://", "http://localhost"])
def test_another_sites_page_is_refused(port, video_id, origin):
    answer = refused(port, f"DELETE /v1/videos/{video_id} HTTP/1.1", f"Origin: {origin}")
    assert answer == (403, "wrong_origin")
    status, (head, _, _) = request(port, "GET /v1/videos HTTP/1.1", f"Origin: {origin}")
    assert status == 403
    assert b"access-control" not in head.lower()


def test_the_own_page_is_answered(port):
    assert request(port, "GET /v1/videos HTTP/1.1", f"Origin: http://127.0.0.1:{port}")[0] == 200


def test_a_form_of_another_site_begins_nothing(port, root):
    before = sorted(path.name for path in root.iterdir())
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = refused(
            port, "POST /v1/videos HTTP/1.1", f"Content-Type: {kind}", "Origin: http://evil.example", body=b"prompt=x"
        )
        assert answer == (403, "wrong_origin")
    assert sorted(path.name for path in root.iterdir()) == before


# Tokens.


@pytest.fixture
def guarded(scheduler, model, tmp_path):
    entrance = Entrance("0.0.0.0", 80, TOKEN)
    return browser(ClientHere(tmp_path, scheduler), [offer_of(model)], entrance)


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer \xff\xfe",
        "Bearer é",
    ],
)
def test_without_the_token_nothing_is_told(guarded, authorization):
    headers = {"Authorization": authorization.encode("latin-1")} if authorization else {}
    for path in ("/v1/videos", "/v1/models", "/openapi.json", "/v1/videos/x/events", "/nowhere"):
        answer = guarded.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/healthz", headers=headers).status_code == 200


def test_with_the_token_all_is(guarded):
    for scheme in ("Bearer", "bearer"):
        assert guarded.get("/v1/videos", headers={"Authorization": f"{scheme} {TOKEN}"}).status_code == 200


def test_a_browser_exchanges_the_token_for_a_cookie(guarded):
    assert guarded.post("/session", json={"token": TOKEN + "x"}).status_code == 401
    assert guarded.post("/session", json={"token": ["x"]}).status_code == 401
    assert guarded.get("/v1/videos").status_code == 401
    answer = guarded.post("/session", json={"token": TOKEN})
    said = answer.headers["set-cookie"].lower()
    assert all(word in said for word in ("httponly", "samesite=strict", "path=/"))
    assert TOKEN not in said
    assert guarded.get("/v1/videos").status_code == 200
    guarded.cookies.clear()
    for value in ("", "x", TOKEN):
        assert guarded.get("/v1/videos", headers={"Cookie": f"{COOKIE}={value}"}).status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", ""])
def test_other_addresses_need_a_token(host):
    with pytest.raises(ConfigError, match="without a token"):
        Entrance(host)
    assert TOKEN not in repr(Entrance(host, token=TOKEN))


@pytest.mark.parametrize("token", ["", "short", "x" * 15, "x" * 16 + "\n", "é" * 20])
def test_a_token_that_is_none(token):
    with pytest.raises(ConfigError, match="the token has"):
        Entrance(token=token)


def test_names_of_a_server_on_another_address():
    behind = Entrance("0.0.0.0", 80, TOKEN, names=("door.example",))
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert behind.refusal("/", {"host": "door.example", **headers}) is None
    assert behind.refusal("/", {"host": "door.example:80", **headers}) is None
    assert behind.refusal("/", {"host": "evil.example", **headers}).code == "wrong_host"


# How much, and how slowly.


def post(port, *headers, body=b"", kind="application/json"):
    return refused(port, "POST /v1/videos HTTP/1.1", f"Content-Type: {kind}", *headers, body=body)


def test_a_body_that_is_said_to_be_too_large_is_not_read(port):
    said = send(
        port, f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 2147483648\r\n\r\n".encode()
    )
    assert said.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_becomes_too_large_is_not_read_on(port):
    head = f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    said = send(port, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), chunk, chunk, chunk, chunk)
    assert said == b"" or said.startswith(b"HTTP/1.1 413 ")
    assert request(port, "GET /healthz HTTP/1.1")[0] == 200


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_slow_body_is_given_up(port, kind):
    head = f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\nContent-Length: 100\r\n\r\n"
    began = time.monotonic()
    said = send(port, head.encode(), b"-", b"-", pause_s=0.2)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 5


def test_a_body_that_never_comes_holds_up_nobody_else(port):
    head = f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), 10) as raw:
        raw.sendall(f"{head}Content-Length: 9\r\n\r\n".encode())
        assert request(port, "GET /healthz HTTP/1.1")[0] == 200


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (["Content-Length: 5", "Content-Length: 6"], b""),
        (["Content-Length: -1"], b""),
        (["Content-Length: 5", "Transfer-Encoding: chunked"], b""),
        (["Transfer-Encoding: gzip, chunked"], b""),
        (["Host: evil.example"], b""),
        (["X: a\r\n b"], b""),
        (["X\0: a"], b""),
        (["X: a\0b"], b""),
        ([" X: a"], b""),
        (["X" * 70_000 + ": a"], b""),
        (["Idempotency-Key: a", "Idempotency-Key: b"], b""),
    ],
)
def test_headers_that_two_servers_could_read_in_two_ways(port, headers, body):
    head = ["POST /v1/videos HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close", *headers, "", ""]
    said = send(port, "\r\n".join(head).encode("latin-1"), body)
    assert said == b"" or 400 <= int(said.split(b" ", 2)[1]) < 500, said
    assert said.count(b"HTTP/1.1 ") <= 1


MULTIPART = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("application/json", b"", "invalid_request"),
        ("application/json", b"{", "invalid_request"),
        ("application/json", b"\xff\xfe", "invalid_request"),
        ("application/json", b"[]", "invalid_request"),
        ("application/json", b"[" * 100_000, "invalid_request"),
        ("application/json", b'{"prompt": "a", "prompt": "b"}', "invalid_request"),
        ("application/json", b'{"prompt": ' + b"9" * 100_000 + b"}", "invalid_request"),
        ("application/xml", b"<x/>", "wrong_media_type"),
        ("", b"x", "wrong_media_type"),
        ("multipart/form-data", b"x", "invalid_request"),
        (MULTIPART, b"no boundary at all", "invalid_request"),
        (MULTIPART, b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", "invalid_request"),
        (MULTIPART, b"--x\r\n" + b"A: b\r\n" * 20_000, "invalid_request"),
        (
            MULTIPART,
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n' * 600 + b"--x--\r\n",
            "invalid_request",
        ),
        (
            MULTIPART,
            b'--x\r\nContent-Disposition: form-data; name="prompt"; filename="a"\r\n\r\na\r\n--x--\r\n',
            "invalid_value",
        ),
        (
            MULTIPART,
            b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\na\r\n' * 2
            + b"--x--\r\n",
            "invalid_request",
        ),
        ("application/x-www-form-urlencoded", b"&".join(b"a%d=1" % at for at in range(2000)), "invalid_request"),
        ("application/x-www-form-urlencoded", b"a[%5B=1&prompt=%ff", "invalid_request"),
    ],
)
def test_bodies_that_are_none(port, root, kind, body, code):
    before = sorted(path.name for path in root.iterdir())
    assert post(port, body=body or b" ", kind=kind)[1] == code
    assert sorted(path.name for path in root.iterdir()) == before


def png(width, height, data):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BOMBS = {
    "100,000 × 100,000 pixels": lambda: png(100_000, 100_000, zlib.compress(bytes(10_000_000))),
    "10,000 × 10,000 pixels of zeros": lambda: png(10_000, 10_000, zlib.compress(bytes(10_001 * 10_000), 9)),
    "fewer bytes than it says": lambda: png(64, 64, zlib.compress(b"")),
    "no pixels": lambda: png(0, 0, b""),
    "an animation": lambda: animation(),
    "a truncated JPEG": lambda: jpeg()[:300],
    "a playlist in the name of a clip": lambda: b"\x1aE\xdf\xa3#EXTM3U\nfile:///etc/passwd\n",
    "a clip that is none": lambda: b"\0\0\0\x18ftypmp42" + b"\0" * 500,
    "a concat script": lambda: b"ffconcat version 1.0\nfile /etc/passwd\n",
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
}


def animation():
    data = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:])
    return data.getvalue()


def jpeg():
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "JPEG")
    return data.getvalue()


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_is_a_trap(port, root, name):
    url = "data:image/png;base64," + base64.b64encode(BOMBS[name]()).decode()
    body = json.dumps({"prompt": PROMPT, "input_reference": {"image_url": url}}).encode()
    began = time.monotonic()
    status, (_, _, answer) = request(port, "POST /v1/videos HTTP/1.1", "Content-Type: application/json", body=body)
    error = json.loads(answer)["error"]
    assert (status, error["param"]) == (400, "input_reference"), error
    assert time.monotonic() - began < 10
    assert str(root).encode() not in answer
    assert not (root / ".uploads").exists() or list((root / ".uploads").iterdir()) == []


def test_the_rate_is_bounded(scheduler, model, tmp_path):
    limits = Limits(changes_per_s=0.001, changes_at_once=2)
    http = browser(ClientHere(tmp_path, scheduler), [offer_of(model)], limits=limits)
    answers = [http.post("/v1/videos", json={}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [400, 400, 429]
    assert answers[2].headers["retry-after"] == "2"
    assert http.get("/v1/videos").status_code == 200


def test_a_bucket_fills_again():
    bucket = TokenBucket(2.0, 3)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(10.5), bucket.take(10.5)] == [True, False]
    assert [bucket.take(9.0), bucket.take(100.0)] == [False, True]


def test_a_clients_leaving_is_waited_for_without_end():
    """The deadline is that of the body: an answer may take longer."""
    told, messages = [], iter([{"type": "http.request"}, {"type": "http.disconnect"}])

    async def app(scope, receive, send):
        told.append(await receive())
        told.append(await receive())

    async def receive():
        if told:
            await asyncio.sleep(0.2)
        return next(messages)

    gate = Gate(app, Entrance(), Limits(body_s=0.1))
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"127.0.0.1")]}
    asyncio.run(gate(scope, receive, None))
    assert [message["type"] for message in told] == ["http.request", "http.disconnect"]
