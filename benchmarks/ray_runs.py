"""Runs through the three actors on a Ray of their own, and what a client sees of them when."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.provenance import ROOT
from benchmarks.stand_in_ffmpeg import has_ffmpeg, use_stand_in
from edit_ray.actors import launch
from edit_ray.client import LongVideoClient
from edit_ray.config import Config

DIRECTORY = {"type": Path, "default": ROOT / "runs", "help": "where model and runs are written"}
"""The command line's option for `folder_for_runs`."""


@dataclass(frozen=True)
class Seen:
    """A run as its client saw it: seconds from `submit` until each segment was committed, and until the run was done.

    `statistics` are the segments' own; `submitted_at` is in unix seconds, as their `…_at` are.
    """

    committed: list[float]
    done: float
    statistics: list[Mapping[str, float]]
    submitted_at: float

    @property
    def steady(self) -> float:
        """Seconds a segment, from one's beginning to the next one's, on average; of a single one its own.

        Not from commit to commit: the last segment is decoded and encoded with nothing else at work.
        """
        begun = [segment["denoise_at"] for segment in self.statistics]
        return (begun[-1] - begun[0]) / (len(begun) - 1) if len(begun) > 1 else self.committed[0]

    @property
    def first_by_stage(self) -> dict[str, float]:
        """Where the seconds of the first segment go, from `submit` until its client has it: each stage, and what lies
        before it.
        """
        first, now, found = self.statistics[0], self.submitted_at, {}
        for stage in ("denoise", "decode", "encode", "publish"):
            found[f"to_{stage}_s"] = first[f"{stage}_at"] - now
            found[f"{stage}_s"] = first[f"{stage}_s"]
            now = first[f"{stage}_at"] + first[f"{stage}_s"]
        return found | {"to_client_s": self.submitted_at + self.committed[0] - now}


@contextmanager
def private_ray(num_cpus: int) -> Iterator[None]:
    """A Ray for as long as it is entered; the actors end with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=torch.cuda.device_count(),
        namespace=launch.NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    try:
        yield
    finally:
        launch.end_actors()
        ray.shutdown()


@contextmanager
def folder_for_runs(directory: Path, prefix: str, note: Callable[[str], None]) -> Iterator[Path]:
    """A folder in `directory` for a model and its runs, gone afterwards; where there is no ffmpeg that is noted, and a
    stand-in for it lies in the folder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=prefix) as name:
        folder = Path(name)
        if not has_ffmpeg():
            note("no ffmpeg here: encode left out, frames are stored as they are by a stand-in")
            use_stand_in(folder)
        yield folder


def watch(client: LongVideoClient, run_id: str, submitted: float) -> Seen:
    """Follow a run that was submitted at that moment of `time.perf_counter` to its end."""
    submitted_at = time.time() - (time.perf_counter() - submitted)
    committed, statistics = [], []
    for segment in client.stream(run_id, frames=False):
        committed.append(time.perf_counter() - submitted)
        statistics.append(segment.statistics)
    return Seen(committed, time.perf_counter() - submitted, statistics, submitted_at)


def run(client: LongVideoClient, config: Config, run_id: str) -> Seen:
    """Submit a run, and follow it to its end."""
    submitted = time.perf_counter()
    client.submit(config, run_id=run_id)
    return watch(client, run_id, submitted)


def in_denoiser(ask: Callable[[Any], Any], worker: int = 0) -> Any:
    """What a function says that is called with the GPU actor's object, in its process."""
    handle = ray.get_actor(launch.name_of(launch.DENOISER, worker), namespace=launch.NAMESPACE)
    return ray.get(handle.__ray_call__.remote(ask))


def latents_at(folder: Path, run_id: str, index: int) -> Path:
    """Where a segment's latents lie."""
    return folder / run_id / "latents" / f"{index:05}-t0.safetensors"
