"""The manifest: what is committed is never lost, and what is not whole is never taken for whole."""

import json
import os
import resource
import zlib
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edit_ray.errors import ManifestUnreadable, RunFolderGone, RunLocked
from edit_ray.runs.layout import FrameLayout
from edit_ray.runs.manifest import (
    SCHEMA,
    Begun,
    Committed,
    Dropped,
    Ended,
    Extended,
    Manifest,
    Opened,
    Rerolled,
    SegmentRecord,
    Tiled,
)
from edit_ray.runs.manifest_file import ManifestFile, from_bytes, read_manifest, to_text
from edit_ray.runs.plan import Take

HARDWARE = {"device": "cpu", "threads": 1}
BEGUN = Begun("one", "0.1.0", 128, 128, FrameLayout(33, 3, 16), 4, "a submission", HARDWARE)


def record(index, take=0):
    files = f"latents/{index:05d}-t{take}.safetensors", f"segments/{index:05d}-t{take}.mp4"
    return SegmentRecord(index, take, "a “prompt”\n", 7, 33 * index, 33, *files, {"denoise_s": 1.5})


LINES = [
    Committed(1, record(0)),
    Committed(1, record(1)),
    Opened(2, HARDWARE | {"threads": 2}),
    Committed(2, record(2)),
    Committed(2, record(3)),
    Ended(2, "done", None, "final.mp4"),
    Opened(3, HARDWARE),
    Extended(3, 5),
    Committed(3, record(4)),
    Dropped(3, 2),
    Ended(3, "cancelled"),
    Opened(4, HARDWARE),
    Rerolled(4, Take(1, 3, 99, "another")),
    Tiled(4, 3),
    Committed(4, record(3, 1)),
    Ended(4, "failed", "denoise of segment 4 failed: it broke"),
]


def fold(lines):
    manifest = Manifest.start(BEGUN)
    for line in lines:
        manifest = manifest.after(line)
    return manifest


def written(path, lines=LINES):
    file = ManifestFile.create(path, BEGUN)
    for line in lines:
        file.append(line)
    return file


def test_the_lines_add_up():
    manifest = fold(LINES)
    assert (manifest.incarnation, manifest.num_segments, manifest.num_frames) == (4, 5, 33 + 4 * 24)
    assert [(segment.index, segment.take) for segment in manifest.segments] == [(0, 0), (1, 0), (2, 0), (3, 1)]
    assert [(segment.index, segment.take) for segment in manifest.earlier_takes] == [(3, 0), (4, 0)]
    assert (manifest.state, manifest.error) == ("failed", "denoise of segment 4 failed: it broke")
    assert (manifest.final, manifest.dropped_before, manifest.planned_from) == (None, 2, 3)
    assert (manifest.tiled_from, fold(LINES[:9]).tiled_from) == (3, None)
    assert fold(LINES[:9]).planned_from == 4
    assert fold(LINES[:6]).final == "final.mp4"
    assert fold(LINES[:7]).state == "open"


def test_what_is_appended_is_read_back(tmp_path):
    path = tmp_path / "manifest.jsonl"
    file = ManifestFile.create(path, BEGUN)
    for count, line in enumerate(LINES, 1):
        assert file.append(line) == read_manifest(path) == fold(LINES[:count])
    file.close()
    assert ManifestFile.open(path).manifest == fold(LINES)
    assert all(json.loads(line)["kind"] for line in path.read_text().splitlines())


def test_it_is_appended_to_and_never_written_again(tmp_path):
    path = tmp_path / "manifest.jsonl"
    file, before = ManifestFile.create(path, BEGUN), path.read_bytes()
    inode = path.stat().st_ino
    for line in LINES:
        file.append(line)
        assert path.read_bytes().startswith(before)
        before = path.read_bytes()
    assert path.stat().st_ino == inode


def test_lines_of_an_earlier_incarnation_are_fenced_off():
    late = [Committed(1, record(2)), Ended(1, "failed", "late"), Extended(1, 9), Dropped(1, 2), Opened(1, {})]
    assert fold([*LINES[:3], *late]) == fold(LINES[:3])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([Committed(1, record(1))], "segment 1 of take 0 does not follow"),
        ([Committed(1, record(0, 1))], "segment 0 of take 1 does not follow"),
        ([Committed(1, record(0)), Tiled(1, 0)], "segment 0 is committed, and was not decoded in tiles"),
        ([Committed(1, record(0))] * 2, "segment 0 of take 0 does not follow"),
        ([Committed(2, record(0))], "has not opened the run"),
        ([Opened(1, HARDWARE)], "opens the run twice"),
        ([replace(BEGUN)], "begins twice"),
        ([Rerolled(1, Take(1, 1, 9))], "take 1 from segment 1 does not follow"),
        ([Rerolled(1, Take(2, 0, 9))], "take 2 from segment 0 does not follow"),
    ],
)
def test_what_cannot_follow_is_refused(lines, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        fold(lines)
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"".join(map(to_text, [BEGUN, *lines])))
    with pytest.raises(ManifestUnreadable, match=f"manifest.jsonl, line {len(lines) + 1}: .*{words}"):
        read_manifest(path)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "segments/../x-t0.mp4", "segments/00000-t0", "a"])
