"""Random histories of a run without Ray, each compared, file by file, with the run to which nothing has happened.

A history draws a configuration and what happens: cancels and deaths of actors at random calls and steps, then resumes,
extensions and re-rolls, until the run is done. What it leaves must follow from its configuration, its number of
segments and its takes alone.

    python -m tests.chaos.storm FOLDER --first 0 --count 1000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edit_ray.actors import stages
from edit_ray.actors.local import LocalPool, LocalWorker
from edit_ray.actors.messages import RunSpec, RunStatus
from edit_ray.actors.pool import ActorGone
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.config import Config, load_config
from edit_ray.errors import ConfigError, UnknownRun
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Manifest
from edit_ray.testing import save_random_wan
from edit_ray.tiers.disk_tier import LOCK
from edit_ray.video.encode import join
from edit_ray.video.hls import newest_playlist

WORK = ("prepare_run", "denoise_segment", "decode_segment", "encode_segment", "finalize_run")
KILLS = ("gpu", "gpu at a step", "store", "store at work", "node", "scheduler", "cluster")
STATISTICS = (
    "chunks",
    "media_bytes",
    "red",
    "green",
    "blue",
    "sharpness",
    "units_computed",
    "units_skipped",
    "decode_tiled",
)
PATIENCE_S = 300.0

Take = tuple[int, int | None, str | None]
"""A re-roll: its first segment, its seed, its prompt."""


@dataclass(frozen=True)
class Shape:
    """What a history runs: its frames follow from these, the number of segments and the takes."""

    context: int  # latents, or with -1 the last frame
    window: int  # of reuse, 0 for none
    cached: bool  # where nothing is reused between segments
    frames: int
    kv: str = ""  # of a causal model: recache or commit
    switch: str = ""  # and what its second prompt is

    @classmethod
    def drawn(cls, draw: random.Random, long_share: float, causal: bool = False) -> Shape:
        if causal:
            kv, switch = draw.choice(("recache", "commit")), draw.choice(("recache", "keep", "cut"))
            return cls(0, 0, draw.random() < 0.3, 4 * draw.randint(1, 2) - 3, kv, switch)
        frames = 81 if draw.random() < long_share else 9
        window = draw.choice((0, 1, 1, 2, 2, 3))
        return cls(draw.choice((0, 1, 2, -1)), window, draw.random() < 0.5, frames)

    def config(self, model: Path, segments: int, keep: int | None = None) -> Config:
        """Of the smallest run of this shape."""
        warm = {"policy": "warmstart_reuse", "inner": "fbcache", "rel_l1_thresh": 0.2, "warm_steps": 1}
        cache = warm | {"reuse_window": self.window} if self.window else {"policy": "always" if self.cached else "none"}
        continuity: dict[str, Any] = {"mode": {0: "none", -1: "image"}.get(self.context, "history")}
        continuity |= {"history_latents": self.context} if self.context > 0 else {}
        prompts: list[dict[str, Any]] = [{"segment": 0, "prompt": "a red circle"}]
        if self.kv:
            continuity = {"mode": "causal", "chunk_size": 1, "kv": self.kv}
            prompts += [{"segment": 1, "prompt": "a blue circle", "switch": self.switch}]
        return Config.model_validate(
            {
                "model": {"path": str(model)},
                "sampling": {
                    "height": 32,
                    "width": 32,
                    "num_frames": self.frames,
                    "num_inference_steps": 2,
                    "guidance_scale": 1.0,
                    "seed": 5,
                },
                "video": {"num_segments": segments},
                "prompt_segments": prompts,
                "continuity": continuity,
                "cache": cache,
                "store": {"host_bytes": 16 * 4096, "allow_tmpfs": True},
                "output": {"keep_segments": keep},
                # A death is not a failure: what happens here must not need an attempt of the segment's.
                "engine": {"cpu_threads": 1, "idle_exit_s": 3600, "segment_retries": 0},
            }
        )


@dataclass
class Weather(LocalPool):
    """A crew to which `coming`, by the number of a call for work, happens during that call."""

    draw: random.Random
    coming: dict[int, str] = field(default_factory=dict)
    calls: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    struck: asyncio.Event = field(default_factory=asyncio.Event)  # what a history itself must see to

    def __post_init__(self) -> None:
        super().__init__()
        self.what = ""

    async def denoiser(self, worker: int, method: str, *arguments: Any) -> Any:
        if method not in WORK:
            return await super().denoiser(worker, method, *arguments)
        self.calls += 1
        what = self.coming.pop(self.calls, "")
        if not what:
            return await super().denoiser(worker, method, *arguments)
        self.happened[what] += 1
        of = self.workers[worker]
        if what in ("cancel", "scheduler", "cluster"):
            at_work = asyncio.ensure_future(super().denoiser(worker, method, *arguments))
            await asyncio.sleep(self.draw.choice((0.0, 0.0, 0.01, 0.05)))
            self.what = what
            self.struck.set()
            return await at_work
        if what in ("store", "store at work"):
            answer = asyncio.ensure_future(super().denoiser(worker, method, *arguments))
            await asyncio.sleep(0.03 * self.draw.random() if what == "store at work" else 0.0)
            of.store.close()
            of.store = LocalWorker(worker).store
            return await answer
        if what == "node":
            of.store.close()
            for path in arguments[0].residuals_directory.glob("*.safetensors"):
                path.unlink()
            of.store = LocalWorker(worker).store
        dead, at_work = of.denoiser, None
        if what == "gpu at a step":
            at_work = asyncio.ensure_future(super().denoiser(worker, method, *arguments))
            await asyncio.sleep(self.draw.choice((0.0, 0.01, 0.03)))
        await self.restart_denoiser(worker)
        dead.stop_run(arguments[0].run_id)  # what it was at ends, as nobody may write beside the next one
        if at_work is not None:
            with contextlib.suppress(Exception):
                await at_work
        raise ActorGone("the actor died")


class History:
    """One run, from its submission until it is done, whatever happens."""

    def __init__(
        self, seed: int, root: Path, model: Path, long_share: float, crew: Weather, *, causal: bool = False
    ) -> None:
        """`crew` lives on from the history before."""
        self.draw = random.Random(seed)
        self.run_id, self.root = f"storm-{seed}", root
        self.shape = Shape.drawn(self.draw, long_share, causal)
        self.keep = self.draw.choice((None, None, 1, 2)) if self.shape.kv != "commit" else None
        self.segments = self.draw.randint(2, 4)
        self.config = self.shape.config(model, self.segments, self.keep)
        self.takes: list[Take] = []
        self.told: list[str] = [f"{self.shape}, keep {self.keep}, {self.segments} segments"]
        self.crew, crew.draw = crew, self.draw
        self.folder = RunFolder(root, self.run_id)

    async def live(self) -> Manifest:
        """Lives the history; the manifest that it ends with."""
        self.scheduler = self._new_scheduler()
        self._forecast()
        asked = self.config.model_dump(mode="json")
        await self.scheduler.submit(self.run_id, asked, str(self.root), str(self.root), self.run_id)
        state = await self._end()
        for _ in range(self.draw.randint(0, 3)):
            self._forecast()
            await self._change(state)
            state = await self._end()
        self.crew.coming.clear()
        if state != "done":
            await self.scheduler.resume(self.run_id, str(self.root), False)
            state = await self._end()
        async with asyncio.timeout(PATIENCE_S):  # a run's end is told a little before it is forgotten
            while await self.crew.recall():
                await asyncio.sleep(0.01)
        return self.folder.read_manifest()

    def _new_scheduler(self) -> Any:
        return SegmentSchedulerActor(self.crew)

    def _forecast(self) -> None:
        """What happens in the life that begins: most often a cancel, and a death or none."""
        kinds = [self.draw.choice(KILLS)] if self.draw.random() < 0.6 else []
        kinds += ["cancel"] if self.draw.random() < 0.7 else []
        calls = self.draw.sample(range(1, 3 * self.segments + 2), len(kinds))
        self.crew.coming = {self.crew.calls + call: kind for call, kind in zip(calls, kinds, strict=True)}
        self.told.append(f"coming {dict(zip(calls, kinds, strict=True))}")

    async def _change(self, state: str) -> None:
        committed = len(self.folder.read_manifest().segments)
        kind = self.draw.choice(("resume", "extend", "reroll"))
        if kind == "extend" and self.segments < 6:
            more = self.draw.randint(1, 6 - self.segments)
            self.segments += more
            self.told.append(f"{state} at {committed}: extend by {more}")
            await self.scheduler.extend(self.run_id, str(self.root), more, False)
        elif kind == "reroll" and committed and len(self.takes) < 2:
            start, seed = self.draw.randrange(committed), self.draw.choice((None, 77))
            prompt = self.draw.choice((None, "a blue square"))
            before = self.folder.manifest.read_bytes()
            try:
                await self.scheduler.reroll(self.run_id, str(self.root), start, seed, prompt, False)
            except ConfigError:
                assert self.keep is not None, "nothing is dropped"
                assert self.folder.manifest.read_bytes() == before, "refused, and written"
            else:
                self.takes.append((start, seed, prompt))
                self.told.append(f"{state} at {committed}: reroll from {start}, {seed}, {prompt}")
                return
            await self._resume(state, committed)
        else:
            await self._resume(state, committed)

    async def _resume(self, state: str, committed: int) -> None:
        self.told.append(f"{state} at {committed}: resume")
        await self.scheduler.resume(self.run_id, str(self.root), False)

    async def _end(self) -> str:
        """Waits for the run's end, and does what needs another hand than the crew's."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if self.crew.struck.is_set():
                    self.crew.struck.clear()
                    await self._strike(self.crew.what)
                try:
                    status = (await self.scheduler.wait_segment(self.run_id, self.segments + 1, 0.05)).status
                except UnknownRun:  # it had ended when its scheduler died
                    status = RunStatus.of(self.folder.path, self.folder.read_manifest())
                if status.ended and not self.crew.struck.is_set():
                    assert status.state in ("done", "cancelled"), status.error
                    return status.state

    async def _strike(self, what: str) -> None:
        self.told.append(f"{what} at call {self.crew.calls}")
        if what == "cancel":
            await self.scheduler.cancel(self.run_id)
            return
        await die(self.scheduler)
        if what == "cluster":
            await self.crew.end()
            coming, calls, happened = self.crew.coming, self.crew.calls, self.crew.happened
            self.crew = Weather(self.draw, coming, calls, happened)
        self.scheduler = SegmentSchedulerActor(self.crew)
        if what == "cluster":
            await self.scheduler.resume(self.run_id, str(self.root), False)


