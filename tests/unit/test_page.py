"""The page of a run: what it serves, to whom, and that nothing else can be had from it."""

import http.client
import json
import os
import re
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cli.main import main
from edit_ray.errors import UnknownRun
from edit_ray.page.run_server import HLS_JS, PageServer, byte_range, open_named

SECRET = b"nothing of anybody's business"
STREAM = bytes(range(256)) * 4


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "runs" / "one"
    (run / "segments").mkdir(parents=True)
    (run / "latents").mkdir()
    (tmp_path / "secret").write_bytes(SECRET)
    (run / "run.yaml").write_bytes(SECRET)
    (run / "latents" / "00000-t0.m4s").write_bytes(SECRET)
    (run / "stream.mp4").write_bytes(STREAM)
    (run / "init.mp4").write_bytes(b"init")
    (run / "segments" / "00000-t0.m4s").write_bytes(b"fragment")
    (run / "live.m3u8").write_text("#EXTM3U\n")
    (run / "live-0.m3u8").write_text("#EXTM3U\n")
    return run


@pytest.fixture
def server(folder):
    """A server of the folder, whose status can be exchanged, running."""
    with PageServer(folder, lambda: {"state": "running"}) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request(method, path, headers=headers)
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply, body


@given(st.one_of(st.none(), st.text(max_size=12), st.from_regex(r"bytes=[0-9]{0,2}-[0-9]{0,2}", fullmatch=True)))
@settings(max_examples=100)
def test_a_range_is_understood_or_passed_over(header):
    size = 20
    wanted = byte_range(header, size)
    match = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", (header or "").strip())
    first, last = (int(number) if number else None for number in match.groups()) if match else (None, None)
    if (first is None and last is None) or (first is not None and last is not None and last < first):
        assert wanted == range(size)
    else:
        begin = max(0, size - last) if first is None else first
        expected = range(size)[begin : size if first is None or last is None else last + 1]
        assert wanted == (expected or None)


def test_an_empty_file_has_no_part():
    assert byte_range(None, 0) == range(0)
    assert byte_range("bytes=0-", 0) is None
    assert byte_range("bytes=-5", 0) is None


@pytest.mark.parametrize(
    ("name", "kind", "content"),
    [
        ("/", "text/html; charset=utf-8", b"<!doctype html>"),
        ("/page.js", "text/javascript; charset=utf-8", b"//"),
        ("/page.css", "text/css; charset=utf-8", b":root"),
        ("/live.m3u8", "application/vnd.apple.mpegurl", b"#EXTM3U"),
        ("/live-0.m3u8?_HLS_msn=1", "application/vnd.apple.mpegurl", b"#EXTM3U"),
        ("/init.mp4", "video/mp4", b"init"),
        ("/stream.mp4", "video/mp4", STREAM),
        ("/segments/00000-t0.m4s", "video/iso.segment", b"fragment"),
        ("/status", "application/json", b'{"state": "running"}'),
    ],
)
def test_every_file_comes_with_its_type_and_is_asked_for_anew(server, name, kind, content):
    reply, body = ask(server, name)
    assert (reply.status, reply.headers["Content-Type"]) == (200, kind)
    assert body.startswith(content)
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    head, nothing = ask(server, name, "HEAD")
    assert (head.status, head.headers["Content-Length"], nothing) == (200, str(len(body)), b"")


def test_parts_of_a_file(server):
    reply, body = ask(server, "/stream.mp4", Range="bytes=10-19")
    assert (reply.status, body) == (206, STREAM[10:20])
    assert reply.headers["Content-Range"] == f"bytes 10-19/{len(STREAM)}"
    reply, body = ask(server, "/stream.mp4", Range="bytes=-6")
    assert (reply.status, body) == (206, STREAM[-6:])
    reply, body = ask(server, "/stream.mp4", Range=f"bytes={len(STREAM)}-")
    assert reply.status == 416
    assert reply.headers["Content-Range"] == f"bytes */{len(STREAM)}"
    reply, body = ask(server, "/stream.mp4", Range="bytes=0-1,4-5")
    assert (reply.status, body) == (200, STREAM)


def test_a_growing_file_is_served_as_long_as_it_was(server, folder):
    (folder / "stream.mp4").write_bytes(STREAM * 2)
    reply, body = ask(server, "/stream.mp4")
    assert (reply.headers["Content-Length"], body) == (str(2 * len(STREAM)), STREAM * 2)


