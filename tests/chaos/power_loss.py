"""Power is lost after every operation of a run's life: what was committed is there, and the rest is made again."""

import asyncio
import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

from edit_ray import files
from edit_ray.actors.local import LocalPool
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.errors import UnknownRun
from edit_ray.runs.event_log import read_events
from edit_ray.runs.folder import RunFolder
from edit_ray.video.hls import newest_playlist
from tests.chaos.memory import remembered
from tests.chaos.power import Power, Recorder, Told
from tests.removal import remove_folder

RUN = "one"
SEGMENTS = 3


@dataclass
class History:
    """A run's life as it was recorded, and what it has made: files by path, `final.mp4` by its place in that life."""

    config: object
    operations: list
    made: dict[str, bytes] = field(default_factory=dict)
    finals: dict[tuple[int, int], bytes] = field(default_factory=dict)


def end_of(scheduler, crew_run=RUN):
    async def wait():
        async with asyncio.timeout(300):
            while not (status := (await scheduler.wait_segment(crew_run, 10**6, 5)).status).ended:
                pass
        return status

    return wait()


async def record(root: Path, config) -> History:
    """A run that is cancelled and resumed, extended, and made again from its last segment but one on."""
    recorder, folder = Recorder(root), RunFolder(root, RUN)
    history = History(config, recorder.operations)
    crew = LocalPool()

    async def follow(scheduler):
        """Until the run has ended: whoever waits for a segment relies on it."""
        takes = len(folder.read_manifest().takes)
        index = 0
        while (reply := await scheduler.wait_segment(RUN, index, 60)).record is not None:
            recorder.tell(("segment", reply.record.index, reply.record.take))
            index += 1
        assert reply.status.ended
        recorder.tell(("manifest", folder.manifest.stat().st_size))
        if reply.status.state == "done":
            history.finals[len(folder.read_manifest().segments), takes] = folder.final.read_bytes()
        return reply.status.state

    with files.swapped(recorder), remembered():
        scheduler = SegmentSchedulerActor(crew)
        await scheduler.submit(RUN, config.model_dump(mode="json"), str(root), str(root), "mine")
        recorder.tell(("manifest", 1))
        await scheduler.wait_segment(RUN, 0, 60)
        await scheduler.cancel(RUN)
        assert await follow(scheduler) == "cancelled"
        await scheduler.resume(RUN, str(root), False)
        assert await follow(scheduler) == "done"
        await scheduler.extend(RUN, str(root), 1, False)
        assert await follow(scheduler) == "done"
        await scheduler.reroll(RUN, str(root), SEGMENTS - 1, 77, None, False)
        assert await follow(scheduler) == "done"
    await crew.end()
    kept = [path for name in ("latents", "segments") for path in (folder.path / name).iterdir()]
    for path in (*kept, folder.init, folder.manifest):
        history.made[path.relative_to(root).as_posix()] = path.read_bytes()
    return history


def wrecks(history: History, each: int, luck: random.Random, only=None):
    """For every prefix of the operations, so many different disks: what was promised, and the files."""
    power, promised = Power(), []
    for number, operation in enumerate(history.operations):
        power.follow(operation)
        if isinstance(operation, Told):
            promised = [*promised, operation.what]
        elif only is None or number in only:
            seen = set()
            for _ in range(each):
                choices, found = power.lost(luck)
                if choices not in seen:
                    seen.add(choices)
                    yield number, promised, found


