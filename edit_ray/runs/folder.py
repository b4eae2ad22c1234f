"""A run's folder: what is on disk is the truth about the run, at every instant.

RUN/run.yaml                      the configuration
RUN/manifest.json                 what is committed
RUN/latents/NNNNN.safetensors     the latents that segment N added
RUN/latents/init.safetensors      those of the picture or clip that segment 0 continues, where there is one
RUN/segments/NNNNN-tT.m4s         its frames, playable behind init.mp4; T is the take
RUN/records/NNNNN.json            what the cache decided in it, where there is one
RUN/events.jsonl                  what happened when, one line each (`event_log`)
RUN/init.mp4, stream.mp4, live*.m3u8  what plays while the run goes on
RUN/final.mp4                     all frames, once the run is done
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edit_ray.errors import RunExists, UnknownRun
from edit_ray.runs.events import RunState
from edit_ray.runs.ids import check_run_id

SCHEMA = 1


@dataclass(frozen=True)
class SegmentRecord:
    """One committed segment; paths are relative to the run's folder."""

    index: int
    prompt: str
    seed: int
    first_frame: int
    num_frames: int
    latents: str
    media: str
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a run has made so far. `segments` is complete from 0 to its length, in order."""

    run_id: str
    version: str
    state: RunState
    height: int
    width: int
    fps: int
    num_segments: int
    num_frames: int
    segments: tuple[SegmentRecord, ...] = ()
    final: str | None = None
    error: str | None = None
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError when the text is no manifest of this schema."""
        try:
            values: dict[str, Any] = json.loads(text)
            if values["schema"] != SCHEMA:
                raise ValueError(f"manifest schema {values['schema']!r} is not the one known here, {SCHEMA}")
            values["segments"] = tuple(SegmentRecord(**segment) for segment in values["segments"])
            return cls(**values)
        except (KeyError, TypeError, json.JSONDecodeError) as broken:
            raise ValueError(f"this is no manifest: {broken}") from None


def write_atomic(path: Path, data: bytes) -> None:
    """Writes beside `path`, syncs, renames: a reader sees the old content or the new, never a part."""
    draft = path.with_name(f".{path.name}.part")
    with open(draft, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(draft, path)


def publish(draft: Path, path: Path) -> None:
    """Renames a finished draft to its place and makes the rename durable."""
    os.replace(draft, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RunFolder:
    """The files of one run under `root/run_id`."""

    def __init__(self, root: Path, run_id: str) -> None:
        self.run_id = check_run_id(run_id)
        self.path = root / run_id

    def create(self, run_yaml: str) -> None:
        """Makes the folder. Raises RunExists when it is there already: nothing is overwritten."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            raise RunExists(
                f"run id {self.run_id!r} is taken: {self.path} exists; choose another --run-id, or remove the folder"
            ) from None
        for name in ("latents", "segments", "records"):
            (self.path / name).mkdir(mode=0o700)
        write_atomic(self.path / "run.yaml", run_yaml.encode())

    def latents(self, segment_index: int) -> Path:
        return self.path / "latents" / f"{segment_index:05d}.safetensors"

    @property
    def init_latents(self) -> Path:
        return self.path / "latents" / "init.safetensors"

    def media(self, segment_index: int, take: int = 0) -> Path:
        return self.path / "segments" / f"{segment_index:05d}-t{take}.m4s"

    @property
    def init(self) -> Path:
        return self.path / "init.mp4"

    def record(self, segment_index: int) -> Path:
        return self.path / "records" / f"{segment_index:05d}.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def final(self) -> Path:
        return self.path / "final.mp4"

    def relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def write_manifest(self, manifest: Manifest) -> None:
        write_atomic(self.path / "manifest.json", manifest.to_json().encode())

    def read_manifest(self) -> Manifest:
        """Raises UnknownRun when there is none, ValueError when it cannot be understood."""
        try:
            text = (self.path / "manifest.json").read_text()
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownRun(f"no run {self.run_id!r} under {self.path.parent}") from None
        return Manifest.from_json(text)
