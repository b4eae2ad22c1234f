"""How runs enter the segment scheduler: new ones, and those that are resumed from their folder."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edit_ray import files
from edit_ray.actors.branches import BranchAsked, check_shared, lines_of, planned, shared_files, shortage_of
from edit_ray.actors.folder_state import (
    Change,
    Damage,
    Provenance,
    can_be_made_again,
    check_same,
    damage_of,
    differing,
    last_worker,
    refusal,
    shortage_before,
    usable_disk,
)
from edit_ray.actors.live_run import LiveRun
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.pool import ActorPool
from edit_ray.actors.watchdog import answered, best_effort, in_own_thread
from edit_ray.config import Config, check_config, dump_yaml, load_config
from edit_ray.errors import ConfigError, NoPlace, ResourcesUnavailable, RunDamaged, RunExists, RunLocked, UnknownRun
from edit_ray.files import digest_of
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Manifest, Opened
from edit_ray.runs.manifest_file import ManifestFile, ManifestReader

LOCK_PATIENCE_S = 10.0  # a killed process keeps its locks until the kernel has cleaned up after it

OnDamage = Literal["overlook", "refuse", "remake"]


@dataclass(frozen=True)
class Submission:
    """A client's request for a new run. `probe` is a file in `root` that every node must see.

    A client that asks again, after its answer was lost, is recognised by `token`.
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
        """Check all that could make the run impossible, before anything is written.

        Raises ConfigError, RunExists, ResourcesUnavailable, ActorVersionMismatch.
        """
        spec = RunSpec(asked.run_id, asked.root, asked.config, asked.config.num_segments)
        if problems := await asyncio.to_thread(check_config, asked.config):  # models and policies may differ here
            raise ConfigError(problems)
        if await asyncio.to_thread(spec.folder.path.exists) and not await self.mine(asked):
            raise RunExists(f"run id {asked.run_id!r} is taken by {spec.folder.path}; choose another run id")
        if too_little := await asyncio.to_thread(shortage_before, spec):
            raise ResourcesUnavailable(too_little)
        await self._pool.start(spec, 0)
        timeout_s, what = spec.config.engine.answer_timeout_s, f"whether the GPU actor sees {spec.root}"
        for who, sees in (
            ("segment scheduler", await asyncio.to_thread(asked.probe.exists)),
            ("GPU actor", await answered(self._pool.denoiser(0, "sees", asked.probe), timeout_s, what)),
        ):
            if not sees:
                raise ConfigError(
                    [f"output: the {who} does not see {spec.root}; choose a folder that all nodes of the cluster share"]
                )
        return spec

    async def mine(self, asked: Submission | BranchAsked) -> bool:
        """Whether the run's folder was created for this very request."""
        folder = RunFolder(asked.root, asked.run_id)
        try:
            return (await asyncio.to_thread(folder.read_manifest)).begun.submission == asked.token
        except UnknownRun:
            return False

    async def begin(self, spec: RunSpec, asked: Submission) -> LiveRun:
        """Create the folder of a new run."""
        settings = dump_yaml(spec.config)
        begun = spec.begun(asked.token, await self._provenance(spec, settings.encode()), asked.owner, asked.job)
        with usable_disk(spec.root):
            file = await asyncio.to_thread(spec.folder.create, settings, begun)
        return LiveRun(RunSpec.of(spec.root, spec.config, file.manifest), file)

    async def branch(self, asked: BranchAsked, *, allow_different_hardware: bool = False) -> LiveRun:
        """Create the folder of a branch, after all that could make it impossible was checked.

        Raises UnknownRun, RunExists, ManifestUnreadable, ConfigError, HardwareDiffers, RunDamaged,
        ResourcesUnavailable; then nothing was written.
        """
        root, folder = asked.root, RunFolder(asked.root, asked.run_id)
        if await asyncio.to_thread(folder.path.exists):
            raise RunExists(f"run id {asked.run_id!r} is taken by {folder.path}; choose another run id")
        source = RunFolder(root, asked.source)
        while True:
            manifest = await asyncio.to_thread(source.read_manifest)
            try:
                return await self._branch_of(source, manifest, asked, allow_different_hardware)
            except (RunDamaged, ResourcesUnavailable):
                # A source that is being made may drop files meanwhile (output.keep_segments): then it has said so.
                if (await asyncio.to_thread(source.read_manifest)).dropped_before <= manifest.dropped_before:
                    raise

    async def _branch_of(
        self, of: RunFolder, manifest: Manifest, asked: BranchAsked, allow_different_hardware: bool
    ) -> LiveRun:
        """`branch`, of a source whose manifest was read."""
        root, folder = asked.root, RunFolder(asked.root, asked.run_id)
        config = await asyncio.to_thread(load_config, of.run_yaml, (), check_model=False)
        source = RunSpec.of(root, config, manifest)
        spec, edit = await asyncio.to_thread(planned, asked, source, manifest)
        settings = await asyncio.to_thread(of.run_yaml.read_bytes)
        here = await self._provenance(spec, settings, await self._start(source))
        if asked.at and not allow_different_hardware:
            check_same(asked.source, manifest.provenance, here)
        await asyncio.to_thread(check_shared, of, manifest, asked.at)
        if too_little := await asyncio.to_thread(shortage_of, spec, source, manifest.segments[: asked.at]):
            raise ResourcesUnavailable(too_little)

        def create() -> ManifestFile:
            lines = lines_of(asked, spec, edit, source, manifest, here)
            return folder.create(settings.decode(), *lines, shared=shared_files(of, manifest, asked.at))

        with usable_disk(root):  # which a file that was dropped meanwhile makes fail, too
            file = await asyncio.to_thread(create)
        return LiveRun(RunSpec.of(root, config, file.manifest), file, may_move=allow_different_hardware)

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
        """Open a run in its next incarnation, from the first segment that is not committed.

        `damage` says what to do about committed files that are not as they were written; to find them, all but
        `overlook` read every file. A `reader` that has read the manifest saves reading it again.

        Raises UnknownRun, RunLocked, ManifestUnreadable, ConfigError, HardwareDiffers, RunDamaged,
        ResourcesUnavailable.
        """
        folder = RunFolder(root, run_id)
        with usable_disk(root):
            file = await self.open(folder, reader)
        try:
            config = await asyncio.to_thread(load_config, folder.run_yaml, (), check_model=False)
            spec = RunSpec.of(root, config, file.manifest)
            worker = await self._start(spec)
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
            with usable_disk(root):
                await asyncio.to_thread(file.append, opened)
        except BaseException:
            file.close()
            raise
        return LiveRun(
            RunSpec.of(root, config, file.manifest),
            file,
            worked_on=worker,
            may_move=allow_different_hardware,
            remakes=damage == "remake",
            damaged=damaged,
        )

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

    async def usable_workers(self, spec: RunSpec) -> tuple[int, str | None]:
        """How many GPU actors the run may use, at least one, and a warning if the nodes hold fewer than it asks for."""
        asked, places = spec.config.engine.gpu_actors, None
        if asked > 1:
            with best_effort("count the places for GPU actors"):
                places = await self._pool.places(spec)
        if places is None or places >= asked:
            return asked, None
        usable = max(1, places)  # whether that one finds resources shows when it is started
        return usable, (
            f"engine.gpu_actors asks for {asked} GPU actors, and the nodes of this Ray cluster have places for "
            f"{usable}; further runs wait until one of those is free"
        )

    async def _start(self, spec: RunSpec) -> int:
        """Start the GPU actor that had the run last, else the first one; returns its number."""
        worker = await asyncio.to_thread(last_worker, spec) or 0
        if 0 < worker < (await self.usable_workers(spec))[0]:
            with contextlib.suppress(NoPlace):
                await self._pool.start(spec, worker)
                return worker
        await self._pool.start(spec, 0)
        return 0

    async def _provenance(self, spec: RunSpec, settings: bytes, worker: int = 0) -> Provenance:
        """What the run's bits depend on; `settings` is the content of its run.yaml."""
        call = self._pool.denoiser(worker, "provenance", spec)
        found: Provenance = await answered(call, spec.config.engine.load_timeout_s, "what the GPU actor runs on")
        return {**found, "config": f"{digest_of(settings):016x}"}


async def check_answers(root: Path, timeout_s: float) -> None:
    """Raise ResourcesUnavailable if the folder of runs does not answer in time, or refuses to."""
    with usable_disk(root):
        try:
            with contextlib.suppress(FileNotFoundError):
                await asyncio.wait_for(in_own_thread(files.disk.listdir, root), timeout_s)
        except TimeoutError:
            raise ResourcesUnavailable(f"{root} did not answer for {timeout_s:g} s; ask again once it does") from None