async def die(scheduler: SegmentSchedulerActor) -> None:
    """What a SIGKILL does to a segment scheduler: it does nothing any more, and its locks are gone."""
    while tasks := [task for task in (*scheduler._tasks, scheduler._recovered) if not task.done()]:
        for task in tasks:  # all at once: the end of one would begin others
            task.cancel()
        await asyncio.wait(tasks)
    for run in scheduler._runs.values():
        if not run.ended:
            run.file.close()


class Undisturbed:
    """Runs to which nothing has happened, each made once."""

    def __init__(self, root: Path, model: Path) -> None:
        self._root, self._model, self._crew = root, model, LocalPool()
        self._made: dict[object, RunFolder] = {}

    def of(self, shape: Shape, segments: int, takes: list[Take]) -> RunFolder:
        """The folder of the run of this shape that keeps all it makes."""
        key = (shape, segments, *takes)
        if key not in self._made:
            folder = RunFolder(self._root, f"whole-{len(self._made)}")
            asyncio.run(self._make(folder, shape.config(self._model, segments), takes))
            self._made[key] = folder
        return self._made[key]

    async def _make(self, folder: RunFolder, config: Config, takes: list[Take]) -> None:
        root, scheduler = str(self._root), SegmentSchedulerActor(self._crew)
        await scheduler.submit(folder.run_id, config.model_dump(mode="json"), root, root, "")
        for take in (None, *takes):
            if take is not None:
                await scheduler.reroll(folder.run_id, root, *take, False)
            async with asyncio.timeout(PATIENCE_S):
                while not (status := (await scheduler.wait_segment(folder.run_id, 10**5, 5)).status).ended:
                    pass
            assert status.state == "done", status.error

    def end(self) -> None:
        """Ends their actors."""
        asyncio.run(self._crew.end())


