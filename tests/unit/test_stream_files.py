"""What plays while it grows: exact frames after every append, the same files after every crash."""

import contextlib
import errno
import functools
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edit_ray.files import make_folder, swapped
from edit_ray.video.encode import OutputOptions, encode
from edit_ray.video.fragments import Part, write_part
from edit_ray.video.hls import StreamFiles
from tests.chaos.power import Power, Recorder, Told
from tests.chaos.power_loss import build
from tests.faults import faulty
from tests.unit.video_frames import HEIGHT, WIDTH, numbered, shown_by

OPTIONS = OutputOptions(preset="ultrafast")
LONGEST = 9


@functools.cache
def encoded(index: int, first_frame: int, num_frames: int, fps: float) -> bytes:
    frames = numbered(first_frame, num_frames)
    return encode(frames, fps=fps, options=OPTIONS, number=index, first_frame=first_frame)


def make_part(folder: Path, index: int, first_frame: int, num_frames: int, take: int = 0, fps: int = 16) -> Part:
    """A segment's fragment whose frames show their numbers."""
    (folder / "segments").mkdir(exist_ok=True)
    part = Part(f"segments/{index:05d}-t{take}.m4s", first_frame, num_frames)
    write_part(folder, part, encoded(index, first_frame, num_frames, fps))
    return part


def make_parts(folder: Path, count: int, files: StreamFiles | None = None) -> list[Part]:
    """Segments in order, appended to `files` if there are any."""
    parts, first = [], 0
    for index in range(count):
        parts.append(make_part(folder, index, first, LONGEST if index == 0 else 8))
        first += parts[-1].num_frames
        if files is not None:
            files.append(parts[-1])
    return parts


def files_of(folder: Path, keep: int | None = None) -> StreamFiles:
    return StreamFiles(folder, fps=16, longest=LONGEST, keep=keep)


def pieces_of(folder: Path, parts: list[Part]) -> bytes:
    return b"".join((folder / name).read_bytes() for name in ("init.mp4", *(part.path for part in parts)))


def paths(parts: list[Part]) -> list[str]:
    return [part.path for part in parts]


def frames_of(*parts: Part) -> list[int]:
    return [frame for part in parts for frame in range(part.first_frame, part.first_frame + part.num_frames)]


def media_playlist(folder: Path) -> Path:
    return folder / (folder / "live.m3u8").read_text().splitlines()[-1]


def listed(folder: Path) -> list[str]:
    return [line for line in media_playlist(folder).read_text().splitlines() if not line.startswith("#")]


def has_ended(folder: Path) -> bool:
    return media_playlist(folder).read_text().endswith("#EXT-X-ENDLIST\n")


@pytest.fixture
def files(tmp_path):
    return files_of(tmp_path)


def test_the_stream_plays_after_every_segment_with_exactly_its_frames(files, tmp_path):
    files.end()
    assert list(tmp_path.iterdir()) == [], "nothing is there before the first segment"
    parts = make_parts(tmp_path, 5)
    for count, part in enumerate(parts, 1):
        for _ in range(2):  # the second time changes nothing
            files.append(part)
        for wrong in parts[count + 1 :]:
            with pytest.raises(ValueError, match=f"begins at frame {wrong.first_frame}, the next one is frame"):
                files.append(wrong)
        assert shown_by(tmp_path / "stream.mp4") == frames_of(*parts[:count])
        assert listed(tmp_path) == paths(parts[:count])
    files.end()
    assert has_ended(tmp_path)
    assert shown_by(tmp_path / "live.m3u8") == frames_of(*parts)
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_a_segment_encoded_in_another_way_is_refused(tmp_path):
    make_part(tmp_path, 0, 0, 9)
    with pytest.raises(ValueError, match=r"00001-t0\.m4s is encoded in another way"):
        make_part(tmp_path, 1, 9, 8, fps=24)
    assert not (tmp_path / "segments" / "00001-t0.m4s").exists()


