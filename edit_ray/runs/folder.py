"""A run's folder: what is on disk is the truth about the run, at every instant.

RUN/run.yaml                          the configuration
RUN/manifest.jsonl                    what is committed
RUN/latents/NNNNN-tT.safetensors      the latents that segment N of take T added
RUN/latents/init.safetensors          those of what segment 0 continues, where there is one
RUN/segments/NNNNN-tT.m4s             its frames, playable behind init.mp4
RUN/records/NNNNN-tT.json             what the cache decided in it, where there is one
RUN/events.jsonl                      what happened when, one line each (`event_log`)
RUN/init.mp4, stream.mp4, live*.m3u8  what plays while the run continues
RUN/final.mp4                         all frames, once the run is done
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from edit_ray import files
from edit_ray.errors import ManifestUnreadable, RunExists, UnknownRun
from edit_ray.runs.ids import RUN_ID_PATTERN, check_run_id
from edit_ray.runs.manifest import Line, Manifest
from edit_ray.runs.manifest_file import ManifestFile, ManifestReader

_FOLDERS = ("latents", "segments", "records")
_DRAFT = re.compile(rf"\.{RUN_ID_PATTERN[1:-1]}-[0-9a-z_]{{8,16}}")
_PROBE = re.compile(r"\.probe-\w+")  # with which a client checks whether all nodes see the folder
_LITTER_S = 3600.0  # age at which a probe or a draft without a manifest no longer has a living owner
_DELETED = ".deleted"
_SHARED = re.compile(r"([0-9]{5,9}-t0|init)\.[a-z0-9]{2,16}")  # what a branch has of the run that it was made from
NOTHING: Mapping[str, Path] = MappingProxyType({})


class RunFolder:
    """The files of one run under `root/run_id`."""

    def __init__(self, root: Path, run_id: str) -> None:
        self.run_id = check_run_id(run_id)
        self.path = root / run_id
        self.manifest = self.path / "manifest.jsonl"
        self.run_yaml = self.path / "run.yaml"
        self.events = self.path / "events.jsonl"
        self.init_latents = self.path / "latents" / "init.safetensors"
        self.init = self.path / "init.mp4"
        self.final = self.path / "final.mp4"
        self._probes = f"probe-{run_id}~"  # no run id contains `~`

    def create(self, run_yaml: str, *lines: Line, shared: Mapping[str, Path] = NOTHING) -> ManifestFile:
        """Create the folder, whole or not at all, and keep its manifest open, which begins with these lines.

        `shared` are files of another run by the names, relative to the folder, that they have here. Raises RunExists
        when the folder is there already: nothing is overwritten; FileNotFoundError when a shared file is not there.
        """
        root, taken = self.path.parent, f"run id {self.run_id!r} is taken: {self.path} exists"
        files.make_folder(root)
        if self.path.exists():
            raise RunExists(f"{taken}; choose another --run-id, or remove the folder")
        made, manifest, there = root / f".{self.run_id}-{secrets.token_hex(8)}", None, False
        files.disk.mkdir(made)
        try:
            # The manifest first, as its lock protects the draft from being removed as litter.
            manifest = ManifestFile.create(made / self.manifest.name, *lines)
            _remove_litter(root, made.stat().st_mtime - _LITTER_S)
            for name in _FOLDERS:
                files.disk.mkdir(made / name)
            for name, source in shared.items():
                files.share(source, made / name)
            for name in _FOLDERS if shared else ():
                files.sync(made / name)
            files.write_atomic(made / "run.yaml", run_yaml.encode())  # last, as that syncs the folder
            files.disk.replace(made, self.path)
            there = True
            files.sync(root)
        except BaseException as failure:
            lost = not there and isinstance(failure, OSError) and self.path.exists()
            if there:
                with suppress(OSError):  # under its name a run is whole, or not there
                    files.disk.replace(self.path, made)
            _remove_new(made)
            if manifest is not None:
                manifest.close()
            if lost:
                raise RunExists(f"{taken}; choose another --run-id, or remove the folder") from None
            raise
        manifest.path = self.manifest
        return manifest

    def open(self, reader: ManifestReader | None = None) -> ManifestFile:
        """The manifest, for the one process that works on the run. Files that are half-written are removed.

        A `reader` saves reading again what it has read.
        Raises UnknownRun when there is none, RunLocked, ManifestUnreadable.
        """
        try:
            file = ManifestFile.open(self.manifest, reader)
        except (FileNotFoundError, NotADirectoryError):
            raise self._unknown() from None
        if (run_id := file.manifest.begun.run_id) != self.run_id:  # it would write to the folder of its own name
            file.close()
            raise ManifestUnreadable(f"{self.manifest} is of run {run_id[:80]!r}; its folder must have that name")
        self.remove_drafts()
        return file

    def read_manifest(self, reader: ManifestReader | None = None) -> Manifest:
        """The manifest at this moment; with a `reader`, only what is new since its last call is read.

        Raises UnknownRun when there is none, ManifestUnreadable when it cannot be read or understood.
        """
        try:
            return (reader or ManifestReader(self.manifest)).read()
        except (FileNotFoundError, NotADirectoryError):
            raise self._unknown() from None
        except OSError as error:
            raise ManifestUnreadable(f"{self.manifest} cannot be read ({error.strerror}); try again") from None

    def probe(self, token: str) -> Path:
        """A file beside the run's folder, with which its submission checks which nodes see that."""
        return self.path.parent / f".{self._probes}{token}{files.DRAFT}"

    def remove_drafts(self) -> None:
        """Remove incomplete files that dead processes left. Only safe while no process writes to the folder."""
        files.remove_drafts(self.path.parent, self._probes)
        for name in ("", *_FOLDERS):
            files.remove_drafts(self.path / name)

    def latents(self, segment_index: int, take: int = 0) -> Path:
        return self.path / "latents" / f"{segment_index:05d}-t{take}.safetensors"

    def media(self, segment_index: int, take: int = 0) -> Path:
        return self.path / "segments" / f"{segment_index:05d}-t{take}.m4s"

    def record(self, segment_index: int, take: int = 0) -> Path:
        return self.path / "records" / f"{segment_index:05d}-t{take}.json"

    def relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove files of the run, if they are there."""
        for path in paths:
            files.remove(path)

    def _unknown(self) -> UnknownRun:
        return UnknownRun(f"no run {self.run_id!r} under {self.path.parent}")


def folders_in(root: Path) -> list[RunFolder]:
    """The folders under `root` that hold a manifest, the oldest run first; none where there is no such folder."""
    try:
        names = [path.name for path in root.iterdir() if re.fullmatch(RUN_ID_PATTERN, path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [folder for name in names if os.path.isfile((folder := RunFolder(root, name)).manifest)]
    return sorted(found, key=_begun_at)


def _begun_at(folder: RunFolder) -> tuple[float, str]:
    try:
        return folder.run_yaml.stat().st_mtime, folder.run_id  # written once, when the run began
    except OSError:
        return 0.0, folder.run_id


def remove_run(folder: RunFolder) -> None:
    """Remove a run's folder. A crash leaves the run whole, or a hidden folder that the next removal deletes.

    Raises UnknownRun where there is none, RunLocked where a process works on it, ManifestUnreadable, OSError.
    """
    root = folder.path.parent
    if folder.path.is_symlink():
        raise UnknownRun(f"{folder.path} is a link to {os.readlink(folder.path)}; remove it by hand")
    lock = folder.open()
    try:
        files.disk.replace(folder.path, root / f".{folder.run_id}-{secrets.token_hex(8)}{_DELETED}")
        files.sync(root)
    finally:
        lock.close()
    for deleted in root.glob(f".*{_DELETED}"):
        shutil.rmtree(deleted, ignore_errors=True)


def size_of(folder: RunFolder) -> int:
    """The bytes that a run's files take on disk."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder.path) for name in names]
    return sum(path.lstat().st_blocks * 512 for path in paths)


