"""SIGKILL at any instant: what is told is there, nothing told is taken back, and the next process goes on."""

import random
import signal
import subprocess
import sys

import pytest

from edit_ray.video.encode import OutputOptions, encode
from edit_ray.video.fragments import frames_in
from tests.unit.test_stream_files import has_ended, listed
from tests.unit.video_frames import numbered, shown_by

FRAMES = 8

# Makes segments from the committed one on, in the order of a run: fragment, stream and playlist, manifest. As a run
# does, it first removes what was being written when its predecessor died.
MAKE = """
import sys
from pathlib import Path
from edit_ray.video.fragments import Part, write_part
from edit_ray.video.hls import StreamFiles
folder, count, frames = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
encoded = (folder / "encoded").read_bytes()
time = encoded.index(b"tfdt") + 8
parts = [Part(f"segments/{index:05d}-t0.m4s", index * frames, frames) for index in range(count)]
committed = folder / "committed"
files = StreamFiles(folder, fps=16, longest=frames)
for draft in folder.rglob(".*.part"):
    draft.unlink()
begin = len(committed.read_text()) if committed.exists() else 0
files.rebuild(parts[:begin])
print("ready", flush=True)
for index in range(begin, count):
    moved = encoded[:time] + (index * frames * 1000).to_bytes(8, "big") + encoded[time + 8:]
    write_part(folder, parts[index], moved)
    files.append(parts[index])
    with committed.open("a") as manifest:
        manifest.write("x")
files.end()
"""


def kill_again_and_again(folder, count: int, seed: int) -> tuple[int, int]:
    """Makes a video of so many segments by processes that are killed at random; how many died, and how many in work."""
    (folder / "segments").mkdir()
    (folder / "encoded").write_bytes(encode(numbered(0, FRAMES), fps=16, options=OutputOptions(preset="ultrafast")))
    chance, seen, killed, at_work = random.Random(seed), "", 0, 0
    while True:
        command = [sys.executable, "-c", MAKE, str(folder), str(count), str(FRAMES)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as maker:
            assert maker.stdout.readline() == "ready\n"
            try:
                maker.wait(chance.uniform(0, 0.1 + 0.01 * killed))
            except subprocess.TimeoutExpired:
                maker.kill()
        assert maker.returncode in (0, -signal.SIGKILL)
        committed = len((folder / "committed").read_text()) if (folder / "committed").exists() else 0
        if (folder / "live.m3u8").exists():
            text = (folder / "live-0.m3u8").read_text()
            assert text.startswith(seen), "a playlist only grows"
            seen = text[: text.index("\n", text.rindex("\nsegments/") + 1)]  # what follows may be half an entry
            assert committed <= len(listed(folder)) <= committed + 1
            for name in listed(folder)[-2:]:
                assert frames_in((folder / name).read_bytes()) == FRAMES
        if maker.returncode == 0:
            return killed, at_work
        killed += 1
        at_work += 0 < committed < count


def check(folder, count: int) -> None:
    """The files tell of the same segments, each of them, and nothing half-written is left."""
    names = ["init.mp4", *(f"segments/{index:05d}-t0.m4s" for index in range(count))]
    assert (folder / "stream.mp4").read_bytes() == b"".join((folder / name).read_bytes() for name in names)
    assert listed(folder) == names[1:]
    assert has_ended(folder)
    assert sorted(path.name for path in folder.glob("live*")) == ["live-0.m3u8", "live.m3u8"]
    assert [path.name for path in folder.rglob(".*")] == []


def test_processes_that_are_killed_leave_a_whole_video(tmp_path):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    killed, _ = kill_again_and_again(tmp_path, 60, seed)
    print(f"{killed} kills")
    check(tmp_path, 60)
    assert len(shown_by(tmp_path / "stream.mp4")) == 60 * FRAMES


@pytest.mark.slow
def test_processes_that_are_killed_fifty_times_leave_a_whole_video(tmp_path):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    killed, at_work = kill_again_and_again(tmp_path, 1500, seed)
    print(f"{killed} kills, {at_work} between the first segment and the last")
    assert at_work >= 20
    check(tmp_path, 1500)
    assert len(shown_by(tmp_path / "stream.mp4")) == 1500 * FRAMES
