"""Frames to files and back: exact counts, equal bytes, and no half file whatever happens to ffmpeg."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from edit_ray.video.encode import EncodeError, OutputOptions, Patience, encode, join, read_frames
from edit_ray.video.fragments import Part, write_part
from edit_ray.video.hls import StreamFiles
from tests.unit.video_frames import FFMPEG, numbered, shown_by

OPTIONS = OutputOptions(crf=12)


def moving_square(count: int, start: int = 0) -> np.ndarray:
    frames = np.full((count, 48, 64, 3), (40, 60, 90), np.uint8)
    for index in range(count):
        left = 2 + (start + index) % 40
        frames[index, 16:32, left : left + 16] = (220, 120, 30)
    return frames


def parts_of(folder: Path, *lengths: int) -> list[Path]:
    """Placed fragments of a moving square, behind their init."""
    paths, first = [], 0
    for index, count in enumerate(lengths):
        part = Part(f"it's part {index}.m4s", first, count)
        frames = moving_square(count, first)
        write_part(folder, part, encode(frames, fps=16, options=OPTIONS, number=index, first_frame=first))
        paths.append(folder / part.path)
        first += count
    return paths


def test_every_frame_comes_back_nearly_as_it_was(tmp_path):
    frames = moving_square(33)
    (tmp_path / "a.mp4").write_bytes(encode(frames, fps=16, options=OPTIONS))
    back = read_frames(tmp_path / "a.mp4", height=48, width=64)
    assert back.shape == frames.shape
    error = np.abs(back.astype(int) - frames).mean(axis=(1, 2, 3))
    assert error.max() < 2.5, "colours and order survive"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize("what", ["encode", "join", "read_frames"])
def test_an_ffmpeg_that_hangs_is_killed(tmp_path, monkeypatch, what):
    calls = {
        "encode": lambda: encode(moving_square(33), fps=16, options=OPTIONS, patience=Patience(0.5)),
        "join": lambda: join(tmp_path / "init.mp4", parts, tmp_path / "final.mp4", patience=Patience(0.5)),
        "read_frames": lambda: read_frames(tmp_path / "final.mp4", height=48, width=64, patience=Patience(0.5)),
    }
    parts = parts_of(tmp_path, 9) * 100  # more than a pipe takes
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", script(tmp_path / "hangs", "exec sleep 60"))
    began = time.monotonic()
    with pytest.raises(EncodeError, match=r"ffmpeg did nothing for 0.5 s while it worked on .*; it was killed"):
        calls[what]()
    assert time.monotonic() - began < 5


def test_an_ffmpeg_that_works_has_time(tmp_path, monkeypatch):
    """Longer than it may do nothing, and it is heard of meanwhile."""
    busy = "import os, sys, time; end = time.monotonic() + 0.8\nwhile time.monotonic() < end: pass\n"
    slow = f"exec {sys.executable} -c '{busy}os.execv(sys.argv[1], sys.argv[1:])' {FFMPEG} " + '"$@"'
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", script(tmp_path / "slow", slow))
    heard, began = [], time.monotonic()
    encode(moving_square(9), fps=16, options=OPTIONS, patience=Patience(0.5, lambda: heard.append(1)))
    assert time.monotonic() - began > 0.5
    assert heard


def test_the_same_frames_give_the_same_bytes(tmp_path):
    assert len({encode(moving_square(9), fps=16, options=OPTIONS) for _ in range(2)}) == 1
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        parts = parts_of(tmp_path / name, 9, 8)
        join(tmp_path / name / "init.mp4", parts, tmp_path / name / "final.mp4", comment="seed: 7")
    for name in ("init.mp4", "it's part 0.m4s", "it's part 1.m4s", "final.mp4"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_joined_parts_have_exactly_their_frames(tmp_path):
    lengths = (33, 24, 24, 1)
    parts, init = parts_of(tmp_path, *lengths), tmp_path / "init.mp4"
    join(init, parts, tmp_path / "all.mp4")
    joined = read_frames(tmp_path / "all.mp4", height=48, width=64)
    assert len(joined) == sum(lengths)
    assert np.array_equal(joined, np.concatenate([read_frames(p, height=48, width=64, init=init) for p in parts]))


@pytest.mark.parametrize("comment", ["", "a=b;c#d\\e\nf, 'g' \"h\" ü 円", "x" * 300_000])
def test_a_joined_file_tells_how_it_was_made(tmp_path, comment):
    parts = parts_of(tmp_path, 2, 2)
    join(tmp_path / "init.mp4", parts, tmp_path / "all.mp4", comment=comment)
    asked = [FFMPEG, "-loglevel", "error", "-i", str(tmp_path / "all.mp4"), "-f", "ffmetadata", "-"]
    said = subprocess.run(asked, capture_output=True, check=True).stdout.decode()
    escaped = comment
    for special in "\\=;#\n":
        escaped = escaped.replace(special, "\\" + special)
    assert (f"comment={escaped}\n" in said) if comment else ("comment" not in said)


def said_of(path: Path) -> str:
    """What ffmpeg says of a file's picture."""
    said = subprocess.run([FFMPEG, "-hide_banner", "-i", str(path)], capture_output=True, text=True, check=False).stderr
    return next(line for line in said.splitlines() if "Video:" in line)