def compare(folder: RunFolder, manifest: Manifest, whole: RunFolder, keep: int | None) -> None:
    """AssertionError unless every file is what it would be without anything that has happened."""
    other, first = whole.read_manifest(), manifest.dropped_before
    assert (manifest.state, len(manifest.segments)) == ("done", len(other.segments))
    for one, same in zip(manifest.segments, other.segments, strict=True):
        shown, expected = what_shows(one), what_shows(same)
        if one.index in {take.start for take in manifest.takes} and keep is not None:  # its predecessor may be dropped
            expected = {name: expected[name] for name in shown}
        assert shown == expected
    assert (manifest.takes, manifest.num_segments, manifest.tiled_from) == (other.takes, other.num_segments, None)
    for record in manifest.segments[first:]:
        assert (folder.path / record.media).exists(), record.media
        assert (folder.path / record.latents).exists(), record.latents
    for kind in ("latents", "segments", "records"):
        for path in (folder.path / kind).iterdir():
            there = whole.path / kind / path.name
            if there.exists():  # of an earlier take another number of segments may be made
                assert path.read_bytes() == there.read_bytes(), f"{kind}/{path.name} differs"
    media = [record.media for record in manifest.segments[first:]]
    stream = [folder.init, *(whole.path / name for name in media)]
    assert (folder.path / "stream.mp4").read_bytes() == b"".join(path.read_bytes() for path in stream), "stream.mp4"
    text = (folder.path / str(newest_playlist(folder.path))).read_text()
    assert re.findall("^segments/.*", text, re.MULTILINE) == media, "the playlist"
    if keep is None:
        names = ("final.mp4", "stream.mp4", "init.mp4")
        assert [name for name in names if (folder.path / name).read_bytes() != (whole.path / name).read_bytes()] == []
        assert text == (whole.path / str(newest_playlist(whole.path))).read_text(), "the playlist"
    else:
        assert first == max(0, len(manifest.segments) - keep) or manifest.takes, "what is dropped"
        joined = folder.path.with_suffix(".mp4")
        spec = RunSpec.of(folder.path.parent, load_config(folder.run_yaml, (), check_model=False), manifest)
        join(whole.init, [whole.path / name for name in media], joined, comment=spec.settings)
        assert folder.final.read_bytes() == joined.read_bytes(), "final.mp4"
        joined.unlink()
    left = [*folder.path.rglob(".*"), *(folder.path.parent / ".cache_store").glob("*.*")]
    left = [path for path in left if path != folder.path.parent / ".cache_store" / LOCK]  # of the store that is open
    assert left == [], "leftovers"


