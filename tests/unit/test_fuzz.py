"""What comes from outside is read without a traceback, without an end that does not come, and writes nowhere else.

Each reader is given what it knows, mutated. The short form runs always; `-m slow -s` gives 120,000 inputs, and prints
how many each reader has seen and how many of those it took.
"""

import json
import random
import shutil
import signal
import socket
import threading
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_64_hexdigest

from edit_ray.actors.messages import RunStatus
from edit_ray.config import load_config
from edit_ray.errors import ConfigError, ManifestUnreadable
from edit_ray.page.run_server import PageServer
from edit_ray.runs.manifest_lines import Fold, to_text
from edit_ray.tiers.disk_tier import EntryFolder
from edit_ray.tiers.entry_file import FileEntry, file_name, header_of, parse_header
from edit_ray.video.hls import Part, StreamFiles, newest_playlist
from tests.unit.entry_folder import files_in
from tests.unit.test_manifest import BEGUN, LINES

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 30
"""For one input, on a machine that has other work too."""

TOKENS = [
    *(b"", b"\0", b"\n", b"\r\n", b"\xff", "\u2028".encode(), b" ", b"#", b"'", b'"', b":", b"- ", b"? ", b"%", b"//"),
    *(b"{", b"}", b"[", b"]", b"[" * 2000, b'{"a":' * 2000, b"&a", b"*a", b"!!python/object/apply:os.system", b"---\n"),
    *(b"-1", b"0", b"1e999", b".nan", b"9" * 20, b"9" * 5000, b"true", b"null", b"1.5", b'"\\ud800"', b"/", b"../"),
    *(b"../../outside", b"/etc/passwd", b"%2e%2e%2f", b"..\\", b"plugins: [os]\n", b"GET ", b"Range: bytes=9-1\r\n"),
]


def counts(short, slow):
    """The number of inputs: a few always, many where the slow proofs run."""
    return pytest.mark.parametrize("count", [short, pytest.param(slow, marks=pytest.mark.slow)])


def mutated(chosen, content):
    """The bytes with one to four things done to them."""
    content = bytearray(content)
    for _ in range(chosen.choice((1, 1, 2, 4))):
        at = chosen.randrange(len(content) + 1)
        until = min(len(content), at + chosen.choice((1, 1, 4, 40)))
        match chosen.randrange(6):
            case 0 if content:
                content[at % len(content)] ^= 1 << chosen.randrange(8)
            case 1:
                content[at:until] = chosen.choice(TOKENS)
            case 2:
                content[at:at] = chosen.choice(TOKENS)
            case 3:
                del content[at:until]
            case 4:
                content[at:at] = content[at:until] * chosen.choice((1, 2, 50))
            case 5:
                del content[at:]
    return bytes(content)


STRANGE = [None, True, -1, 0, 1, 2**63, 10**30, 1.5, 1e308, "", "../x", "\ud800", [], [1], {}, {"a": 1}, "9" * 5000]


def changed(chosen, value):
    """JSON data with one value in it replaced, removed, or put elsewhere."""
    value = json.loads(json.dumps(value))
    places = []
    stack = [value]
    while stack:
        at = stack.pop()
        keys = at if isinstance(at, dict) else range(len(at))
        places += [(at, key) for key in keys]
        stack += [at[key] for key in keys if isinstance(at[key], dict | list)]
    at, key = chosen.choice(places)
    match chosen.randrange(4):
        case 0 if isinstance(at, dict):
            at[chosen.choice(("x", "kind", "schema", "shape", "key"))] = chosen.choice(STRANGE)
        case 1:
            del at[key]
        case _:
            at[key] = chosen.choice(STRANGE)
    return value


def inputs(what, count):
    """For each input its number, a source of randomness, and the tally: how many were taken, and how many refused."""
    chosen, tally = random.Random(what), Counter()
    for number in range(count):
        yield number, chosen, tally
    print(f"\nfuzz: {what}: {count:,} inputs, {dict(tally)}")
    assert tally.total() == count
    assert tally["refused"] > count // 100
    assert tally["taken"] > 0


