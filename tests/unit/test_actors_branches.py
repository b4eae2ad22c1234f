"""A branch has the bytes of a run whose storyboard said the same from the start, and its source stays as it was."""

import asyncio
import contextlib
import errno
import itertools
import random
from collections import Counter

import pytest

from edit_ray import files
from edit_ray.actors.folder_state import all_damage_of
from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.errors import ConfigError, RunDamaged, RunExists, UnknownRun
from edit_ray.runs.folder import RunFolder
from tests.chaos.power import Recorder
from tests.chaos.power_loss import History, build, wrecks
from tests.chaos.storm import die
from tests.runs_here import (
    PLAIN_AND_REUSE,
    REUSE,
    SEGMENTS,
    SHORT,
    WARM,
    check_same,
    config_for,
    done,
    end_of,
    everything,
    made,
    submit,
    told_from_the_start,
)


class Died(BaseException):
    """The process is killed."""


class DyingAt(files.Disk):
    """The process dies at operation number `at` on a folder that is being made, or on the folder of runs.

    Then it does nothing any more; `end` is what the kernel does for it.
    """

    def __init__(self, root, at):
        self.root, self.left, self.dead, self._open = root, at, False, set()

    def _live(self, path):
        if path is not None and (path == self.root or path.relative_to(self.root).parts[0].startswith(".branch")):
            self.left -= 1
            self.dead |= self.left < 0
        if self.dead:
            raise Died

    def open(self, path, flags):
        self._live(path if path.is_relative_to(self.root) else None)
        self._open.add(descriptor := super().open(path, flags))
        return descriptor

    def close(self, descriptor):
        if not self.dead:
            self._open.discard(descriptor)
            super().close(descriptor)

    def write(self, descriptor, parts, offset):
        self._live(None)
        return super().write(descriptor, parts, offset)

    def fsync(self, descriptor):
        self._live(None)
        super().fsync(descriptor)

    def unlink(self, path):
        self._live(None)
        super().unlink(path)

    def rmdir(self, path):
        self._live(None)
        super().rmdir(path)

    def mkdir(self, path):
        self._live(path)
        super().mkdir(path)

    def link(self, source, target):
        self._live(target)
        super().link(source, target)

    def replace(self, source, target):
        self._live(source)
        super().replace(source, target)

    def end(self):
        for descriptor in self._open:
            with contextlib.suppress(OSError):
                super().close(descriptor)


async def branched(scheduler, root, run_id, source, at, *, segments=None, token="mine", **said):
    return await scheduler.branch(run_id, str(root), source, at, said, segments, False, token)


@pytest.mark.parametrize("name", ["plain", "reuse"])
@pytest.mark.parametrize(
    ("at", "segments", "said"),
    [
        (0, None, {"prompt": "a blue square", "seed": 9}),
        (2, None, {"prompt": "a red circle"}),
        (3, 5, {"seed": 9}),
        (SEGMENTS, 6, {}),
        (2, 2, {}),
    ],
)
async def test_a_branch_is_a_run_that_was_told_so_from_the_start(
    start, tmp_path, model, whole, name, at, segments, said
):
    scheduler = start()
    source = await made(scheduler, tmp_path, "source", config_for(model, **PLAIN_AND_REUSE[name]))
    before = everything(source)
    lines = source.manifest.read_bytes()
    status = await branched(scheduler, tmp_path, "branch", "source", at, segments=segments, **said)
    assert (status.run_id, status.branched_from, status.num_segments) == ("branch", "source", segments or SEGMENTS)
    await done(scheduler, "branch")
    assert (everything(source), source.manifest.read_bytes()) == (before, lines)
    folder = RunFolder(tmp_path, "branch")
    check_same(folder, await whole(told_from_the_start(folder)), but=["run.yaml"])
    manifest = folder.read_manifest()
    assert all_damage_of(folder, manifest) == []
    shared = [path for kind in ("latents", "segments", "records") for path in (folder.path / kind).iterdir()]
    linked = {path.name for path in shared if path.stat().st_nlink > 1}
    assert {name.split("-")[0] for name in linked} == {f"{index:05d}" for index in range(at)}


async def test_a_run_is_branched_while_it_grows_and_its_branch_is_branched(start, tmp_path, model, whole):
    scheduler = start()
    await submit(scheduler, tmp_path, "source", config_for(model))
    await scheduler.wait_segment("source", 1, 60)
    with pytest.raises(
        ConfigError, match=r"at is 4; it must be from 0 to [23], with the run's [23] committed segments"
    ):
        await branched(scheduler, tmp_path, "branch", "source", 4)
    await branched(scheduler, tmp_path, "branch", "source", 2, prompt="a red circle", segments=3)
    await scheduler.wait_segment("branch", 2, 60)
    await branched(scheduler, tmp_path, "twig", "branch", 3, segments=4, seed=7)
    for name in ("source", "branch", "twig"):
        await done(scheduler, name)
        folder = RunFolder(tmp_path, name)
        check_same(folder, await whole(told_from_the_start(folder)), but=["run.yaml"])