def what_shows(record: Any) -> dict[str, Any]:
    """A record but for times, and for what depends on who was alive."""
    # The process that has not made the segment before measures the seam in the encoded files.
    figures: dict[str, Any] = {name: "measured" for name in record.statistics if name.startswith("seam_")}
    figures |= {name: record.statistics[name] for name in record.statistics if name.startswith("interior")}
    figures |= {name: record.statistics[name] for name in STATISTICS if name in record.statistics}
    fields = ("index", "take", "prompt", "seed", "first_frame", "num_frames", "latents", "media")
    return {name: getattr(record, name) for name in fields} | figures


def storm(
    root: Path, seeds: range, long_share: float = 0.01, patience_s: float = 1e9, *, causal: bool = False
) -> Counter[str]:
    """Lives so many histories; what has happened in them. AssertionError names the seed of one that went wrong."""
    model = root / "model" / ("causal" if causal else "wan")
    options = {"chunk_size": 1, "window": 3, "sink": 1, "timesteps": [1000.0, 750.0]}
    if not (model / "model_index.json").exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        save_random_wan(model, expand_timesteps=not causal, causal=options if causal else None)
    (root / "whole").mkdir(exist_ok=True)
    (root / "hurt").mkdir(exist_ok=True)
    undisturbed, counts, began = Undisturbed(root / "whole", model), Counter[str](), time.monotonic()
    crew = Weather(random.Random())
    pause, stages.RETRY_PAUSE_S = stages.RETRY_PAUSE_S, 0.01
    try:
        for seed in seeds:
            if time.monotonic() - began > patience_s:
                break
            history = History(seed, root / "hurt", model, long_share, crew, causal=causal)
            try:
                manifest = asyncio.run(history.live())
                whole = undisturbed.of(history.shape, history.segments, history.takes)
                compare(history.folder, manifest, whole, history.keep)
            except Exception as error:
                raise AssertionError(f"history {seed}: {error!r}\n" + "\n".join(history.told)) from error
            told, crew = history.told, history.crew
            counts += Counter(line.split(": ")[1].split()[0] for line in told if line.startswith(("done", "cancelled")))
            counts += Counter(["history"] + ["81 frames"] * (history.shape.frames == 81))
            shutil.rmtree(history.folder.path)
    finally:
        stages.RETRY_PAUSE_S = pause
        asyncio.run(crew.end())
        undisturbed.end()
    return counts + crew.happened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--causal", action="store_true", help="runs of a causal model")
    asked = parser.parse_args()
    seeds = range(asked.first, asked.first + asked.count)
    counts = storm(asked.folder, seeds, patience_s=asked.seconds, causal=asked.causal)
    print(json.dumps(dict(counts)))


if __name__ == "__main__":
    main()
