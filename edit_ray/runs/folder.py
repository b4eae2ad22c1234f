"""A run's folder: what is on disk is the truth about the run, at every instant.

RUN/run.yaml                          the configuration
RUN/manifest.jsonl                    what is committed
RUN/latents/NNNNN-tT.safetensors      the latents that segment N of take T added
RUN/latents/init.safetensors          those of what segment 0 continues, where there is one
RUN/segments/NNNNN-tT.m4s             its frames, playable behind init.mp4
RUN/records/NNNNN-tT.json             what the cache decided in it, where there is one
RUN/events.jsonl                      what happened when, one line each (`event_log`)
RUN/init.mp4, stream.mp4, live*.m3u8  what plays while the run goes on
RUN/final.mp4                         all frames, once the run is done
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from edit_ray.errors import ManifestUnreadable, RunExists, UnknownRun
from edit_ray.runs.ids import check_run_id
from edit_ray.runs.manifest import Begun, Manifest
from edit_ray.runs.manifest_file import ManifestFile, read_manifest


def write_atomic(path: Path, data: bytes) -> None:
    """Writes beside `path`, syncs, renames: a reader sees the old content or the new, never a part."""
    draft = draft_of(path)
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def draft_of(path: Path) -> Path:
    """Where this process writes what will be `path`: no two processes write to one file, whoever thinks it is alive."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def publish(draft: Path, path: Path) -> None:
    """Makes a finished draft durable and renames it to its place."""
    with open(draft, "rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes what was created in, renamed into or removed from a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RunFolder:
    """The files of one run under `root/run_id`."""

    def __init__(self, root: Path, run_id: str) -> None:
        self.run_id = check_run_id(run_id)
        self.path = root / run_id

    def create(self, run_yaml: str, begun: Begun) -> ManifestFile:
        """Makes the folder, whole or not at all, and keeps its manifest open.

        Raises RunExists when it is there already: nothing is overwritten.
        """
        root = self.path.parent
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.exists():
            raise self._taken()
        draft = Path(tempfile.mkdtemp(prefix=f".{self.run_id}-", dir=root))
        manifest = None
        try:
            for name in ("latents", "segments", "records"):
                (draft / name).mkdir(mode=0o700)
            write_atomic(draft / "run.yaml", run_yaml.encode())
            manifest = ManifestFile.create(draft / self.manifest.name, begun)
            sync_folder(draft)
            draft.rename(self.path)
            sync_folder(root)
        except BaseException as failure:
            if manifest is not None:
                manifest.close()
            shutil.rmtree(draft, ignore_errors=True)
            if isinstance(failure, OSError) and self.path.exists():
                raise self._taken() from None
            raise
        manifest.path = self.manifest
        return manifest

    def open(self) -> ManifestFile:
        """The manifest, for the one process that works on the run. What no line names half-written is removed.

        Raises UnknownRun when there is none, RunLocked, ManifestUnreadable.
        """
        try:
            manifest = ManifestFile.open(self.manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise self._unknown() from None
        try:
            self._check_mine(manifest.manifest)
        except ManifestUnreadable:
            manifest.close()
            raise
        self.remove_drafts()
        return manifest

    def remove_drafts(self) -> None:
        """What was begun to be written by processes that are dead; while none writes in here."""
        for draft in self.path.rglob(".*.part"):
            draft.unlink(missing_ok=True)

    def read_manifest(self) -> Manifest:
        """Raises UnknownRun when there is none, ManifestUnreadable when it cannot be understood."""
        try:
            return read_manifest(self.manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise self._unknown() from None

    @property
    def init_latents(self) -> Path:
        return self.path / "latents" / "init.safetensors"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.jsonl"

    @property
    def run_yaml(self) -> Path:
        return self.path / "run.yaml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def final(self) -> Path:
        return self.path / "final.mp4"

    @property
    def init(self) -> Path:
        return self.path / "init.mp4"

    def latents(self, segment_index: int, take: int = 0) -> Path:
        return self.path / "latents" / f"{segment_index:05d}-t{take}.safetensors"

    def media(self, segment_index: int, take: int = 0) -> Path:
        return self.path / "segments" / f"{segment_index:05d}-t{take}.m4s"

    def record(self, segment_index: int, take: int = 0) -> Path:
        return self.path / "records" / f"{segment_index:05d}-t{take}.json"

    def relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def remove(self, paths: Iterable[Path]) -> None:
        """Removes files of the run; those that are gone already are none."""
        for path in paths:
            path.unlink(missing_ok=True)

    def _check_mine(self, manifest: Manifest) -> Manifest:
        """A run that goes on writes to the folder of its own name, which must be this one."""
        if manifest.begun.run_id != self.run_id:
            raise ManifestUnreadable(
                f"{self.manifest} is of run {manifest.begun.run_id[:80]!r}; its folder must have that name"
            )
        return manifest

    def _taken(self) -> RunExists:
        return RunExists(
            f"run id {self.run_id!r} is taken: {self.path} exists; choose another --run-id, or remove the folder"
        )

    def _unknown(self) -> UnknownRun:
        return UnknownRun(f"no run {self.run_id!r} under {self.path.parent}")