def test_a_torn_write_is_mended_by_the_next_one(files, tmp_path):
    parts = make_parts(tmp_path, 3)
    files.append(parts[0])
    with (tmp_path / "stream.mp4").open("ab") as stream:
        stream.write((tmp_path / parts[1].path).read_bytes() * 2 + b"and more")
    files.append(parts[1])
    assert (tmp_path / "stream.mp4").read_bytes() == pieces_of(tmp_path, parts[:2])
    assert shown_by(tmp_path / "stream.mp4") == frames_of(*parts[:2])
    (tmp_path / "stream.mp4").unlink()
    files.append(parts[2])
    assert shown_by(tmp_path / "stream.mp4") == frames_of(*parts)


@pytest.mark.parametrize("done", [0, 40, 400, None])
def test_a_reader_in_the_midst_of_an_append_sees_the_segments_before(files, tmp_path, done):
    """`done` bytes of the fragment's rest are written when somebody reads, or all of them."""
    parts, seen = make_parts(tmp_path, 3), []

    def in_two(write, descriptor, parts, offset):
        if not seen and os.readlink(f"/proc/self/fd/{descriptor}").endswith("/stream.mp4"):
            if done != 0:
                write(descriptor, [parts[0][:done]], offset)
            seen.append(shown_by(tmp_path / "stream.mp4"))
        return write(descriptor, parts, offset)

    files.append(parts[0])
    with swapped(faulty(write=in_two)):
        files.append(parts[1])
    files.append(parts[2])
    assert seen == [frames_of(parts[0])]
    assert shown_by(tmp_path / "stream.mp4") == frames_of(*parts)


def test_a_playlist_that_somebody_has_cut_is_whole_after_the_next_segment(files, tmp_path):
    parts = make_parts(tmp_path, 3)
    for part in parts[:2]:
        files.append(part)
    os.truncate(media_playlist(tmp_path), 20)
    files.append(parts[2])
    assert listed(tmp_path) == paths(parts)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("done", [0, 5, 20, 40, 46, None])
def test_a_reader_in_the_midst_of_an_append_finds_whole_entries_in_the_playlist(files, tmp_path, done, broken):
    """`done` bytes of the entry are written when somebody reads, or all but what is written last; or it ends there."""
    parts, seen = make_parts(tmp_path, 4), []

    def in_two(write, descriptor, parts, offset):
        if seen or not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".m3u8"):
            return write(descriptor, parts, offset)
        count = write(descriptor, [parts[0][:done]], offset) if done != 0 else 0
        seen.append(listed(tmp_path))
        if broken:
            raise OSError(errno.EIO, "broken")
        return count if done is None else count or write(descriptor, parts, offset)

    for part in parts[:2]:
        files.append(part)
    told = media_playlist(tmp_path).read_bytes()
    with swapped(faulty(write=in_two)):
        for _ in range(1 + broken):
            with contextlib.suppress(OSError):
                files.append(parts[2])
    files.append(parts[3])
    assert seen == [paths(parts[:2])]
    assert listed(tmp_path) == paths(parts)
    assert media_playlist(tmp_path).read_bytes().startswith(told)
    assert media_playlist(tmp_path).name == "live-0.m3u8", "nobody has read what was not whole"
    again = files_of(tmp_path)
    again.rebuild(parts)
    again.end()
    assert media_playlist(tmp_path).name == "live-0.m3u8"


def test_a_folder_that_is_whole_is_not_copied_when_its_run_goes_on(files, tmp_path):
    parts = make_parts(tmp_path, 4, files)
    stream = tmp_path / "stream.mp4"
    inode, content = stream.stat().st_ino, stream.read_bytes()
    again = files_of(tmp_path)
    again.rebuild(parts[:3])
    assert shown_by(stream) == frames_of(*parts[:3])
    again.append(parts[3])
    assert (stream.stat().st_ino, stream.read_bytes()) == (inode, content)
    stream.write_bytes(content[:1000] + b"x" + content[1001:])
    again.rebuild(parts, anew=True)
    assert stream.read_bytes() == content
    stream.write_bytes(content[:-1])
    again.rebuild(parts)
    assert stream.read_bytes() == content