@pytest.mark.parametrize("name", ["plain", "reuse"])
async def test_a_branch_of_a_rerolled_run_has_its_takes(start, tmp_path, model, whole, name):
    """The segments of another take become those of the first: under the names of a run that was told so."""
    scheduler = start()
    source = await made(scheduler, tmp_path, "source", config_for(model, **PLAIN_AND_REUSE[name]))
    await scheduler.reroll("source", str(tmp_path), 1, 77, "a blue square", False)
    await done(scheduler, "source")
    before, folder = everything(source), RunFolder(tmp_path, "branch")
    await branched(scheduler, tmp_path, "branch", "source", 3, prompt="a red circle")
    await done(scheduler, "branch")
    assert everything(source) == before
    manifest = folder.read_manifest()
    assert [record.take for record in manifest.segments] == [0] * SEGMENTS
    assert all_damage_of(folder, manifest) == []
    for record, own in zip(source.read_manifest().segments[:3], manifest.segments, strict=False):
        assert (source.path / record.latents).samefile(folder.path / own.latents)
        assert (source.path / record.media).samefile(folder.path / own.media)
    if name == "plain":  # with reuse the source's own plan began anew with its take
        check_same(folder, await whole(told_from_the_start(folder)), but=["run.yaml"])
    else:
        assert manifest.planned_from == 3


@pytest.mark.parametrize("window", [0, 2])
async def test_a_branch_keeps_what_its_source_has_kept(start, tmp_path, model, whole, window):
    scheduler = start()
    changes = (REUSE | {"cache": WARM | {"reuse_window": window}}) if window else {}
    config = config_for(model, **changes, output={"keep_segments": 2}, video={"num_segments": 6})
    source = await made(scheduler, tmp_path, "source", config)
    before = everything(source)
    valid = r"at is 1; it must be 0 or from [45] to 6, with the run's 6 committed segments, as the files of earlier"
    with pytest.raises(ConfigError, match=valid):
        await branched(scheduler, tmp_path, "branch", "source", 1)
    folder = RunFolder(tmp_path, "branch")
    assert not folder.path.exists()
    await branched(scheduler, tmp_path, "branch", "source", 5, segments=7)
    await done(scheduler, "branch")
    assert everything(source) == before
    ones, others = everything(folder), everything(await whole(told_from_the_start(folder)))
    names = [name for name in ones if name not in ("run.yaml", "final.mp4") and not name.startswith("live")]
    assert [name for name in names if ones[name] != others.get(name)] == []
    manifest = folder.read_manifest()
    assert (manifest.dropped_before, len(manifest.segments)) == (5, 7)
    assert all_damage_of(folder, manifest) == []


class DropsMeanwhile(LocalPool):
    """The source's last segment begins when a branch asks for the hardware, whose answer waits until the run's end."""

    def __init__(self):
        super().__init__()
        self.began, self.go, self.ended = asyncio.Event(), asyncio.Event(), None

    async def denoiser(self, worker, method, *arguments):
        if method == "denoise_segment" and arguments[1].index == 3:
            self.began.set()
            await self.go.wait()
        if method == "provenance" and self.began.is_set() and not self.go.is_set():
            self.go.set()
            await self.ended()
        return await super().denoiser(worker, method, *arguments)


async def test_files_that_a_live_source_drops_meanwhile_are_not_damaged(start, tmp_path, model):
    pool = DropsMeanwhile()
    scheduler = start(pool)
    config = config_for(model, output={"keep_segments": 1}, video={"num_segments": 4})
    pool.ended = lambda: end_of(scheduler, "source")
    await submit(scheduler, tmp_path, "source", config)
    await pool.began.wait()
    async with asyncio.timeout(60):
        while (dropped := RunFolder(tmp_path, "source").read_manifest().dropped_before) < 2:
            await asyncio.sleep(0.01)
    await branched(scheduler, tmp_path, "branch", "source", 3, segments=4)
    await done(scheduler, "branch")
    folder = RunFolder(tmp_path, "branch")
    assert (dropped, folder.read_manifest().dropped_before) == (2, 3)
    assert all_damage_of(folder, folder.read_manifest()) == []


async def test_the_same_request_makes_one_branch(start, tmp_path, model):
    scheduler = start()
    await made(scheduler, tmp_path, "source", config_for(model, **SHORT))
    await branched(scheduler, tmp_path, "branch", "source", 1)
    assert (await branched(scheduler, tmp_path, "branch", "source", 1)).run_id == "branch"
    await done(scheduler, "branch")
    lines = RunFolder(tmp_path, "branch").manifest.read_bytes()
    status = await branched(scheduler, tmp_path, "branch", "source", 1)
    assert (status.state, status.committed) == ("done", 3)
    assert RunFolder(tmp_path, "branch").manifest.read_bytes() == lines
    for run_id in ("branch", "source"):
        with pytest.raises(RunExists, match=f"run id '{run_id}' is taken by .*/{run_id}; choose another run id"):
            await branched(scheduler, tmp_path, run_id, "source", 1, token="another")


