"""A run of very many segments: what is done again and again costs what is new, and what is done once is linear.

The short forms compare bytes after few segments and after many. `-m slow -s` measures 100,000, and prints the figures.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
import urllib.request
from dataclasses import replace

import pytest

from edit_ray import files
from edit_ray.actors.local import LocalPool
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.pool import Pointer
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.cli.follow_run import RunStatusReader
from edit_ray.client import LongVideoClient
from edit_ray.config import Config, dump_yaml
from edit_ray.runs.event_log import append_event
from edit_ray.runs.ids import MAX_SEGMENTS
from edit_ray.runs.manifest import Committed
from edit_ray.runs.manifest_lines import to_text
from tests.unit.test_manifest import record

FIGURES = {f"a_figure_{number}_s": 1.2345 * number for number in range(30)}  # as many as a segment has
FRAGMENT = b"\0\0\0\x20moof" + bytes(992)
CONFIG = Config.model_validate(
    {
        "model": {"path": "/no/model"},
        "sampling": {"height": 32, "width": 48, "num_frames": 9},
        "video": {"num_segments": MAX_SEGMENTS},
        "prompt_segments": [{"segment": segment, "prompt": f"scene {segment}"} for segment in range(0, 100_000, 100)],
        "engine": {"max_ahead": 1, "idle_exit_s": 3600},
        "metrics": {"enabled": False},
    }
)
RECOVERY_S, STATUS_S, CPU_SHARE, POLL_S = 3, 0.02, 0.02, 1


def run_of(root, count):
    """A run that was at work, with `count` committed segments and their media."""
    spec = RunSpec(f"run-{count}", root, CONFIG, MAX_SEGMENTS)
    folder = spec.folder
    folder.create(dump_yaml(CONFIG), spec.begun("", {"device": "an abacus"})).close()
    spec = RunSpec.of(root, CONFIG, folder.read_manifest())
    folder.init.write_bytes(b"an init")
    with folder.manifest.open("ab") as manifest, folder.events.open("ab") as events:
        events.write(b'{"event": "gpu_actor", "wall": 1.0, "monotonic": 1.0, "worker": 0}\n')
        for index in range(count):
            line = committed(spec, index)
            manifest.write(to_text(line))
            made = {"event": "segment_made", "wall": 1.0, "monotonic": 1.0, "segment": index, "take": 0, "attempt": 0}
            events.write(json.dumps(made | {"plan": spec.residuals_id, "figures": FIGURES}).encode() + b"\n")
            spec.media(index).write_bytes(FRAGMENT)
        os.fsync(manifest.fileno())  # as each line of a real run was
    stream = spec.stream_files()
    stream.rebuild([spec.part(spec.segment(index)) for index in range(count)])
    return spec


def committed(spec, index):
    plan = spec.segment(index)
    about = {"prompt": plan.prompt, "seed": plan.seed, "first_frame": plan.first_frame, "num_frames": plan.num_frames}
    media = spec.folder.relative(spec.media(index))
    about["digests"] = {"latents": "0" * 16, "media": "0" * 16, "init": "0" * 16}
    return Committed(spec.incarnation, replace(record(index), **about, media=media, statistics=FIGURES))


class Instant(LocalPool):
    """GPU actors that make a segment in no time."""

    async def start(self, spec, worker):
        pass

    async def store(self, worker, method, *arguments):
        pass

    async def denoiser(self, worker, method, *arguments):
        return await asyncio.to_thread(getattr(self, method, lambda *_: {}), *arguments)

    def provenance(self, spec):
        return {"device": "an abacus"}

    def progress(self):
        return None

    def prepare_run(self, spec):
        return {"lookback_latents": 0}

    def denoise_segment(self, spec, segment, attempt):
        files.write_atomic(spec.latents(segment.index), b"latents")
        of = {"segment": segment.index, "take": segment.take, "attempt": attempt}
        append_event(spec.folder.events, "segment_made", **of, plan=spec.residuals_id, figures=FIGURES)
        return dict(FIGURES)

    def encode_segment(self, spec, segment):
        files.write_atomic(spec.media(segment.index), FRAGMENT)
        return {"media_xxh3": files.digest_of(FRAGMENT)}


class Counting(files.Disk):
    """Counts the bytes that are read and written."""

    def __init__(self):
        self.bytes = 0

    def read(self, descriptor, parts, offset):
        count = super().read(descriptor, parts, offset)
        self.bytes += count
        return count

    def write(self, descriptor, parts, offset):
        count = super().write(descriptor, parts, offset)
        self.bytes += count
        return count

    def taken(self):
        count, self.bytes = self.bytes, 0
        return count


async def go_on(spec, committed, more, look):
    """The segment scheduler comes back to the run, and `more` segments are made, each when it is asked for.

    Returns what `look` says of the recovery, and of each segment.
    """
    crew = Instant()
    await crew.remember({spec.run_id: Pointer(str(spec.root), 0, begun=True)})
    look()
    scheduler = SegmentSchedulerActor(crew)
    while (status := await scheduler.status(spec.run_id)).state == "waiting":
        await asyncio.sleep(0.1)
    assert status.committed == committed
    recovery, each = look(), []
    for index in range(committed, committed + more):
        assert (await scheduler.wait_segment(spec.run_id, index, 60)).record.index == index
        while (await scheduler.status(spec.run_id)).at_work:
            await asyncio.sleep(0.001)
        each.append(look())
    await scheduler.cancel(spec.run_id)
    while not (await scheduler.wait_segment(spec.run_id, committed + more, 60)).status.ended:
        pass
    return recovery, each


def test_a_segment_costs_no_more_bytes_after_many_than_after_few(tmp_path):
    counts = {}
    for few_or_many in (40, 1000):
        spec, disk = run_of(tmp_path, few_or_many), Counting()
        size = spec.folder.manifest.stat().st_size + spec.folder.events.stat().st_size
        with files.swapped(disk):
            recovery, each = asyncio.run(go_on(spec, few_or_many, 8, disk.taken))
        assert recovery < size + (2 << 20), "the manifest and the event log are read once, the latter's end twice"
        counts[few_or_many] = each
    few, many = (sorted(each)[len(each) // 2] for each in counts.values())
    assert many < few + 200, counts
    # The first also has the playlist and all fragments' sizes; the fragments themselves are not copied again.
    assert counts[1000][0] < 1000 * len(FRAGMENT) / 4


def test_a_look_costs_no_more_after_many_segments_than_after_few(tmp_path):
    costs = []
    for count in (40, 1000):
        spec, disk, each = run_of(tmp_path, count), Counting(), []
        file, status = spec.folder.open(), RunStatusReader(spec.folder, 16)
        client = LongVideoClient(output=tmp_path, connect=False)
        assert status()["committed"] == client.wait_segment(spec.run_id, count - 1).record.index + 1 == count
        tracemalloc.start()
        with files.swapped(disk):
            for index in range(count, count + 9):
                disk.taken(), tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                file.append(committed(spec, index))
                assert status()["committed"] == index + 1
                assert client.wait_segment(spec.run_id, index).record.index == index
                each.append((disk.taken(), tracemalloc.get_traced_memory()[1] - before))
        tracemalloc.stop()
        file.close()
        assert status()["prompts"] == RunStatusReader(spec.folder, 16)()["prompts"]
        costs.append([statistics.median(of) for of in zip(*each, strict=True)])
    (few_bytes, few_memory), (many_bytes, many_memory) = costs
    assert many_bytes < few_bytes + 200
    assert many_memory < few_memory + 8 * 1000, "nothing is copied that holds all segments"


def served(spec):
    """The CPU share of `edit-ray serve` while one viewer looks, who reads the status and the playlist."""
    command = [sys.executable, "-m", "edit_ray.cli", "--output", str(spec.root), "serve", spec.run_id, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            while not (url := server.stdout.readline().strip()).startswith("http"):
                assert server.poll() is None

            def cpu_s():
                with open(f"/proc/{server.pid}/stat") as stat:
                    user, system = stat.read().rpartition(")")[2].split()[11:13]
                return (int(user) + int(system)) / 100

            def look(name):
                with urllib.request.urlopen(url + name) as answer:
                    return answer.read()

            looks = []
            run = json.loads(look("status"))
            before, began = cpu_s(), time.perf_counter()
            for _ in range(30):
                since = time.perf_counter()
                look("status")
                looks.append(time.perf_counter() - since)
                look(run["playlist"])
                time.sleep(POLL_S)
            return (cpu_s() - before) / (time.perf_counter() - began), max(looks)
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.timed
def test_100_000_segments(tmp_path):
    made, times, cpu = MAX_SEGMENTS - 100, [], []
    spec = run_of(tmp_path, made)

    def since_last():
        times.append(time.perf_counter())
        cpu.append(time.process_time())
        return times[-1] - times[-2] if len(times) > 1 else 0

    recovery, (prepare, *each) = asyncio.run(go_on(spec, made, 50, since_last))
    short = run_of(tmp_path, 10)
    _, (_, *early) = asyncio.run(go_on(short, 10, 50, since_last))
    share, look = served(spec)
    figures = {
        "recovery s": recovery,
        "CPU s of it": cpu[1] - cpu[0],
        "first segment s": prepare,
        "a segment ms": 1000 * statistics.median(each),
        "a segment of a short run ms": 1000 * statistics.median(early),
        "status ms": 1000 * look,
        "page CPU %": 100 * share,
        "playlist bytes": (spec.folder.path / "live-0.m3u8").stat().st_size,
    }
    print("\n" + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    assert recovery <= RECOVERY_S
    assert statistics.median(each) < 1.5 * statistics.median(early)
    assert look <= STATUS_S
    assert share <= CPU_SHARE