@pytest.mark.parametrize("keep", [None, 2])
def test_a_full_disk_changes_nothing_that_was_told(tmp_path, monkeypatch, keep):
    files = files_of(tmp_path, keep)
    parts = make_parts(tmp_path, 4)
    files.rebuild(parts[:2])
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        files.append(parts[2])
    assert listed(tmp_path) == paths(parts[:2])
    assert [path.name for path in tmp_path.rglob(".*")] == [], "no draft stays"
    monkeypatch.setattr(os, "fsync", real)
    for part in parts[2:]:
        files.append(part)
    kept = parts if keep is None else parts[-keep:]
    assert shown_by(tmp_path / "stream.mp4") == frames_of(*kept)
    assert listed(tmp_path) == paths(kept)


def told(folder: Path) -> dict[str, str]:
    """What the playlist that names the others says of the newest."""
    said = (folder / "live.m3u8").read_text().splitlines()[2].partition(":")[2]
    return dict(re.findall(r'([A-Z-]+)="?([^",]+)"?', said))


@pytest.mark.parametrize("keep", [None, 2])
def test_players_are_told_the_peak_bit_rate_of_all_that_is_there_and_what_it_is(tmp_path, keep):
    first = make_parts(tmp_path, 3)
    noise = np.random.default_rng(0).integers(0, 256, (8, HEIGHT, WIDTH, 3), np.uint8)
    loud = Part("segments/00003-t0.m4s", 25, 8)
    write_part(tmp_path, loud, encode(noise, fps=16, options=OPTIONS, number=3, first_frame=25))
    quiet = [make_part(tmp_path, index, 33 + 8 * (index - 4), 8) for index in (4, 5, 6)]
    parts = [*first, loud, *quiet]
    rates = [8 * (tmp_path / part.path).stat().st_size * 16 / part.num_frames for part in parts]
    assert rates[3] > 2 * rates[0]

    files = files_of(tmp_path, keep)
    for index, part in enumerate(parts):
        files.append(part)
        assert int(told(tmp_path)["BANDWIDTH"]) == math.ceil(max(rates[: index + 1]))
    files.end()
    undisturbed = (tmp_path / "live.m3u8").read_text()
    again = files_of(tmp_path, keep)
    again.rebuild(parts if keep is None else parts[-keep:], 0 if keep is None else len(parts) - keep)
    again.end()
    assert (tmp_path / "live.m3u8").read_text() == undisturbed

    assert told(tmp_path)["RESOLUTION"] == f"{WIDTH}x{HEIGHT}"
    assert told(tmp_path)["FRAME-RATE"] == "16.000"
    # RFC 6381: avc1. and the three bytes that the sequence parameter set begins with, behind its NAL header.
    init = (tmp_path / "init.mp4").read_bytes()
    profile = init[init.index(b"avcC") + 13 :][:3]
    assert told(tmp_path)["CODECS"] == f"avc1.{profile.hex()}"


@pytest.mark.parametrize("harm", [lambda init: b"init", lambda init: b"", lambda init: init[:-300]])
def test_a_damaged_init_keeps_no_segment_from_being_told_of(files, tmp_path, harm):
    parts, path = make_parts(tmp_path, 2), tmp_path / "init.mp4"
    files.append(parts[0])
    whole, said = path.read_bytes(), told(tmp_path)
    path.write_bytes(harm(whole))
    again = files_of(tmp_path)
    again.rebuild(parts[:1])
    again.append(parts[1])
    assert listed(tmp_path) == paths(parts)
    assert list(told(tmp_path)) == ["BANDWIDTH", "FRAME-RATE"]
    with pytest.raises(ValueError, match=r"00002-t0\.m4s is encoded in another way"):
        make_part(tmp_path, 2, 17, 8)
    path.write_bytes(whole)
    again.rebuild(parts)
    assert told(tmp_path) | {"BANDWIDTH": said["BANDWIDTH"]} == said, "what is mended is told again"


