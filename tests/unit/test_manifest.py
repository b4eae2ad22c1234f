"""The manifest: what is committed is never lost, and what is not whole is never taken for whole."""

import errno
import json
import os
import resource
import zlib
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edit_ray import files
from edit_ray.errors import ManifestUnreadable, RunFolderGone, RunLocked
from edit_ray.runs.manifest import (
    SCHEMA,
    Approved,
    Begun,
    Committed,
    Dropped,
    Edited,
    Ended,
    Extended,
    Manifest,
    Opened,
    Paused,
    Rerolled,
    SegmentRecord,
    Tiled,
)
from edit_ray.runs.manifest_file import ManifestFile, ManifestReader
from edit_ray.runs.manifest_lines import Fold, read_back, to_text
from edit_ray.runs.run_plan import Edit, FrameLayout, Take
from tests.faults import faulty

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


def folded(content):
    """The manifest that readers find in these bytes."""
    found = Fold("manifest.jsonl")
    found.add(content)
    return found.whole()


def read_manifest(path):
    return ManifestReader(path).read()


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
    file, before = ManifestFile.create(path, BEGUN), path.read_bytes()
    inode = path.stat().st_ino
    for count, line in enumerate(LINES, 1):
        assert file.append(line) == read_manifest(path) == fold(LINES[:count])
        assert path.read_bytes().startswith(before)
        before = path.read_bytes()
    file.close()
    assert path.stat().st_ino == inode, "it is never written again"
    assert ManifestFile.open(path).manifest == fold(LINES)
    assert all(json.loads(line)["kind"] for line in path.read_text().splitlines())


STEERING = [
    Edited(1, Edit(1, prompt="a “blue” square", request="first")),
    Paused(1, True),
    Committed(1, record(0)),
    Edited(1, Edit(1, negative_prompt="", guidance_scale=7.5, seed=2**63 - 1)),
    Approved(1, 1),
    Ended(1, "cancelled"),
    Opened(2, HARDWARE, change=Rerolled(2, Take(1, 0, 99))),
    Edited(2, Edit(3)),
    Paused(2, False),
]


def test_lines_that_steer_a_run_add_up_and_are_read_back(tmp_path):
    first, second, take, third = STEERING[0].edit, STEERING[3].edit, STEERING[6].change.take, STEERING[7].edit
    before, after = fold(STEERING[:6]), fold(STEERING)
    assert (before.changes, before.paused, before.approved) == ((first, second), True, 1)
    assert (after.changes, after.takes) == ((first, second, take, third), (take,))
    assert fold(STEERING[:7]).paused, "until a line says otherwise"
    assert (after.paused, after.approved) == (False, 0)
    path = tmp_path / "manifest.jsonl"
    written(path, STEERING).close()
    assert read_manifest(path) == after
    created = ManifestFile.create(tmp_path / "whole.jsonl", BEGUN, *STEERING)
    assert (created.manifest, read_manifest(created.path)) == (after, after)
    assert created.path.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("schema", [2, 3])
def test_a_run_of_an_earlier_version_is_read_and_steered(schema, tmp_path):
    """Its first line lacks what came later."""
    text = to_text(replace(BEGUN, schema=schema)).decode().partition(", ")[2]
    body = text.replace(', "branched_from": ""', "").encode()[:-1]
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b'{"crc": "%08x", %b\n' % (zlib.crc32(body), body))
    file = ManifestFile.open(path)
    for line in STEERING:
        file.append(line)
    file.close()
    assert read_manifest(path) == replace(fold(STEERING), begun=replace(BEGUN, schema=schema))


def test_lines_of_an_earlier_incarnation_are_fenced_off():
    late = [Committed(1, record(2)), Ended(1, "failed", "late"), Extended(1, 9), Dropped(1, 2), Opened(1, {})]
    assert fold([*LINES[:3], *late]) == fold(LINES[:3])


