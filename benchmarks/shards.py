"""One measurement by several processes: each takes some of the prompts, and what all have measured is joined."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import MEASURES, Point, mean

Results = Mapping[str, Any]
"""What `report.as_json` makes, read from a file again."""


@dataclass(frozen=True)
class Shard:
    """The prompts of one of `of` processes: every `of`-th, from `index` on."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Of "INDEX/OF", such as 0/8. Raises ValueError."""
        index, _, of = text.partition("/")
        shard = cls(int(index), int(of))
        if not 0 <= shard.index < shard.of:
            raise ValueError(f"{text} is no shard; it must be 0/N to N-1/N")
        return shard

    def has(self, prompt: int) -> bool:
        """Whether a prompt, by its index, is this process's."""
        return prompt % self.of == self.index


def measure_in_processes(number: int, arguments: Sequence[str], folder: Path, num_gpus: int) -> list[Results]:
    """The results of `number` processes with these arguments, the GPUs dealt out in turn; their logs lie in `folder`.

    Raises:
        RuntimeError: one of them failed.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(num_gpus)]
    running = []
    for index in range(number):
        output = folder / f"shard-{index}"
        output.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus[index % num_gpus]} if num_gpus else {})
        command = [sys.executable, sys.argv[0], *arguments, "--shard", f"{index}/{number}", "--output", str(output)]
        with (output / "log").open("w") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in running]
    if failed := [index for index, code in enumerate(codes) if code]:
        raise RuntimeError(f"Shard {failed[0]} failed; see {folder / f'shard-{failed[0]}' / 'log'}.")
    return [json.loads((folder / f"shard-{index}" / "results.json").read_text()) for index in range(number)]


def joined(shards: Sequence[Results], times: Sequence[Point]) -> list[Point]:
    """The points that every shard has, over all samples in their order, with the wall times of `times`.

    Points without a time are left out: processes that share a GPU measure none.
    """
    seeds = shards[0]["task"]["seeds"]
    prompts = range(len(shards[0]["task"]["prompts"]))
    time_of = {_name(point.method, point.setting): point.time for point in times}
    found = [{_name(point["method"], point["setting"]): point for point in shard["points"]} for shard in shards]

    def values(name: str, key: str) -> list[float]:
        of_prompt = [found[prompt % len(shards)][name][key] for prompt in prompts]
        starts = [prompt // len(shards) * seeds for prompt in prompts]
        return [value for of, start in zip(of_prompt, starts, strict=True) for value in of[start : start + seeds]]

    points = []
    for name, first in found[0].items():
        if name in time_of and all(name in of_shard for of_shard in found):
            shares = values(name, "shares")
            points.append(
                Point(
                    method=first["method"],
                    group=first["group"],
                    setting=first["setting"],
                    share=mean(shares),
                    time=time_of[name],
                    shares=shares,
                    **{measure: values(name, measure) for measure in MEASURES},
                )
            )
    return points


def _name(method: str, setting: Mapping[str, Any]) -> str:
    return f"{method} {json.dumps(setting, sort_keys=True)}"