def _remove_litter(root: Path, before: float) -> None:
    """Remove what killed submissions have left: drafts of folders and probes.

    A process that makes a folder holds the lock of its manifest. A draft without a manifest yet, and a probe, must not
    have changed since `before`, in seconds since 1970.
    """
    for path in [root / name for name in files.disk.listdir(root)]:
        with suppress(OSError):
            if _PROBE.fullmatch(path.name) and path.stat(follow_symlinks=False).st_mtime < before:
                files.remove(path)
            elif _DRAFT.fullmatch(path.name):
                try:
                    with files.opened(path / "manifest.jsonl", os.O_RDWR | os.O_NOFOLLOW) as manifest:
                        files.disk.lock(manifest)
                        _remove_new(path)
                except FileNotFoundError:
                    if path.stat(follow_symlinks=False).st_mtime < before:
                        _remove_new(path)


def _remove_new(folder: Path) -> None:
    """Remove what `RunFolder.create` makes; a folder with anything else in it stays."""
    with suppress(OSError):
        for name in _FOLDERS:
            with suppress(FileNotFoundError):
                for shared in files.disk.listdir(folder / name):
                    if _SHARED.fullmatch(shared):
                        files.remove(folder / name / shared)
                files.remove_drafts(folder / name)
                files.disk.rmdir(folder / name)
        files.remove(folder / "init.mp4")
        files.remove_drafts(folder)
        files.remove(folder / "run.yaml")
        files.remove(folder / "manifest.jsonl")
        files.disk.rmdir(folder)