@pytest.mark.parametrize("change", [Extended(3, 9), Rerolled(3, Take(1, 1, 99, "another"))])
def test_a_run_that_goes_on_with_a_change_is_one_line(change):
    """In earlier versions it was two, and they give the same."""
    before = LINES[:6]
    opened = Opened(3, HARDWARE, change=change)
    assert fold([*before, opened]) == fold([*before, Opened(3, HARDWARE), change])
    content = b"".join(map(to_text, [BEGUN, *before, opened]))
    assert folded(content) == fold([*before, opened])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([Committed(1, record(1))], "segment 1 of take 0 does not follow"),
        ([Committed(1, record(0, 1))], "segment 0 of take 1 does not follow"),
        ([Committed(1, record(0)), Tiled(1, 0)], "segment 0 is committed, and was not decoded in tiles"),
        ([Committed(1, record(0))] * 2, "segment 0 of take 0 does not follow"),
        ([Committed(2, record(0))], "has not opened the run"),
        ([Extended(1, 5), Committed(1, record(0)), Extended(1, 0)], "has 1 segments, and cannot end with 0"),
        ([Committed(1, record(0)), Dropped(1, 2)], "segments before 2 are gone, and only 1 were made"),
        ([replace(BEGUN)], "begins twice"),
        ([Rerolled(1, Take(1, 1, 9))], "take 1 from segment 1 does not follow"),
        ([Rerolled(1, Take(2, 0, 9))], "take 2 from segment 0 does not follow"),
        ([Committed(1, record(0)), Edited(1, Edit(0, "b"))], "segment 0 is committed, and its prompt cannot be edited"),
        ([Committed(1, record(0)), Approved(1, 2)], "segments before 2 are approved, and only 1 were made"),
        ([Ended(1, "cancelled"), Edited(1, Edit(0, "b"))], "the run has ended, and its line 'edited' comes too late"),
        ([Ended(1, "cancelled"), Paused(1, True)], "the run has ended, and its line 'paused' comes too late"),
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
    with pytest.raises(ValueError, match=f"^committed.segment.media is '{path}' .String should match pattern"):
        read_back(to_text(Committed(1, replace(record(0), media=path))))


@pytest.mark.parametrize("figures", ['{"a": NaN}', '{"a": "b"}', '{"a": 1e999}', '{"a"}'])
def test_figures_that_cannot_be_read_are_none_and_the_segment_is_committed(figures):
    whole = to_text(Committed(1, replace(record(0), statistics={"a": 1.5})))
    body = whole[len('{"crc": "00000000", ') :].replace(b'{"a": 1.5}', figures.encode())
    content = to_text(BEGUN) + b'{"crc": "%08x", %b' % (zlib.crc32(body[:-1]), body)
    (segment,) = folded(content).segments
    assert segment == replace(record(0), statistics={})


@pytest.mark.usefixtures("unsynced")
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        manifest = folded(bytes(content))
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
    with pytest.raises(RunLocked, match="another process is working"):
        ManifestFile.open(file.path)
    file.close()
    ManifestFile.open(file.path).close()


def meanwhile(what):
    """A disk on which something happens after all reads of the file, before the first write."""
    todo = [what]

    def write(call, *arguments):
        if todo:
            todo.pop()()
        return call(*arguments)

    return faulty(write=write)


class Failing(files.Disk):
    """Where these calls fail; before the first of them something else is done, which does not."""

    def __init__(self, *calls, meanwhile=None):
        self.calls, self.meanwhile = calls, meanwhile

    def fsync(self, descriptor):
        self.fail("fsync")
        super().fsync(descriptor)

    def truncate(self, descriptor, size):
        self.fail("truncate")
        super().truncate(descriptor, size)

    def fail(self, call):
        if call in self.calls:
            meanwhile, self.meanwhile, calls, self.calls = self.meanwhile, None, self.calls, ()
            if meanwhile is not None:
                meanwhile()
            self.calls = calls
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def two(tmp_path):
    """Two that have one manifest open, as the first has lost its lock: a server gave that to the second."""
    first = written(tmp_path / "manifest.jsonl", LINES[:2])
    with files.swapped(faulty(lock=lambda lock, descriptor: None)):
        second = ManifestFile.open(first.path)
    yield first, second
    first.close()
    second.close()


