"""How runs come to the segment scheduler: new ones, and those that go on from what their folder holds."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edit_ray import files
from edit_ray.actors.damage import Damage, damage_of, refusal
from edit_ray.actors.hardware import Provenance, check_same, differing
from edit_ray.actors.kept import can_be_made_again
from edit_ray.actors.live_run import LiveRun
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.places import usable_workers
from edit_ray.actors.pool import ActorPool
from edit_ray.actors.space import room_in, shortage_before
from edit_ray.actors.threads import in_own_thread
from edit_ray.actors.watchdog import answered
from edit_ray.config import Config, check_config, dump_yaml, load_config
from edit_ray.errors import ConfigError, NoPlace, ResourcesUnavailable, RunDamaged, RunExists, RunLocked, UnknownRun
from edit_ray.files import digest_of, digest_of_file
from edit_ray.runs.event_log import latest_events
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Extended, Manifest, Opened, Rerolled
from edit_ray.runs.manifest_file import ManifestFile, ManifestReader
from edit_ray.runs.run_state import LEAD

LOCK_PATIENCE_S = 10.0  # a process that was killed keeps its locks until the kernel has cleared it away

OnDamage = Literal["overlook", "refuse", "remake"]
Change = Callable[[Manifest, RunSpec], Extended | Rerolled]
"""What a run that goes on begins with, an extension or a re-roll, from how it stands. It is of the next incarnation."""


@dataclass(frozen=True)
class Submission:
    """What a client asks for. `probe` is a file in `root` that every node has to see.

    `token` tells the client's own run, when it must ask again whether it was taken, from another of the same name.
    """

    run_id: str
    config: Config
    root: Path
    probe: Path
    token: str
    owner: str = ""
    job: str = ""


class Admission:
    """Opens runs and takes their manifests' locks."""

    def __init__(self, pool: ActorPool) -> None:
        self._pool = pool

    async def check(self, asked: Submission) -> RunSpec:
        """Everything that would make the run impossible, before anything is written.

        Raises ConfigError, RunExists, ResourcesUnavailable, ActorVersionMismatch.
        """
        spec = RunSpec(asked.run_id, asked.root, asked.config, asked.config.num_segments)
        if problems := await asyncio.to_thread(check_config, asked.config):  # here models and policies may be others
            raise ConfigError(problems)
        if await asyncio.to_thread(spec.folder.path.exists) and not await self.mine(asked):
            raise RunExists(f"run id {asked.run_id!r} is taken by {spec.folder.path}; choose another run id")
        if too_little := await asyncio.to_thread(shortage_before, spec):
            raise ResourcesUnavailable(too_little)
        await self._pool.start(spec, 0)
        for who, sees in (
            ("segment scheduler", await asyncio.to_thread(asked.probe.exists)),
            ("GPU actor", await self._sees(spec, asked.probe)),
        ):
            if not sees:
                raise ConfigError(
                    [f"output: the {who} does not see {spec.root}; choose a folder that all nodes of the cluster share"]
                )
        return spec

    async def mine(self, asked: Submission) -> bool:
        """Whether the run's folder was made for this very submission."""
        folder = RunFolder(asked.root, asked.run_id)
        try:
            return (await asyncio.to_thread(folder.read_manifest)).begun.submission == asked.token
        except UnknownRun:
            return False

    async def begin(self, spec: RunSpec, asked: Submission) -> LiveRun:
        """A new run, its folder made."""
        settings = dump_yaml(spec.config)
        begun = spec.begun(asked.token, await self._provenance(spec, settings.encode()), asked.owner, asked.job)
        with room_in(spec.root):
            file = await asyncio.to_thread(spec.folder.create, settings, begun)
        return LiveRun.of(RunSpec.of(spec.root, spec.config, file.manifest), file)

    async def go_on(
        self,
        root: Path,
        run_id: str,
        *,
        allow_different_hardware: bool = False,
        change: Change | None = None,
        damage: OnDamage = "overlook",
        reader: ManifestReader | None = None,
    ) -> LiveRun:
        """A run in its next incarnation, from the first segment that is not committed.

        `damage` says what becomes of committed files that are not as they were written. To find them all are read,
        which `overlook` does without. A `reader` that has read the manifest saves reading it again.

        Raises UnknownRun, RunLocked, ManifestUnreadable, ConfigError, HardwareDiffers, RunDamaged,
        ResourcesUnavailable.
        """
        folder = RunFolder(root, run_id)
        with room_in(root):
            file = await self.open(folder, reader)
        try:
            config = await asyncio.to_thread(load_config, folder.run_yaml, (), check_model=False)
            spec = RunSpec.of(root, config, file.manifest)
            had = await asyncio.to_thread(last_worker, spec)
            worker = await self._start(spec, had or 0)
            settings = await asyncio.to_thread(folder.run_yaml.read_bytes)
            provenance = await self._provenance(spec, settings, worker)
            if not allow_different_hardware:
                check_same(run_id, file.manifest.provenance, provenance)
            changed = await asyncio.to_thread(change, file.manifest, spec) if change else None
            replans = bool(differing(file.manifest.provenance, provenance)) or not await asyncio.to_thread(
                can_be_made_again, spec, len(file.manifest.segments)
            )
            opened = Opened(file.manifest.incarnation + 1, provenance, replans, changed, secrets.token_hex(4))
            damaged: Damage = {}
            if damage != "overlook":
                damaged = await asyncio.to_thread(damage_of, folder, file.manifest.after(opened))
            if damaged and damage == "refuse":
                raise RunDamaged(refusal(run_id, damaged))
            with room_in(root):
                await asyncio.to_thread(file.append, opened)
        except BaseException:
            file.close()
            raise
        run = LiveRun.of(RunSpec.of(root, config, file.manifest), file)
        run.may_move, run.damaged, run.worked_on = allow_different_hardware, damaged, worker
        run.remakes = damage == "remake"
        return run

    async def _start(self, spec: RunSpec, worker: int) -> int:
        """The GPU actor that had the run last, whose number this returns; where it has no place, the first one."""
        if 0 < worker < await usable_workers(self._pool, spec):
            with contextlib.suppress(NoPlace):
                await self._pool.start(spec, worker)
                return worker
        await self._pool.start(spec, 0)
        return 0

    async def _provenance(self, spec: RunSpec, settings: bytes, worker: int = 0) -> Provenance:
        """What the run's bits depend on; `settings` is its run.yaml."""
        call = self._pool.denoiser(worker, "provenance", spec)
        found: Provenance = await answered(call, spec.config.engine.load_timeout_s, "what the GPU actor runs on")
        return {**found, "config": f"{digest_of(settings):016x}"}

    async def _sees(self, spec: RunSpec, probe: Path) -> bool:
        call, timeout_s = self._pool.denoiser(0, "sees", probe), spec.config.engine.answer_timeout_s
        sees: bool = await answered(call, timeout_s, f"whether the GPU actor sees {spec.root}")
        return sees

    async def open(self, folder: RunFolder, reader: ManifestReader | None = None) -> ManifestFile:
        """The run's manifest, its lock taken. Raises as `RunFolder.open`."""
        deadline = asyncio.get_running_loop().time() + LOCK_PATIENCE_S
        while True:
            try:
                return await asyncio.to_thread(folder.open, reader)
            except RunLocked:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(0.2)


