"""The folder of a run of very many committed segments, made without making one, which then grows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edit_ray.actors.messages import RunSpec
from edit_ray.config import config_of, dump_yaml
from edit_ray.runs.manifest import Committed, SegmentRecord
from edit_ray.runs.manifest_lines import to_text

SCENE = 100  # segments of each prompt
COLOURS = ("red", "green", "blue", "yellow")
MORE = 10_000  # that may be added
FIGURES = {f"a_figure_{number}_s": 1.2345 * number for number in range(30)}  # as many as a segment has


class LongFolder:
    """A run at work for whoever reads its folder: `count` segments, and one more every `grows_s`. It has no media."""

    def __init__(self, root: Path, run_id: str, config: dict[str, Any], count: int, grows_s: float) -> None:
        prompts = (f"a {COLOURS[at // SCENE % len(COLOURS)]} circle" for at in range(0, count, SCENE))
        scenes = [{"segment": at, "prompt": prompt} for at, prompt in zip(range(0, count, SCENE), prompts, strict=True)]
        values = config_of(config | {"video": {"num_segments": count + MORE}, "prompt_segments": scenes})
        spec = RunSpec(run_id, root, values, count + MORE)
        spec.folder.create(dump_yaml(values), spec.begun("", {"device": "none"})).close()
        self._spec = RunSpec.of(root, values, spec.folder.read_manifest())
        self._committed, self._grows_s, self._grown_at = 0, grows_s, time.monotonic()
        self._add(count)

    def grow_to(self, now: float) -> None:
        """Commit what is due by `now` (monotonic seconds)."""
        due = int((now - self._grown_at) / self._grows_s)
        if due > 0:
            self._add(due)
            self._grown_at += due * self._grows_s

    def _add(self, count: int) -> None:
        with self._spec.folder.manifest.open("ab") as manifest:
            for index in range(self._committed, self._committed + count):
                manifest.write(to_text(Committed(self._spec.incarnation, self._record(index))))
        self._committed += count

    def _record(self, index: int) -> SegmentRecord:
        plan, folder = self._spec.segment(index), self._spec.folder
        return SegmentRecord(
            index,
            plan.take,
            plan.prompt,
            plan.seed,
            plan.first_frame,
            plan.num_frames,
            folder.relative(self._spec.latents(index)),
            folder.relative(self._spec.media(index)),
            FIGURES | {"publish_at": 3.0 * index},
            dict.fromkeys(("latents", "media", "init"), "0" * 16),
        )