def test_who_has_lost_the_lock_changes_nothing(two):
    first, second = two
    second.append(Opened(2, HARDWARE))
    second.append(Tiled(2, 3))
    for line in (Tiled(1, 2), Committed(1, record(2)), Opened(2, HARDWARE), Opened(3, HARDWARE)):
        with pytest.raises(RunLocked):
            first.append(line)
    assert second.append(Committed(2, record(2))) == read_manifest(second.path)
    assert read_manifest(second.path) == fold([*LINES[:2], Opened(2, HARDWARE), Tiled(2, 3), Committed(2, record(2))])


@pytest.mark.parametrize("late", [Tiled(1, 2), Committed(1, record(2)), Ended(1, "failed", "late")])
def test_a_late_line_lands_behind_those_of_the_new_writer_and_is_none(two, late):
    first, second = two
    opens = meanwhile(lambda: [second.append(Opened(2, HARDWARE)), second.append(Tiled(2, 3))])
    with files.swapped(opens), pytest.raises(RunLocked):
        first.append(late)
    assert second.append(Committed(2, record(2))) == read_manifest(second.path)
    assert read_manifest(second.path) == fold([*LINES[:2], Opened(2, HARDWARE), Tiled(2, 3), Committed(2, record(2))])


def test_a_line_that_comes_just_before_another_opens_the_run_counts_for_both(two):
    first, second = two
    with files.swapped(meanwhile(lambda: first.append(Committed(1, record(2))))):
        manifest = second.append(Opened(2, HARDWARE))
    assert manifest == read_manifest(first.path) == fold([*LINES[:2], Committed(1, record(2)), Opened(2, HARDWARE)])
    assert second.append(Committed(2, record(3))) == read_manifest(first.path)


def test_of_two_that_open_the_run_at_once_one_has_it(two):
    first, second = two
    with files.swapped(meanwhile(lambda: second.append(Opened(2, HARDWARE)))), pytest.raises(RunLocked):
        first.append(Opened(2, HARDWARE, writer="first"))
    with pytest.raises(RunLocked):
        first.append(Committed(2, record(2)))
    assert second.append(Committed(2, record(2))) == read_manifest(second.path)
    assert read_manifest(second.path) == fold([*LINES[:2], Opened(2, HARDWARE), Committed(2, record(2))])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 400), st.booleans())
def test_a_late_write_that_is_torn_damages_no_line(two, length, at_the_last_instant):
    """The rest of it never comes: the disk was full, or the machine is gone."""
    first, second = two
    torn = to_text(Committed(1, record(2)))[:length]
    late = os.open(first.path, os.O_WRONLY | os.O_APPEND)
    second.append(Opened(second.manifest.incarnation + 1, HARDWARE))
    line = Tiled(second.manifest.incarnation, length + 2)
    if not at_the_last_instant:
        os.write(late, torn)
    with files.swapped(meanwhile(lambda: os.write(late, torn)) if at_the_last_instant else files.Disk()):
        assert second.append(line) == read_manifest(second.path)
    os.close(late)
    assert read_manifest(second.path).tiled_from == length + 2
    after = Dropped(second.manifest.incarnation, 1)
    assert second.append(after) == read_manifest(second.path) == ManifestReader(second.path).read()


@settings(max_examples=300, deadline=None)
@given(st.integers(0), st.integers(1, 255), st.integers(0, 200))
def test_torn_bytes_that_a_line_vouches_for_hide_no_damage(at, change, length):
    torn = to_text(LINES[1])[:length]
    *before, last = [to_text(BEGUN), to_text(LINES[0]), torn + to_text(LINES[1], 2), to_text(LINES[2])]
    content = bytearray(b"".join(before))
    assert folded(bytes(content) + last) == fold(LINES[:3])
    content[at % len(content)] ^= change
    try:
        manifest = folded(bytes(content) + last)
    except ManifestUnreadable:
        return
    assert manifest == fold(LINES[:3]), "only what is none may be other bytes"