def test_after_a_crash_the_playlist_never_shrinks(files, tmp_path):
    """Killed between the playlist and the manifest: a viewer has seen a segment that the manifest does not know."""
    parts = make_parts(tmp_path, 3, files)
    told = media_playlist(tmp_path).read_bytes()
    again = files_of(tmp_path)
    again.rebuild(parts[:2])
    assert media_playlist(tmp_path).read_bytes() == told
    assert shown_by(tmp_path / "stream.mp4") == frames_of(*parts[:2])
    again.append(parts[2])
    assert media_playlist(tmp_path).read_bytes() == told
    assert media_playlist(tmp_path).name == "live-0.m3u8"
    assert shown_by(tmp_path / "stream.mp4") == frames_of(*parts)


def test_a_reroll_and_an_extension_begin_a_new_playlist_and_keep_the_old(files, tmp_path):
    parts = make_parts(tmp_path, 3, files)
    files.end()
    old = media_playlist(tmp_path).read_bytes()
    files.rebuild(parts[:1])
    assert media_playlist(tmp_path).name == "live-0.m3u8", "the old take is shown until there is another"
    second = make_part(tmp_path, 1, 9, 8, take=1)
    files.append(second)
    assert media_playlist(tmp_path).name == "live-1.m3u8"
    assert listed(tmp_path) == [parts[0].path, second.path]
    assert (tmp_path / "live-0.m3u8").read_bytes() == old
    assert shown_by(tmp_path / "live-0.m3u8") == frames_of(*parts)
    files.end()
    files.rebuild([parts[0], second])
    assert has_ended(tmp_path), "a finished video stays finished until it is extended"
    third = make_part(tmp_path, 2, 17, 8, take=1)
    files.append(third)
    files.end()
    assert media_playlist(tmp_path).name == "live-2.m3u8"
    assert shown_by(tmp_path / "live.m3u8") == shown_by(tmp_path / "stream.mp4") == frames_of(parts[0], second, third)


def test_the_latest_segments_of_an_endless_video(tmp_path):
    files = files_of(tmp_path, 3)
    files.rebuild([])
    parts = make_parts(tmp_path, 6)
    for count, part in enumerate(parts, 1):
        files.append(part)
        kept = parts[max(0, count - 3) : count]
        assert listed(tmp_path) == paths(kept)
        assert f"#EXT-X-MEDIA-SEQUENCE:{count - len(kept)}\n" in media_playlist(tmp_path).read_text()
        assert shown_by(tmp_path / "stream.mp4") == frames_of(*kept)
    again = files_of(tmp_path, 3)
    again.rebuild(parts[3:5], first=3)
    again.append(parts[5])
    again.end()
    assert listed(tmp_path) == paths(parts[3:])
    assert shown_by(tmp_path / "live.m3u8") == frames_of(*parts[3:])
    assert media_playlist(tmp_path).name == "live-0.m3u8"


