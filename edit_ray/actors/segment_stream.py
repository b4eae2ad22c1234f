"""The segments of a run as its clients get them, one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edit_ray.actors.messages import RunStatus, StreamReply
from edit_ray.errors import EditRayError, RunCancelled, SegmentFailed, SegmentGone
from edit_ray.runs.manifest import SegmentRecord
from edit_ray.video.encode import EncodeError, Frames, read_frames

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Segment:
    """One committed segment.

    `frames` are uint8 [F, H, W, 3], decoded from the fragment at `path`, which plays after the run's `init.mp4`: every
    reader gets the same at any time. `latents` are float32 [1, C, t, h, w], normalised, the lossless source. Each is
    None unless it was requested.
    """

    index: int
    prompt: str
    seed: int
    first_frame: int
    num_frames: int
    fps: float
    path: Path
    statistics: Mapping[str, float]
    frames: Frames | None = None
    latents: torch.Tensor | None = None


class SegmentSource(Protocol):
    """The client: where segments are asked for."""

    def wait_segment(self, run_id: str, index: int) -> StreamReply: ...
    def status(self, run_id: str) -> RunStatus: ...


class SegmentStream(Iterator[Segment], AsyncIterator[Segment]):
    """The segments of one run, as `LongVideoClient.stream` returns them."""

    def __init__(self, client: SegmentSource, run_id: str, start: int, frames: bool, latents: bool) -> None:
        self._client, self._run_id, self._index = client, run_id, start
        self._frames, self._latents = frames, latents

    def __next__(self) -> Segment:
        if (segment := self._following()) is None:
            raise StopIteration
        return segment

    async def __anext__(self) -> Segment:
        if (segment := await asyncio.to_thread(self._following)) is None:
            raise StopAsyncIteration
        return segment

    def _following(self) -> Segment | None:
        """The next segment, None after the last one of a run that is done."""
        while True:
            reply = self._client.wait_segment(self._run_id, self._index)
            if reply.record is not None:
                segment = self._segment(reply.record, reply.status)
                self._index += 1
                return segment
            if reply.status.state == "done":
                return None
            if reply.status.state == "failed":
                raise SegmentFailed(f"run {self._run_id!r} failed: {reply.status.error}")
            if reply.status.state == "cancelled":
                raise RunCancelled(f"run {self._run_id!r} was stopped")

    def _segment(self, record: SegmentRecord, status: RunStatus) -> Segment:
        folder = Path(status.path)
        path, init = folder / record.media, folder / "init.mp4"
        try:
            frames = read_frames(path, height=status.height, width=status.width, init=init) if self._frames else None
            latents = None
            if self._latents:
                from edit_ray.engine.continuity import load_latents  # needs torch

                latents = load_latents(folder / record.latents)
        except (OSError, EncodeError, EditRayError):
            if path.exists():
                raise
            raise SegmentGone(
                f"segment {record.index} of run {self._run_id!r} is dropped (output.keep_segments); "
                f"the first that is there is {self._client.status(self._run_id).dropped_before}"
            ) from None
        plan = (record.index, record.prompt, record.seed, record.first_frame, record.num_frames)
        return Segment(*plan, status.fps, path, dict(record.statistics), frames, latents)
