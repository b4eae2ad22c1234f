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
import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from edit_ray import files
from edit_ray.errors import ManifestUnreadable, RunExists, UnknownRun
from edit_ray.runs.ids import RUN_ID_PATTERN, check_run_id
from edit_ray.runs.manifest import Begun, Manifest
from edit_ray.runs.manifest_file import ManifestFile, ManifestReader

_FOLDERS = ("latents", "segments", "records")
_DRAFT = re.compile(rf"\.{RUN_ID_PATTERN[1:-1]}-[0-9a-z_]{{8,16}}")
_PROBE = re.compile(r"\.probe-\w+")  # by which a client asks whether all nodes see the folder
_LITTER_S = 3600.0  # after which a probe or a draft without a manifest has no maker that is still alive


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
        files.make_folder(root)
        if self.path.exists():
            raise self._taken()
        made, manifest = root / f".{self.run_id}-{secrets.token_hex(8)}", None
        files.disk.mkdir(made)
        try:
            manifest = ManifestFile.create(
                made / self.manifest.name, begun
            )  # first, as its lock says that it is no litter
            _remove_litter(root, made.stat().st_mtime - _LITTER_S)
            for name in _FOLDERS:
                files.disk.mkdir(made / name)
            files.write_atomic(made / "run.yaml", run_yaml.encode())  # last, as that syncs the folder
            files.disk.replace(made, self.path)
            made = self.path
            files.sync(root)
        except BaseException as failure:
            taken = made != self.path and isinstance(failure, OSError) and self.path.exists()
            _remove_new(made)
            if manifest is not None:
                manifest.close()
            if taken:
                raise self._taken() from None
            raise
        manifest.path = self.manifest
        return manifest

    def open(self, reader: ManifestReader | None = None) -> ManifestFile:
        """The manifest, for the one process that works on the run. What no line names half-written is removed.

        Of what a `reader` has read before only the last line is read again.
        Raises UnknownRun when there is none, RunLocked, ManifestUnreadable.
        """
        try:
            manifest = ManifestFile.open(self.manifest, reader)
        except (FileNotFoundError, NotADirectoryError):
            raise self._unknown() from None
        try:
            self._check_mine(manifest.manifest)
        except ManifestUnreadable:
            manifest.close()
            raise
        self.remove_drafts()
        return manifest

    def probe(self, token: str) -> Path:
        """A file beside the run's folder, by which its submission finds out who sees that."""
        return self.path.parent / f".{self._probes}{token}{files.DRAFT}"

    @property
    def _probes(self) -> str:
        return f"probe-{self.run_id}~"  # in no run's id

    def remove_drafts(self) -> None:
        """What was begun to be written by processes that are dead; while none writes in here."""
        files.remove_drafts(self.path.parent, self._probes)
        for name in ("", *_FOLDERS):
            files.remove_drafts(self.path / name)

    def read_manifest(self, reader: ManifestReader | None = None) -> Manifest:
        """The manifest at this moment; with a `reader`, only what is new since it last read is read.

        Raises UnknownRun when there is none, ManifestUnreadable when it cannot be read or understood.
        """
        try:
            return (reader or ManifestReader(self.manifest)).read()
        except (FileNotFoundError, NotADirectoryError):
            raise self._unknown() from None
        except OSError as error:
            raise ManifestUnreadable(f"{self.manifest} cannot be read ({error.strerror}); try again") from None

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
            files.remove(path)

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


def _remove_litter(root: Path, before: float) -> None:
    """Removes what killed submissions have left: drafts of folders and probes.

    Who makes a folder holds the lock of its manifest. One that has no manifest yet, and a probe, must have been changed
    last before this time, in seconds since 1970.
    """
    for probe in [root / name for name in files.disk.listdir(root) if _PROBE.fullmatch(name)]:
        with suppress(OSError):
            if probe.stat(follow_symlinks=False).st_mtime < before:
                files.remove(probe)
    for folder in [root / name for name in files.disk.listdir(root) if _DRAFT.fullmatch(name)]:
        with suppress(OSError):
            try:
                with files.opened(folder / "manifest.jsonl", os.O_RDWR | os.O_NOFOLLOW) as manifest:
                    files.disk.lock(manifest)
                    _remove_new(folder)
            except FileNotFoundError:
                if folder.stat(follow_symlinks=False).st_mtime < before:
                    _remove_new(folder)


def _remove_new(folder: Path) -> None:
    """Removes what `RunFolder.create` makes; a folder with anything else in it stays."""
    with suppress(OSError):
        for name in _FOLDERS:
            with suppress(FileNotFoundError):
                files.disk.rmdir(folder / name)
        files.remove_drafts(folder)
        files.remove(folder / "run.yaml")
        files.remove(folder / "manifest.jsonl")
        files.disk.rmdir(folder)


def folders_in(root: Path) -> list[RunFolder]:
    """The folders under `root` that hold a manifest, the oldest run first; none where there is no such folder."""
    try:
        names = [path.name for path in root.iterdir() if re.fullmatch(RUN_ID_PATTERN, path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [RunFolder(root, name) for name in names]
    return sorted((folder for folder in found if os.path.isfile(folder.manifest)), key=_begun_at)


def _begun_at(folder: RunFolder) -> tuple[float, str]:
    try:
        return folder.run_yaml.stat().st_mtime, folder.run_id  # written once, when the run began
    except OSError:
        return 0.0, folder.run_id


_GONE = ".deleted"


def remove_run(folder: RunFolder) -> None:
    """Removes a run's folder. A crash leaves the run whole, or a hidden folder that the next removal clears away.

    Raises UnknownRun where there is none, RunLocked where a process works on it, ManifestUnreadable, OSError.
    """
    root = folder.path.parent
    if folder.path.is_symlink():
        raise UnknownRun(f"{folder.path} is a link to {os.readlink(folder.path)}; remove it by hand")
    held = folder.open()  # keeps every other process from the run
    try:
        files.disk.replace(folder.path, root / f".{folder.run_id}-{secrets.token_hex(8)}{_GONE}")
        files.sync(root)
    finally:
        held.close()
    for gone in root.glob(f".*{_GONE}"):
        shutil.rmtree(gone, ignore_errors=True)


def size_of(folder: RunFolder) -> int:
    """The bytes that a run's files take on disk."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder.path) for name in names]
    return sum(path.lstat().st_blocks * 512 for path in paths)