class Histories(RuleBasedStateMachine):
    """Segments, crashes, re-rolls and ends in any order; a playlist that was once read only ever grows."""

    folder: Path  # set by the test, with fragments of every segment and take in it
    parts: dict[tuple[int, int], Part]
    ended: list[int]  # how many segments each video had that was ended

    @initialize()
    def begin(self):
        for path in self.folder.iterdir():
            if path.suffix == ".m3u8" or path.name == "stream.mp4":
                path.unlink()
        self.told: list[Part] = []
        self.take = 0
        self.seen: dict[str, str] = {}
        self.start([])

    def start(self, parts):
        self.files = files_of(self.folder)
        self.files.rebuild(parts)
        self.told = list(parts)

    @precondition(lambda self: len(self.told) < 4)
    @rule()
    def next_segment(self):
        self.told.append(self.parts[len(self.told), self.take])
        self.files.append(self.told[-1])
        assert listed(self.folder)[: len(self.told)] == paths(self.told)

    @precondition(lambda self: self.told)
    @rule()
    def same_segment(self):
        self.files.append(self.told[-1])

    @rule(uncommitted=st.integers(0, 1))
    def crash(self, uncommitted):
        self.start(self.told[: len(self.told) - uncommitted])

    @precondition(lambda self: self.take < 2)
    @rule(data=st.data())
    def reroll(self, data):
        self.take += 1
        self.start(self.told[: data.draw(st.integers(0, len(self.told)))])

    @rule()
    def end(self):
        self.files.end()
        if self.told:
            assert has_ended(self.folder)
            assert listed(self.folder) == paths(self.told)
        self.ended.append(len(self.told))

    @invariant()
    def a_viewer_never_loses_what_was_told(self):
        for path in self.folder.glob("live-*.m3u8"):
            text = path.read_text()
            assert text.startswith(self.seen.get(path.name, ""))
            self.seen[path.name] = text

    @invariant()
    def the_stream_is_its_fragments(self):
        stream = self.folder / "stream.mp4"
        if not self.told:
            assert not stream.exists()
        else:
            assert stream.read_bytes() == pieces_of(self.folder, self.told)


@pytest.mark.usefixtures("unsynced")
def test_any_history_leaves_files_that_agree(tmp_path):
    parts = {}
    for take in range(3):
        for index in range(4):
            parts[index, take] = make_part(tmp_path, index, index * 8, 8, take)
    ended = []
    machine = type("Bound", (Histories,), {"folder": tmp_path, "parts": parts, "ended": ended})
    given = {"max_examples": 60, "stateful_step_count": 15, "deadline": None, "database": None, "derandomize": True}
    checks = settings(**given, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=checks)
    assert set(ended) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("not_committed", [0, 1])
@pytest.mark.parametrize("keep", [None, 2])
def test_what_has_ended_is_whole_after_a_loss_of_power(tmp_path, keep, not_committed):
    recorder, power = Recorder(tmp_path), Power()
    with swapped(recorder):
        files = files_of(tmp_path, keep)
        make_folder(tmp_path / "segments")
        parts = make_parts(tmp_path, 4)
        files.rebuild([])
        for part in parts:
            files.append(part)
        if not_committed:
            files.rebuild(parts[2:3] if keep else parts[:3], 2 if keep else 0)
        files.end()
    for operation in recorder.operations:
        power.follow(operation)
    _, there = power.lost(random.Random(), share=0.0)
    assert there["stream.mp4"] == (tmp_path / "stream.mp4").read_bytes()
    assert shown_by(tmp_path / "stream.mp4")[-1] == frames_of(*parts[: 4 - not_committed])[-1]
    assert there[media_playlist(tmp_path).name].endswith(b"#EXT-X-ENDLIST\n")


@pytest.mark.usefixtures("unsynced")
def test_whatever_a_loss_of_power_leaves_goes_on_as_it_was(tmp_path):
    """The playlist too: what nobody can have read whole begins no other one."""
    (tmp_path / "made").mkdir()
    recorder, power, luck, told = Recorder(tmp_path / "made"), Power(), random.Random(3), 0
    with swapped(recorder):
        make_folder(tmp_path / "made" / "segments")
        parts = make_parts(tmp_path / "made", 4)
        files = files_of(tmp_path / "made")
        for count, part in enumerate(parts, 1):
            files.append(part)
            recorder.tell(count)
    for operation in recorder.operations:
        power.follow(operation)
        if isinstance(operation, Told):
            told = operation.what
        for _ in range(6 if told else 0):
            folder = tmp_path / "lost"
            build(folder, power.lost(luck)[1])
            again = files_of(folder)
            again.rebuild(parts[:told])
            assert (folder / "stream.mp4").read_bytes() == pieces_of(tmp_path / "made", parts[:told])
            assert listed(folder)[:told] == paths(parts[:told])
            assert media_playlist(folder).name == "live-0.m3u8"