def build(root: Path, found: dict[str, bytes | None]) -> None:
    """Makes the files; there is nothing else under `root`."""
    remove_folder(root)
    root.mkdir(parents=True)
    for path, content in found.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def check(root: Path, history: History, promised: list) -> str:
    """What opening the folder finds: everything promised, with the right bytes. Returns the run's state."""
    folder = RunFolder(root, RUN)
    try:
        file = folder.open()
    except UnknownRun:
        assert not promised, f"{promised} was lost with its run"
        return "unknown"
    try:
        manifest, content = file.manifest, folder.manifest.read_bytes()
    finally:
        file.close()
    whole = history.made[f"{RUN}/manifest.jsonl"]
    assert whole.startswith(content), "the manifest has lines that nobody wrote"
    records = [*manifest.segments, *manifest.earlier_takes]
    for kind, *what in promised:
        if kind == "manifest":
            assert len(content) >= what[0], "lines of the manifest were lost"
        else:
            assert tuple(what) in {(record.index, record.take) for record in records}, f"segment {what} was lost"
    for record in records:
        for path in (record.latents, record.media):
            assert (folder.path / path).read_bytes() == history.made[f"{RUN}/{path}"], path
    assert not records or folder.init.read_bytes() == history.made[f"{RUN}/init.mp4"]
    spec = RunSpec.of(root, history.config, manifest)
    if manifest.end is None:
        stream = spec.stream_files()
        stream.rebuild([spec.part(spec.segment(index)) for index in range(len(manifest.segments))], 0)
    check_playing(folder, manifest, history)
    if manifest.state == "done":
        assert folder.final.read_bytes() == history.finals[len(manifest.segments), len(manifest.takes)], "final.mp4"
    assert all(event["event"] for event in read_events(folder.events))
    assert [path.name for path in folder.path.rglob(".*")] == [], "no draft stays"
    return manifest.state


def check_playing(folder, manifest, history) -> None:
    """`stream.mp4` and the newest playlist have exactly what is committed."""
    media = [record.media for record in manifest.segments]
    if not media:
        return
    wanted = b"".join(history.made[f"{RUN}/{path}"] for path in ("init.mp4", *media))
    assert (folder.path / "stream.mp4").read_bytes() == wanted, "stream.mp4"
    lines = (folder.path / newest_playlist(folder.path)).read_text().splitlines()
    named = [line for line in lines if line and not line.startswith("#")]
    assert named[: len(media)] == media, "the playlist"
    if manifest.end is not None:
        assert (named, lines[-1]) == (media, "#EXT-X-ENDLIST"), "the playlist's end"


async def go_on(crew, root: Path, history: History) -> None:
    """Resumes what is there, or submits it again where nothing is, and compares everything."""
    scheduler, folder = SegmentSchedulerActor(crew), RunFolder(root, RUN)
    try:
        folder.read_manifest()
        await scheduler.resume(RUN, str(root), False)
    except UnknownRun:
        await scheduler.submit(RUN, history.config.model_dump(mode="json"), str(root), str(root), "mine")
    if not (await asyncio.to_thread(folder.read_manifest)).end:
        status = await end_of(scheduler)
        assert status.state == "done", status.error
    manifest = folder.read_manifest()
    assert manifest.state == "done"
    for record in manifest.segments:
        for path in (record.latents, record.media):
            assert (folder.path / path).read_bytes() == history.made[f"{RUN}/{path}"], path
    check_playing(folder, manifest, history)
    assert folder.final.read_bytes() == history.finals[len(manifest.segments), len(manifest.takes)]
    assert [path.name for path in folder.path.rglob(".*")] == []


@dataclass
class Counts:
    pairs: int = 0
    disks: int = 0
    resumed: int = 0
    states: dict[str, int] = field(default_factory=dict)


def lose_power(root: Path, history: History, *, each: int, seed: int, resumes: int = 0, only=None) -> Counts:
    """Checks so many disks for every prefix; `resumes` of them, drawn at random, are finished as well."""
    luck, counts, seen = random.Random(seed), Counts(), set()
    sample = []
    for number, promised, found in wrecks(history, each, luck, only):
        counts.pairs += 1
        name = hashlib.blake2b(repr((len(promised), sorted(found.items()))).encode()).digest()
        if name in seen:
            continue
        seen.add(name)
        counts.disks += 1
        build(root, found)
        try:
            state = check(root, history, promised)
        except Exception as error:
            error.add_note(
                f"after operation {number} of {len(history.operations)}: {history.operations[number]!r:.200}"
            )
            raise
        counts.states[state] = counts.states.get(state, 0) + 1
        if len(sample) < resumes:
            sample.append((number, found))
        elif (place := luck.randrange(counts.disks)) < resumes:
            sample[place] = (number, found)
    asyncio.run(finish(root, history, sample))
    counts.resumed = len(sample)
    return counts


async def finish(root, history, sample) -> None:
    crew = LocalPool()
    with remembered():
        for number, found in sample:
            build(root, found)
            try:
                await go_on(crew, root, history)
            except Exception as error:
                error.add_note(f"resumed after operation {number}: {history.operations[number]!r:.200}")
                raise
    await crew.end()