@contextmanager
def within(seconds, given):
    """One that takes longer fails with what it was given."""

    def late(number, frame):
        pytest.fail(f"took over {seconds} s: {given[:500]!r}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tree(folder, but="/none"):
    """Every file below with its content, but for those in one folder."""
    paths = [path for path in folder.rglob("*") if not path.is_relative_to(but)]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@counts(60, 20_000)
def test_configurations(tmp_path, count, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "fuzz.yaml"
    seeds = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    data = load_config(ROOT / "configs" / "tiny.yaml").model_dump(mode="json", exclude_none=True)
    for number, chosen, tally in inputs("configuration", count):
        by_value = number % 2
        content = json.dumps(changed(chosen, data)).encode() if by_value else mutated(chosen, chosen.choice(seeds))
        file.write_bytes(content)
        with within(LONGEST_S, content):
            problems = ()
            try:
                load_config(file, check_model=number % 10 == 0)
            except ConfigError as error:
                problems = error.problems
        tally["refused" if problems else "taken"] += 1
        assert all(problem.isprintable() for problem in problems), problems
    assert list(tmp_path.iterdir()) == [file]


def signed(values):
    """A line of a manifest whose checksum fits."""
    body = json.dumps(values)[1:].encode()
    return b'{"crc": "%08x", %b\n' % (zlib.crc32(body), body)


@counts(600, 40_000)
def test_manifests(tmp_path, count):
    whole = [to_text(line) for line in (BEGUN, *LINES)]
    for number, chosen, tally in inputs("manifest", count):
        if number % 4:
            lines = whole[: chosen.randint(1, len(whole))]
            at = chosen.randrange(len(lines))
            values = json.loads(lines[at])
            del values["crc"]
            content = b"".join([*lines[:at], signed(changed(chosen, values)), *lines[at + 1 :]])
        else:
            content = mutated(chosen, b"".join(whole))
        with within(LONGEST_S, content):
            problem, fold = None, Fold(Path("manifest.jsonl"))
            try:
                fold.add(content)
                manifest = fold.whole()
            except ManifestUnreadable as error:
                problem = str(error)
            else:
                json.dumps(RunStatus.of(tmp_path, manifest).num_frames)
                assert fold.size <= len(content)
        tally["refused" if problem else "taken"] += 1
        assert problem is None or "\n" not in problem
    assert list(tmp_path.iterdir()) == []


def resigned(chosen, header):
    """A header with another value in it, whose checksums fit."""
    content = changed(chosen, json.loads(header[8:]))
    metadata = content.get("__metadata__")
    if isinstance(metadata, dict) and "header_xxh3_64" in metadata:
        del metadata["header_xxh3_64"]
        metadata["header_xxh3_64"] = xxh3_64_hexdigest(json.dumps(content).encode())
    text = json.dumps(content).encode()
    size = -(-(8 + len(text)) // 4096) * 4096
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


@counts(600, 30_000)
def test_headers_of_entries(tmp_path, count):
    entry = FileEntry(torch.float32, (2, 3), "0123456789abcdef")
    header = header_of(("run", 3, "transformer", "cond", 0, "last"), entry)
    for number, chosen, tally in inputs("header of an entry", count):
        content = resigned(chosen, header) if number % 2 else mutated(chosen, header)
        with within(LONGEST_S, content):
            described = parse_header(content)
            tally["refused" if described is None else "taken"] += 1
            if described is not None:
                assert file_name(described[0])
                assert min(described[1].shape, default=0) >= 0
                assert header_of(*described) == content
    assert parse_header(header_of(("run",), FileEntry(torch.float32, (-2, -3), entry.checksum))) is None


@counts(60, 4_000)
def test_folders_of_entries(tmp_path, count):
    """A store that opens a folder with anything in it reads or removes its own files, and touches nothing else."""
    folder, key = tmp_path / "entries", ("run", 0, "transformer", "cond", 0, 1)
    entry = FileEntry(torch.uint8, (6,), xxh3_64_hexdigest(b"sixsix"))
    content = header_of(key, entry) + b"sixsix"
    (tmp_path / "outside").write_bytes(b"other")
    for _, chosen, tally in inputs("folder of entries", count):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        given = mutated(chosen, content) if chosen.randrange(8) else content
        (folder / file_name(key)).write_bytes(given)
        (folder / "foreign").write_bytes(given)
        with within(LONGEST_S, given):
            files = EntryFolder(folder, allow_tmpfs=True)
            kept = len(files.entries())
            files.close()
        tally["taken" if kept else "refused"] += 1
        assert {path.name for path in files_in(folder)} == ({"foreign", file_name(key)} if kept else {"foreign"})
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "entries"}


@counts(60, 6_000)
def test_playlists(tmp_path, count):
    """Whatever lies in a run's folder as its playlists, the next segment is told of there and nowhere else."""
    folder = tmp_path / "runs" / "one"
    (folder / "segments").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"")
    (tmp_path / "runs" / "outside").write_bytes(b"")
    (folder / "init.mp4").write_bytes(b"init")
    part = Part("segments/00000-t0.m4s", 0, 16)
    (folder / part.path).write_bytes(b"fragment")
    fresh = StreamFiles(folder, fps=16, longest=16)
    fresh.rebuild([part])
    names, playlist = (folder / "live.m3u8").read_bytes(), (folder / "live-0.m3u8").read_bytes()
    before = tree(tmp_path, folder)
    for _, chosen, tally in inputs("playlist", count):
        given = mutated(chosen, names), mutated(chosen, playlist)
        if chosen.randrange(3) == 0:
            given = names.replace(b"live-0.m3u8", chosen.choice((b"../outside", b"../../outside", b"x\0y"))), given[1]
        for path in folder.glob("live*"):
            path.unlink()
        (folder / "live.m3u8").write_bytes(given[0])
        (folder / "live-0.m3u8").write_bytes(given[1])
        with within(LONGEST_S, given[0] + given[1]):
            tally["taken" if newest_playlist(folder) else "refused"] += 1
            files = StreamFiles(folder, fps=16, longest=16)
            files.rebuild([part])
            files.end()
        newest = newest_playlist(folder)
        assert (folder / newest).read_text().endswith("#EXT-X-ENDLIST\n")
    assert tree(tmp_path, folder) == before


REQUESTS = (
    b"GET /stream.mp4 HTTP/1.1\r\nHost: HOST\r\nRange: bytes=0-99\r\n\r\n",
    b"GET /segments/00000-t0.m4s HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
    b"HEAD /live.m3u8?a=1 HTTP/1.1\r\nHost: HOST\r\n\r\nGET /status HTTP/1.1\r\nHost: HOST\r\n\r\n",
    b"GET /..%2f..%2fsecret HTTP/1.1\r\nHost: HOST\r\n\r\n",
    b"POST /status HTTP/1.0\r\nHost: HOST\r\nContent-Length: 5\r\n\r\nhello",
)


@counts(150, 20_000)
def test_requests_to_the_page(tmp_path, count, capsys):
    run = tmp_path / "runs" / "one"
    (run / "segments").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"nobody's business")
    (run / "run.yaml").write_bytes(b"nobody's business")
    for name in ("stream.mp4", "segments/00000-t0.m4s", "live.m3u8"):
        (run / name).write_bytes(b"media" * 100)
    before = tree(tmp_path)
    with PageServer(run, lambda: {"state": "running"}) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        host = f"127.0.0.1:{server.server_address[1]}".encode()
        for _, chosen, tally in inputs("request to the page", count):
            request = mutated(chosen, chosen.choice(REQUESTS).replace(b"HOST", host))
            with within(LONGEST_S, request):
                answer = asked(server.server_address, request)
            assert b"nobody's business" not in answer
            assert b"Traceback" not in answer
            tally["taken" if b" 200 " in answer or b" 206 " in answer else "refused"] += 1
        server.shutdown()
        thread.join()
    assert capsys.readouterr().err == ""
    assert tree(tmp_path) == before


def asked(address, request):
    """All that is answered until the other side has had enough."""
    with socket.create_connection(address, LONGEST_S) as connection:
        parts = []
        try:
            connection.sendall(request)
            with suppress(OSError):  # not connected any more
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                parts.append(part)
        except ConnectionError:  # it was hung up on while it still spoke
            pass
        return b"".join(parts)
