"""Runs to which nothing has happened, and what of a history must equal them: everything that time does not change."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edit_ray.actors.local import LocalPool
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.config import Config, load_config
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Edited, Manifest, Opened, Rerolled
from edit_ray.runs.run_plan import Change, Edit, Take, said_by
from edit_ray.testing import save_random_wan
from edit_ray.tiers.disk_tier import LOCK
from edit_ray.video.encode import join
from edit_ray.video.hls import newest_playlist

WORK = ("prepare_run", "denoise_segment", "decode_segment", "encode_segment", "finalize_run")
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

Reroll = tuple[int, int | None, str | None]
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


class Waiting(LocalPool):
    """Workers that do nothing until they may begin."""

    def __init__(self) -> None:
        super().__init__()
        self.begin: asyncio.Event | None = None

    async def denoiser(self, worker: int, method: str, *arguments: Any) -> Any:
        if self.begin is not None and method in WORK:
            await self.begin.wait()
        return await super().denoiser(worker, method, *arguments)


class Undisturbed:
    """Runs to which nothing has happened, each made once."""

    def __init__(self, root: Path, model: Path) -> None:
        self._root, self._model, self._crew = root, model, Waiting()
        self._made: dict[object, RunFolder] = {}

    def of(self, shape: Shape, segments: int, takes: list[Reroll]) -> RunFolder:
        """The folder of the run of this shape that keeps all it makes."""
        key = (shape, segments, *takes)
        if key not in self._made:
            folder = RunFolder(self._root, f"whole-{len(self._made)}")
            asyncio.run(self._make(folder, shape.config(self._model, segments), takes))
            self._made[key] = folder
        return self._made[key]

    async def _make(self, folder: RunFolder, config: Config, takes: list[Reroll]) -> None:
        root, scheduler = str(self._root), SegmentSchedulerActor(self._crew)
        await scheduler.submit(folder.run_id, config.model_dump(mode="json"), root, root, "")
        for take in (None, *takes):
            if take is not None:
                await scheduler.reroll(folder.run_id, root, *take, False)
            await self._done(scheduler, folder)

    def steered(self, config: Config, changes: tuple[Change, ...]) -> RunFolder:
        """The folder of the run whose storyboard says from the start of each take what its edits were to make of it."""
        key = (config.model_dump_json(), changes)
        if key not in self._made:
            folder = RunFolder(self._root, f"whole-{len(self._made)}")
            asyncio.run(self._make_steered(folder, config, list(changes)))
            self._made[key] = folder
        return self._made[key]

    async def _make_steered(self, folder: RunFolder, config: Config, changes: list[Change]) -> None:
        root, scheduler = str(self._root), SegmentSchedulerActor(self._crew)
        first = next((at for at, change in enumerate(changes) if isinstance(change, Take)), len(changes))
        edits = () if tells(config, changes[:first], changes[first:]) else changes[:first]
        said = config if edits else told(config, config.num_segments, changes[:first])
        self._crew.begin = asyncio.Event()
        await scheduler.submit(folder.run_id, said.model_dump(mode="json"), root, root, "")
        for number, edit in enumerate(edits):
            await scheduler.steer(folder.run_id, edit.start, said_by(edit), f"{number}")
        self._crew.begin.set()
        await self._done(scheduler, folder)
        for at, take in enumerate(changes):
            if not isinstance(take, Take):
                continue
            edits = itertools.takewhile(lambda change: isinstance(change, Edit), changes[at + 1 :])
            file = folder.open()
            opened = Opened(file.manifest.incarnation + 1, file.manifest.provenance)
            file.append(replace(opened, change=Rerolled(opened.incarnation, take)))
            for edit in edits:
                file.append(Edited(opened.incarnation, edit))
            file.close()
            await scheduler.resume(folder.run_id, root, False)
            await self._done(scheduler, folder)

    async def _done(self, scheduler: SegmentSchedulerActor, folder: RunFolder) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not (status := (await scheduler.wait_segment(folder.run_id, 10**5, 5)).status).ended:
                pass
        assert status.state == "done", status.error

    def end(self) -> None:
        """Ends their actors."""
        asyncio.run(self._crew.end())


def tells(config: Config, edits: Iterable[Change], later: Iterable[Change]) -> bool:
    """Whether a storyboard can say what the edits make of the run.

    Its entry for an edit without a prompt would decide how a later change's prompt switches that begins there.
    """
    prompts = {change.start for change in later if change.prompt is not None}
    scenes = {scene.start for scene in config.storyboard.scenes}
    return not config.continuity.causal or not ({edit.start for edit in edits} - scenes) & prompts


def told(config: Config, segments: int | None, changes: Iterable[Change]) -> Config:
    """The configuration, for so many segments, whose storyboard says by itself what the changes make of its own."""
    names = ("prompt", "negative_prompt", "guidance_scale", "seed")
    board = replace(config.storyboard, changes=tuple(changes))
    switches = dict(board._switches) if config.continuity.causal else {}  # what is no new prompt changes no K/V
    entries = [
        {"segment": scene.start}
        | {name: getattr(scene, name) for name in names}
        | ({"switch": switches.get(scene.start, "keep")} if switches else {})
        for scene in board.changed
    ]
    there = [entry for entry in entries if segments is None or entry["segment"] < segments]
    own = {"video": {"num_segments": segments}, "prompt_segments": there}
    return Config.model_validate(config.model_dump(mode="json") | own)


def compare(
    folder: RunFolder,
    manifest: Manifest,
    whole: RunFolder,
    keep: int | None,
    branched_at: int | None = None,
    source_takes: Iterable[Take] = (),
) -> None:
    """AssertionError unless every file is what it would be without anything that has happened."""
    other, first = whole.read_manifest(), manifest.dropped_before
    starts = {branched_at, *(take.start for take in (*manifest.takes, *source_takes))}
    assert (manifest.state, len(manifest.segments)) == ("done", len(other.segments))
    for one, same in zip(manifest.segments, other.segments, strict=True):
        shown, expected = what_shows(one), what_shows(same)
        if one.index in starts and keep is not None:  # its predecessor may be dropped
            expected = {name: expected[name] for name in shown}
        assert shown == expected
    assert (manifest.takes, manifest.num_segments, manifest.tiled_from) == (other.takes, other.num_segments, None)
    for record in manifest.segments[first:]:
        assert (folder.path / record.media).exists(), record.media
        assert (folder.path / record.latents).exists(), record.latents
    made = {Path(record.latents).stem for record in (*manifest.segments, *manifest.earlier_takes)}
    edited = len(manifest.changes) > len(manifest.takes)  # which may leave latents that nobody committed
    for kind in ("latents", "segments", "records"):
        for path in (folder.path / kind).iterdir():
            there = whole.path / kind / path.name
            # Of an earlier take another number of segments may be made.
            if there.exists() and (path.stem in made or not edited):
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
        kept = branched_at is not None and first <= branched_at  # what its source had kept
        assert first == max(0, len(manifest.segments) - keep) or manifest.takes or kept, "what is dropped"
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


def save_model(folder: Path, causal: bool = False) -> Path:
    """Writes the smallest model that histories run, and returns its folder."""
    options = {"chunk_size": 1, "window": 3, "sink": 1, "timesteps": [1000.0, 750.0]}
    return save_random_wan(folder, expand_timesteps=not causal, causal=options if causal else None)
