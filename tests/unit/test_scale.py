"""A run of very many segments: what is done again and again costs what is new, and all at once is linear.

The short form compares two lengths. `-m slow -s` measures 100,000 segments, and prints the figures.
"""

import statistics
import time
from dataclasses import replace

import pytest

from edit_ray.cli.serve import RunStatusReader
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Committed
from edit_ray.runs.manifest_file import to_text
from edit_ray.runs.numbers import MAX_SEGMENTS
from edit_ray.video.stream_files import Part, StreamFiles
from tests.unit.test_manifest import BEGUN, record

FIGURES = {f"a_figure_{number}_s": 1.2345 * number for number in range(30)}  # as many as a segment has
RECOVERY_S, STATUS_S, CPU_SHARE, POLL_S = 3, 0.02, 0.02, 1


def committed(index):
    prompt = f"scene {index // 100}"
    return Committed(1, replace(record(index), prompt=prompt, statistics=FIGURES, digests={"media": "0" * 16}))


def run_of(root, count):
    """The folder of a run with so many committed segments, without their media."""
    folder = RunFolder(root, f"run-{count}")
    folder.create("", replace(BEGUN, run_id=folder.run_id, num_segments=MAX_SEGMENTS)).close()
    with folder.manifest.open("ab") as file:
        file.writelines(to_text(committed(index)) for index in range(count))
    return folder


def cpu_s(work):
    began = time.process_time()
    work()
    return time.process_time() - began


def recover(folder):
    file = folder.open()
    file.close()
    return file.manifest


def test_what_a_run_costs_does_not_grow_with_its_length(tmp_path):
    few, many = run_of(tmp_path, 1000), run_of(tmp_path, 8000)
    assert len(recover(many).segments) == 8000
    once = [min(cpu_s(lambda folder=folder: recover(folder)) for _ in range(3)) for folder in (few, many)]
    assert once[1] < 8 * once[0] * 2.5, "a fold that copies what is there takes 64 times as long"

    def again(folder):
        """The median CPU time of a commit and of the page's look at it."""
        file, status, times = folder.open(), RunStatusReader(folder, 16), []
        first = len(file.manifest.segments)
        assert status()["committed"] == first
        for index in range(first, first + 30):
            times.append(cpu_s(lambda index=index: (file.append(committed(index)), status())))
            assert status()["committed"] == index + 1
        assert status()["prompts"] == RunStatusReader(folder, 16)()["prompts"]
        file.close()
        return statistics.median(times)

    assert again(many) < 3 * again(few), "a look at all that is there takes 8 times as long"


@pytest.mark.slow
@pytest.mark.timed
def test_100_000_segments(tmp_path):
    folder = run_of(tmp_path, MAX_SEGMENTS - 100)
    began = time.perf_counter()
    file = folder.open()
    recovery = time.perf_counter() - began
    status, looks, commits = RunStatusReader(folder, 16), [], []
    status()
    cpu = time.process_time()
    for index in range(MAX_SEGMENTS - 100, MAX_SEGMENTS):
        began = time.perf_counter()
        file.append(committed(index))
        commits.append(time.perf_counter() - began)
        began = time.perf_counter()
        assert status()["committed"] == index + 1
        looks.append(time.perf_counter() - began)
    cpu = (time.process_time() - cpu) / 100
    file.close()
    (folder.path / "segments" / "00000-t0.m4s").write_bytes(b"x")
    stream = StreamFiles(folder.path, fps=16, longest=33)
    parts = [Part("segments/00000-t0.m4s", 33 * index, 33) for index in range(MAX_SEGMENTS)]
    (folder.path / "init.mp4").write_bytes(b"i")
    stream.rebuild(parts[:-20])
    began = time.perf_counter()
    for part in parts[-20:]:
        stream.append(part)
    playlist = (time.perf_counter() - began) / 20
    figures = {
        "recovery s": recovery,
        "status ms": 1000 * max(looks),
        "commit ms": 1000 * statistics.median(commits),
        "page CPU %": 100 * cpu / POLL_S,
        "playlist ms": 1000 * playlist,
    }
    print("\n" + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    assert recovery <= RECOVERY_S
    assert max(looks) <= STATUS_S
    assert cpu / POLL_S <= CPU_SHARE