OUTSIDE = [
    "/run.yaml",
    "/manifest.json",
    "/latents/00000-t0.m4s",
    "/../one/run.yaml",
    "/../../secret",
    "/%2e%2e/%2e%2e/secret",
    "/segments/../run.yaml",
    "/segments/%2e%2e/run.yaml",
    "/segments/..%2frun.yaml",
    "/segments",
    "/segments/",
    "//etc/passwd",
    "/segments/00000-t0.m4s/",
    "/segments/00000-t0.m4s%00",
    "/segments/00000-t0.m4s%0a",
    "/live.m3u8%0d%0aX: y",
    "/final.mp4",
    "/index.html",
    "/server.py",
    "/node_modules/hls.js/package.json",
    "http://127.0.0.1/run.yaml",
    "*",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_else_is_served(server, path):
    with socket.create_connection(server.server_address, 10) as raw:
        host = f"127.0.0.1:{server.server_address[1]}"
        raw.sendall(f"GET {path.replace(' ', '%20')} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        said = b"".join(iter(lambda: raw.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 404 "), said
    assert SECRET not in said


@settings(max_examples=100)
@given(st.text(max_size=40) | st.from_regex(r"(segments/)?[\w.\-/%]{1,20}\.(mp4|m4s|m3u8)", fullmatch=True))
def test_no_name_leads_anywhere_else(name):
    assert open_named(Path("/nonexistent"), name) is None or name in ("", "page.js", "page.css", "hls.js")


def test_links_and_pipes_are_not_followed(server, folder, tmp_path):
    (folder / "final.mp4").symlink_to(tmp_path / "secret")
    (folder / "live-1.m3u8").symlink_to(folder / "run.yaml")
    (folder / "segments" / "00001-t0.m4s").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "segments" / "00002-t0.m4s")
    (folder / "live-2.m3u8").mkdir()
    (folder / "segments" / "00000-t0.m4s").unlink()
    names = ["final.mp4", "live-1.m3u8", "live-2.m3u8", *(f"segments/0000{index}-t0.m4s" for index in range(3))]
    assert [ask(server, f"/{name}")[0].status for name in names] == [404] * 6
    (folder / "segments").rename(folder / "real")
    (folder / "segments").symlink_to(folder / "latents")
    assert ask(server, "/segments/00000-t0.m4s")[0].status == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost:1", "127.0.0.1:80@evil.example"])
def test_other_hosts_names_are_refused(server, host):
    reply, body = ask(server, "/stream.mp4", Host=host)
    assert (reply.status, body) == (403, b"this server answers to its own address only\n")
    assert ask(server, "/", Host=f"localhost:{server.server_address[1]}")[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "<script>"])
def test_nothing_can_be_changed(server, method):
    reply, body = ask(server, "/", method)
    assert reply.status == 501
    assert b"<script>" not in body


def test_only_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("torn"), UnknownRun("no run")])
def test_a_run_that_cannot_be_read_is_no_traceback(server, error):
    def fail():
        raise error

    server.status = fail
    reply, body = ask(server, "/status")
    assert (reply.status, body) == (503, b"the run cannot be read now\n")


def test_a_mistake_of_ours_is_told_here_and_not_to_the_viewer(server, capfd):
    server.status = lambda: {"state": object()}
    with pytest.raises(http.client.RemoteDisconnected):
        ask(server, "/status")
    said = capfd.readouterr()
    assert said.err.startswith("edit-ray: a request failed: TypeError(")
    assert "Traceback" not in said.err + said.out


def test_viewers_that_leave_are_not_told(server, folder, capfd):
    (folder / "stream.mp4").write_bytes(bytes(1 << 24))
    for _ in range(3):
        with socket.create_connection(server.server_address, 10) as raw:
            raw.sendall(f"GET /stream.mp4 HTTP/1.1\r\nHost: 127.0.0.1:{server.server_address[1]}\r\n\r\n".encode())
            raw.recv(10)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert ask(server, "/status")[0].status == 200
    assert capfd.readouterr().err == ""


def test_hls_js_is_served_where_it_is_installed(server):
    reply, body = ask(server, "/hls.js")
    assert (reply.status == 200) == HLS_JS.is_file()
    assert b"Hls" in body if HLS_JS.is_file() else body == b"there is no such file\n"


def test_the_pinned_package_is_the_locked_one():
    package = HLS_JS.parents[3]
    wanted = json.loads((package / "package.json").read_text())["dependencies"]
    locked = json.loads((package / "package-lock.json").read_text())["packages"]
    assert wanted == {"hls.js": locked["node_modules/hls.js"]["version"]}
    assert locked["node_modules/hls.js"]["integrity"].startswith("sha512-")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nobody", "--wait", "0"], "no run 'nobody'"),
        (["../one"], "run id"),
        (["one", "--port", "70000"], "--port is 70000; it must be from 1 to 65535, or 0"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, says):
    assert main(["--output", str(tmp_path), "serve", *arguments]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