def test_files_outside_the_folder_are_refused(path):
    with pytest.raises(ValueError, match="no file of a segment"):
        replace(record(0), media=path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 4000))
def test_a_file_that_is_cut_anywhere_loses_no_whole_line(tmp_path_factory, at):
    content = b"".join(map(to_text, [BEGUN, *LINES]))
    at = at % (len(content) + 1)
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(content[:at])
    whole = content[:at].count(b"\n")
    if whole == 0:
        with pytest.raises(ManifestUnreadable, match="no whole line"):
            ManifestFile.open(path)
        return
    assert read_manifest(path) == fold(LINES[: whole - 1])
    file = ManifestFile.open(path)
    assert path.read_bytes() == content[: content[:at].rfind(b"\n") + 1], "the rest is cut off"
    assert path.read_bytes().endswith(b"\n")
    for line in LINES[whole - 1 :]:
        file.append(line)
    file.close()
    assert path.read_bytes() == content


@settings(max_examples=300, deadline=None)
@given(st.integers(0), st.integers(1, 255))
@example(sum(len(to_text(line)) for line in [BEGUN, *LINES[:-1]]) - 1, 1)  # the end of the last line but one
def test_a_byte_that_has_changed_is_noticed(at, change):
    content = bytearray(b"".join(map(to_text, [BEGUN, *LINES])))
    at %= len(content)
    content[at] ^= change
    try:
        manifest, _ = from_bytes(bytes(content), "manifest.jsonl")
    except ManifestUnreadable:
        return
    assert at >= len(b"".join(map(to_text, [BEGUN, *LINES[:-1]]))), "only a last line may be passed over"
    assert manifest == fold(LINES[:-1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no whole line"),
        (b"{}\n", "damaged"),
        (b"null\n", "damaged"),
        (b"\x00" * 4096, "no whole line"),
        (to_text(LINES[0]), "first line of a manifest is missing"),
        (to_text(BEGUN).replace(b'"one"', b'"two"'), "damaged"),
        (to_text(replace(BEGUN, schema=SCHEMA + 1)), f"a newer version's manifest \\(schema {SCHEMA + 1}; known here"),
        (to_text(replace(BEGUN, schema=1)), "another version's manifest"),
    ],
)
def test_what_is_no_manifest_is_one_clear_error(content, words, tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(content)
    for look in (read_manifest, ManifestFile.open):
        with pytest.raises(ManifestUnreadable, match=words):
            look(path)
    assert path.read_bytes() == content, "what is not understood is left as it is"


def line_of(values):
    body = json.dumps(values)[1:].encode()
    return b'{"crc": "%08x", %b\n' % (zlib.crc32(body), body)


@pytest.mark.parametrize("values", [{"kind": "sung", "incarnation": 1}, {"kind": "ended"}, {"no": "kind"}])
def test_a_whole_line_that_is_not_known_is_named(values, tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(to_text(BEGUN) + line_of(values) + to_text(LINES[0]))
    with pytest.raises(ManifestUnreadable, match="line 2"):
        read_manifest(path)


def test_a_second_writer_is_refused(tmp_path):
    file = written(tmp_path / "manifest.jsonl")
    with pytest.raises(RunLocked, match="another process is at work"):
        ManifestFile.open(file.path)
    file.close()
    ManifestFile.open(file.path).close()


def test_a_writer_whose_file_was_written_by_another_leaves_it_alone(tmp_path):
    file = written(tmp_path / "manifest.jsonl", LINES[:2])
    with file.path.open("ab") as other:
        other.write(to_text(LINES[2]))
    with pytest.raises(RunLocked, match="written by another process"):
        file.append(Ended(1, "done"))
    assert read_manifest(file.path) == fold(LINES[:3])


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_is_gone_is_noticed(tmp_path, replaced):
    file = written(tmp_path / "manifest.jsonl", LINES[:2])
    file.path.unlink()
    if replaced:
        file.path.write_bytes(to_text(BEGUN))
    with pytest.raises(RunFolderGone, match="removed or replaced"):
        file.append(Ended(1, "done"))


def test_a_line_that_does_not_fit_leaves_no_part_of_it(tmp_path):
    file = written(tmp_path / "manifest.jsonl", LINES[:1])
    before = file.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))  # the file may grow by ten bytes
    try:
        with pytest.raises(OSError, match="No space left"):
            file.append(LINES[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.path.read_bytes() == before
    assert file.append(LINES[1]) == fold(LINES[:2])


def test_a_line_that_could_not_be_synced_is_not_there(tmp_path, monkeypatch):
    file = written(tmp_path / "manifest.jsonl", LINES[:1])
    before = file.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.pwrite(descriptor, b"", -1))  # fails with EINVAL
        with pytest.raises(OSError, match="Invalid argument"):
            file.append(LINES[1])
    assert file.path.read_bytes() == before
    assert file.append(LINES[1]) == fold(LINES[:2])