def test_a_line_vouches_for_no_more_whole_lines_than_there_are():
    """One that is damaged was none of the torn bytes, also where nothing that follows needs it."""
    lost = to_text(Tiled(1, 2))
    content = [to_text(BEGUN), lost, lost[:9] + to_text(LINES[0], 2)]
    assert folded(b"".join(content)) == fold([Tiled(1, 2), LINES[0]])
    content[1] = lost.replace(b"2", b"3")
    with pytest.raises(ManifestUnreadable, match="line 2: the line is damaged"):
        folded(b"".join(content))


def test_a_failed_write_takes_back_its_own_bytes_alone(two):
    first, second = two
    disk = Failing("fsync", meanwhile=lambda: second.append(Opened(2, HARDWARE)))
    with files.swapped(disk), pytest.raises(OSError, match="Input/output error"):
        first.append(Committed(1, record(2)))
    assert second.manifest.incarnation == 2
    assert read_manifest(second.path) == second.manifest
    assert second.append(Committed(2, record(len(second.manifest.segments)))) == read_manifest(second.path)


def test_a_line_that_could_neither_be_synced_nor_taken_back_is_committed_by_the_next_try(tmp_path):
    file = written(tmp_path / "manifest.jsonl", LINES[:1])
    with files.swapped(Failing("fsync", "truncate")), pytest.raises(OSError, match="Input/output error"):
        file.append(LINES[1])
    with files.swapped(Failing("fsync")), pytest.raises(OSError, match="Input/output error"):
        file.append(LINES[1])
    assert file.append(LINES[1]) == fold(LINES[:2])
    assert file.append(LINES[2]) == read_manifest(file.path) == fold(LINES[:3])


def test_reading_again_reads_only_what_is_new(tmp_path):
    path = tmp_path / "manifest.jsonl"
    file, reader = ManifestFile.create(path, BEGUN), ManifestReader(path)
    for count, line in enumerate(LINES, 1):
        file.append(line)
        assert reader.read() == fold(LINES[:count])
        with path.open("ab") as torn:
            torn.write(to_text(LINES[count - 1])[:9])
        assert reader.read() == fold(LINES[:count]), "what is not whole is not there"
        os.truncate(path, path.stat().st_size - 9)
    file.close()
    os.truncate(path, path.stat().st_size - len(to_text(LINES[-1])))
    assert reader.read() == fold(LINES[:-1]), "a line was taken back"
    path.unlink()
    ManifestFile.create(path, replace(BEGUN, submission="another")).close()
    assert reader.read().begun.submission == "another", "another file is there"


HUGE = [10**9, 10**18, 10**30, -1, 1.5, True, "9" * 5000, float("inf")]


@pytest.mark.parametrize("number", HUGE, ids=lambda number: f"{number}"[:8])
@pytest.mark.parametrize("at", [0, 1, 3, 8, 10, 13, 14], ids=lambda at: [BEGUN, *LINES][at].kind)
def test_a_number_out_of_its_range_is_one_clear_error(at, number, tmp_path):
    """Readers of a manifest loop over its numbers, and add them up."""
    line = [BEGUN, *LINES][at]
    values = json.loads(to_text(line))
    del values["crc"]
    places = [(values, key) for key in values]
    for at, key in places:
        if isinstance(at[key], dict) and key not in ("statistics", "provenance", "digests"):
            places += [(at[key], inner) for inner in at[key]]
    for at, key in [place for place in places if type(place[0][place[1]]) is int and place[1] != "first_frame"]:
        if (key == "seed" and number in (10**9, 10**18)) or (key == "fps" and number == 1.5):
            continue
        right, at[key] = at[key], number
        path = tmp_path / "manifest.jsonl"
        before = [] if line is BEGUN else [BEGUN, *LINES[: LINES.index(line)]]
        path.write_bytes(b"".join(map(to_text, before)) + line_of(values) + to_text(Ended(4, "done")))
        with pytest.raises(ManifestUnreadable, match=f"line {len(before) + 1}: ") as error:
            read_manifest(path)
        assert len(str(error.value)) < 400 + len(str(path))
        at[key] = right


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