async def test_all_mistakes_of_a_branch_are_told_at_once_and_nothing_is_written(start, tmp_path, model):
    scheduler = start()
    await made(scheduler, tmp_path, "source", config_for(model, **SHORT))
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError) as refused:
        await branched(scheduler, tmp_path, "branch", "source", -1, segments=0, prompt=" ", seed=-1, fps=3)
    assert [problem.split(" ")[0] for problem in refused.value.problems] == [
        "at",
        "num_segments",
        "fps",
        "prompt",
        "seed",
    ]
    for at, segments, words in ((True, None, "at is True"), (2, 1, "num_segments is 1; it must be from 2 to 100000")):
        with pytest.raises(ConfigError, match=words):
            await branched(scheduler, tmp_path, "branch", "source", at, segments=segments)
    with pytest.raises(ConfigError, match="prompt has words that this model does not know: 'pelican'"):
        await branched(scheduler, tmp_path, "branch", "source", 1, prompt="a red pelican")
    with pytest.raises(UnknownRun, match="no run 'nobody' under"):
        await branched(scheduler, tmp_path, "branch", "nobody", 0)
    source = RunFolder(tmp_path, "source")
    source.media(0).write_bytes(b"damaged")
    with pytest.raises(RunDamaged, match=r"run 'source' is damaged: .*00000-t0.m4s is not as it was written"):
        await branched(scheduler, tmp_path, "branch", "source", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == there


async def test_where_files_cannot_be_linked_they_are_copied(start, tmp_path, model, whole):
    class NoLinks(files.Disk):
        def link(self, source, target):
            raise OSError(errno.EXDEV, "another file system")

    scheduler = start()
    await made(scheduler, tmp_path, "source", config_for(model, **SHORT))
    with files.swapped(NoLinks()):
        await branched(scheduler, tmp_path, "branch", "source", 2)
        await done(scheduler, "branch")
    folder = RunFolder(tmp_path, "branch")
    assert {path.stat().st_nlink for path in folder.path.rglob("*") if path.is_file()} == {1}
    check_same(folder, await whole(config_for(model, **SHORT)))


async def test_a_scheduler_that_dies_leaves_no_branch_or_a_whole_one(start, tmp_path, model, whole):
    """It dies at each file operation of a branch; a client repeats its request."""
    scheduler = start(pool := LocalPool())
    source = await made(scheduler, tmp_path, "source", config_for(model, **SHORT))
    before, found, asked = everything(source), [], {"prompt": "a red circle"}
    for at in itertools.count():
        run_id, folder = f"branch-{at}", RunFolder(tmp_path, f"branch-{at}")
        with files.swapped(dying := DyingAt(tmp_path, at)), contextlib.suppress(Died):
            await branched(scheduler, tmp_path, run_id, "source", 2, **asked)
        if not dying.dead:
            break
        await die(scheduler)
        dying.end()
        found.append(folder.path.exists())
        if found[-1]:
            manifest = folder.read_manifest()
            assert (len(manifest.segments), all_damage_of(folder, manifest)) == (2, [])
        scheduler = SegmentSchedulerActor(pool)
        if at % 4 == 0 or found[-1]:
            await branched(scheduler, tmp_path, run_id, "source", 2, **asked)
            await done(scheduler, run_id)
            check_same(folder, await whole(told_from_the_start(folder)), but=["run.yaml"])
        assert everything(source) == before
    await done(scheduler, run_id)
    assert found == sorted(found)
    assert set(found) == {False, True}
    assert len(found) > 15
    assert list(tmp_path.glob(".branch*/manifest.jsonl")) == [], "litter"


async def test_a_loss_of_power_leaves_no_branch_or_a_whole_one(start, tmp_path, model):
    """After any operation, whatever is lost of what was not synced; once it was answered it is there."""
    (root := tmp_path / "runs").mkdir()
    scheduler = start()
    source = await made(scheduler, root, "source", config_for(model, **SHORT))
    with files.swapped(recorder := Recorder(root)):
        await branched(scheduler, root, "branch", "source", 2, prompt="a red circle")
        recorder.tell("answered")
        await scheduler.cancel("branch")
        await end_of(scheduler, "branch")
    history, there, whole = History(None, recorder.operations), Counter(), source.read_manifest()
    for number, promised, found in wrecks(history, 20, random.Random(7)):
        build(tmp_path / "lost", {path: data for path, data in found.items() if "branch" in path.split("/")[0]})
        folder = RunFolder(tmp_path / "lost", "branch")
        there[folder.path.exists(), bool(promised)] += 1
        if folder.path.exists():
            manifest = folder.read_manifest()
            assert [record.digests for record in manifest.segments] == [at.digests for at in whole.segments[:2]]
            assert len(manifest.changes) == 1
            file = folder.open()
            assert [line for line in all_damage_of(folder, manifest) if "stream.mp4" not in line] == [], number
            file.close()
    assert set(there) == {(False, False), (True, False), (True, True)}