async def check_answers(root: Path, timeout_s: float) -> None:
    """Raises ResourcesUnavailable where the folder of runs does not answer in time, or refuses to."""
    with room_in(root):
        try:
            with contextlib.suppress(FileNotFoundError):
                await asyncio.wait_for(in_own_thread(files.disk.listdir, root), timeout_s)
        except TimeoutError:
            raise ResourcesUnavailable(f"{root} did not answer for {timeout_s:g} s; ask again once it does") from None


def denoised_before(spec: RunSpec, committed: int) -> list[dict[str, float]]:
    """The figures of those segments after the committed ones that need not be denoised again.

    They were made as they would be made now: in this take, under this plan of what segments reuse. All that a segment
    leaves is durable before the event log says that it was made. Where a segment is denoised from frames the latest one
    is made again in any case: its predecessor's frames may be decoded in tiles from now on.
    """
    made: dict[tuple[int | None, int | None, str], dict[str, float]] = {}
    for event in latest_events(spec.folder.events, "segment_made"):
        index = event.get("segment")
        if index is not None and index < committed:  # those after it were made later, or are made again
            break
        made.setdefault((index, event.get("take"), str(event.get("plan"))), event.get("figures", {}))
    found: list[dict[str, float]] = []
    for index in range(committed, committed + LEAD):
        figures = made.get((index, spec.segment(index).take, spec.residuals_id))
        if not figures or not _as_made(spec.latents(index), figures):
            break
        found.append(figures)
    return found[:-1] if spec.layout.denoise_needs_frames else found


def _as_made(latents: Path, figures: dict[str, float]) -> bool:
    """Whether the latents are those that were made; earlier versions made no digest of them."""
    try:
        found = digest_of_file(latents)
    except OSError:
        return False
    return figures.get("latents_xxh3", found) == found


def last_worker(spec: RunSpec) -> int | None:
    """The GPU actor that worked on the run last; None if none has."""
    latest = next(latest_events(spec.folder.events, "gpu_actor"), {})
    return latest.get("worker")