def test_players_are_told_which_colours_these_are(tmp_path):
    parts = parts_of(tmp_path, 9, 8)
    files = StreamFiles(tmp_path, fps=16, longest=9)
    files.rebuild([Part(parts[0].name, 0, 9), Part(parts[1].name, 9, 8)])
    join(tmp_path / "init.mp4", parts, tmp_path / "final.mp4")
    for name in ("stream.mp4", "final.mp4"):
        # One name where matrix, primaries and transfer are alike, else ffmpeg lists all three.
        assert "yuv420p(tv, bt709, progressive)" in said_of(tmp_path / name)


def test_a_run_that_began_without_colour_tags_goes_on_without_them(tmp_path):
    began = (Path(__file__).parents[1] / "data" / "init_before_colour_tags.mp4").read_bytes()
    (tmp_path / "init.mp4").write_bytes(began)
    options = OutputOptions(preset="ultrafast")
    assert not encode(numbered(0, 9), fps=16, options=options).startswith(began)
    data = encode(numbered(0, 9), fps=16, options=options, init=began)
    write_part(tmp_path, Part("0.m4s", 0, 9), data)
    join(tmp_path / "init.mp4", [tmp_path / "0.m4s"], tmp_path / "final.mp4")
    assert shown_by(tmp_path / "final.mp4") == list(range(9))
    with pytest.raises(ValueError, match="encoded in another way"):
        write_part(tmp_path, Part("1.m4s", 9, 9), encode(moving_square(9), fps=16, options=options, init=began))


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(EncodeError, match=r"ffmpeg failed on bad\.mp4"):
        read_frames(tmp_path / "bad.mp4", height=48, width=64)
    with pytest.raises(EncodeError, match=r"ffmpeg failed on all\.mp4"):
        join(tmp_path / "bad.mp4", [], tmp_path / "all.mp4")
    with pytest.raises(FileNotFoundError, match=r"lost\.m4s"):
        join(tmp_path / "bad.mp4", [tmp_path / "lost.m4s"], tmp_path / "all.mp4")


def children(pid: int) -> list[int]:
    """Living processes that `pid` started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def await_child(pid: int, known: Collection[int] = ()) -> int:
    """A child that is none of the known ones, as soon as there is one."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := set(children(pid)) - set(known):
            return found.pop()
        time.sleep(0.001)
    raise AssertionError("no child was started")


def test_a_killed_encoder_is_an_error_and_leaves_nobody():
    frames = np.random.default_rng(0).integers(0, 256, (60, 256, 256, 3), np.uint8)  # seconds of work
    known, killed = children(os.getpid()), []  # such as multiprocessing's, of other tests

    def kill() -> None:
        child = await_child(os.getpid(), known)
        os.kill(child, signal.SIGKILL)
        killed.append(child)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(EncodeError, match="killed by signal 9 while it worked on 60 frames"):
        encode(frames, fps=16, options=OutputOptions(preset="veryslow"))
    killer.join()
    assert not Path(f"/proc/{killed[0]}").exists(), "it was waited for"


ENCODE_NOISE = """
import numpy as np
from edit_ray.video.encode import encode
from edit_ray.video.encode import OutputOptions
frames = np.random.default_rng(0).integers(0, 256, (40, 128, 128, 3), np.uint8)
encode(frames, fps=16, options=OutputOptions(preset="veryslow"))
"""


def test_an_encoder_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", ENCODE_NOISE])
    child = await_child(parent.pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().split(") ")[-1].startswith("Z"):
            break  # ended; whoever adopted it has not looked yet
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_frame_that_was_not_encoded_is_noticed(monkeypatch, tmp_path):
    short = encode(moving_square(4), fps=16, options=OPTIONS)
    (tmp_path / "short.mp4").write_bytes(short)
    script = tmp_path / "ffmpeg"
    script.write_text(f"#!/bin/sh\ncat > {tmp_path}/given\ncat {tmp_path}/short.mp4\n")
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    with pytest.raises(EncodeError, match="given 5 frames and encoded 4"):
        encode(moving_square(5), fps=16, options=OPTIONS)
    (tmp_path / "short.mp4").write_bytes(short[:-100])
    with pytest.raises(EncodeError, match="something else than one fragment"):
        encode(moving_square(4), fps=16, options=OPTIONS)
