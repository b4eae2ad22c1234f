"""Reuse between segments against caching inside them, at equal blocks evaluated.

    python benchmarks/reuse.py --device cuda --processes 8     everything: 4 seeds, 8 segments, both modes
    python benchmarks/reuse.py --quick                         a look: two minutes on a CPU
    python benchmarks/reuse.py --modes warm_start              segments that stand alone only

`warmstart_reuse` begins a segment with the residuals of earlier ones, and computes all its other steps; TeaCache skips
as many steps inside the same segments. The reference is the uncached run of the same mode. Writes results.json,
reuse.md and reuse.png into the output folder.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.long_videos import Made, Maker, Seams, Task, load, mean  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from benchmarks.reuse_report import Measured, as_tables, plot, verdicts  # noqa: E402
from benchmarks.shards import Shard, measure_in_processes  # noqa: E402
from edit_ray.engine.options import ContinuityOptions  # noqa: E402
from edit_ray.tuning.likeness import psnr  # noqa: E402

WHOLE = Shard()
_HALVINGS = 12  # of the range of thresholds, to a 4000th
MODES = ("warm_start", "history")
QUICK = {"seeds": 1, "segments": 3, "height": 64, "width": 64, "num_inference_steps": 6}


@dataclass(frozen=True)
class Warm:
    """A setting of `warmstart_reuse`."""

    align: str
    combine: str
    window: int
    warm_steps: int

    @property
    def name(self) -> str:
        """On one line."""
        return f"{self.align}, {self.combine}, window {self.window}, {self.warm_steps} steps"

    def skips(self, segments: int) -> tuple[int, ...]:
        """Steps that each segment of a run skips: those of its opening, if an earlier one has stored something."""
        stored, skips = list[int](), list[int]()
        for segment in range(segments):
            found = any(earlier >= segment - self.window for earlier in stored)
            skips.append(self.warm_steps if found else 0)
            if not found or self.align == "last":  # the last residual of a segment is always its own
                stored.append(segment)
        return tuple(skips)


def settings(quick: bool = False) -> list[Warm]:
    """Every setting that differs: of one stored residual the mean is the latest."""
    windows, steps = ((2,), (1, 2)) if quick else ((1, 2, 4), (1, 2, 3, 4))
    return [
        Warm(align, combine, window, warm_steps)
        for align in ("step", "last")
        for window in windows
        for combine in (("latest", "mean") if align == "last" and window > 1 else ("latest",))
        for warm_steps in steps
    ]


@dataclass(frozen=True)
class Bench:
    """Makes and measures the videos of one mode."""

    maker: Maker
    mode: str
    thresholds: Sequence[float]  # of TeaCache, by the steps that it then skips
    reference: Made

    def measured(self, name: str, made: Made, **about: Any) -> dict[str, Any]:
        """The figures of a method's videos, by seed."""
        task, layout = self.maker.task, self.maker.task.layout(_continuity(self.mode))
        seams = [Seams.of(frames, layout, task.segments) for frames in made.frames]
        pairs = zip(made.frames, self.reference.frames, strict=True)
        return {
            "mode": self.mode,
            "name": name,
            **about,
            "share": made.blocks / self.reference.blocks,
            "psnr": [psnr(torch.from_numpy(one) / 255, torch.from_numpy(other) / 255) for one, other in pairs],
            "seam": [mean(of_video.joins) for of_video in seams],
            "color_drift": [of_video.color_drift[-1] for of_video in seams],
        }

    def uncached(self) -> dict[str, Any]:
        """The reference itself."""
        return self.measured("uncached", self.reference, kind="uncached", skips=[0] * self.maker.task.segments)

    def warm(self, setting: Warm) -> dict[str, Any]:
        """A setting of reuse between segments."""
        task = self.maker.task
        cache = self.maker.pipe.enable_cache(
            "warmstart_reuse",
            task.num_inference_steps,
            inner="always",
            **{key: value for key, value in asdict(setting).items() if key != "window"},
        )

        def before(index: int) -> None:
            cache.set_generation(index)
            cache.set_reuse_window(range(max(0, index - setting.window), index))

        made = self.maker.make(_continuity(self.mode), before)
        self.maker.pipe.disable_cache()
        return self.measured(
            setting.name, made, kind="warm", skips=list(setting.skips(task.segments)), setting=asdict(setting)
        )

    def teacache(self, skips: Sequence[int]) -> dict[str, Any]:
        """TeaCache with so many skipped steps in each segment."""
        pipe, steps = self.maker.pipe, self.maker.task.num_inference_steps

        def before(index: int) -> None:
            pipe.disable_cache()
            pipe.enable_cache("teacache", steps, rel_l1_thresh=self.thresholds[skips[index]])

        made = self.maker.make(_continuity(self.mode), before)
        pipe.disable_cache()
        return self.measured(f"teacache, {' '.join(map(str, skips))}", made, kind="teacache", skips=list(skips))


def _continuity(mode: str) -> ContinuityOptions:
    return ContinuityOptions.model_validate({"mode": mode})


def thresholds_by_skips(pipe: Any, steps: int, most: int) -> list[float]:
    """For 0 to `most` steps (the mean of the branches) the highest threshold found at which TeaCache skips no more."""

    def skipped(threshold: float) -> float:
        cache = pipe.enable_cache("teacache", steps, rel_l1_thresh=threshold)
        masks = cache.plan().values()
        pipe.disable_cache()
        return sum(not computes for mask in masks for computes in mask) / len(masks)

    thresholds = [0.0]
    for wanted in range(1, most + 1):
        low, high = thresholds[-1], 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if skipped(middle) <= wanted else (low, middle)
        thresholds.append(low)
    return thresholds


Work = tuple[str, Warm | tuple[int, ...] | None]


def work(modes: Sequence[str], warm: Sequence[Warm], segments: int) -> Iterator[Work]:
    """Everything to measure: per mode the reference, each setting, and TeaCache with the skips of each."""
    skips = sorted({setting.skips(segments) for setting in warm})
    for mode in modes:
        yield mode, None
        yield from ((mode, setting) for setting in warm)
        yield from ((mode, of_segments) for of_segments in skips)


def measure_all(args: argparse.Namespace, task: Task) -> list[dict[str, Any]]:
    """The work of this process, one piece after the other."""
    maker, warm = Maker(load(args.model, args.device), task), settings(args.quick)
    most = max(setting.warm_steps for setting in warm)
    thresholds = thresholds_by_skips(maker.pipe, task.num_inference_steps, most)
    benches: dict[str, Bench] = {}
    measured = []
    for index, (mode, what) in enumerate(work(args.modes, warm, task.segments)):
        if not args.shard.has(index):
            continue
        if mode not in benches:
            benches[mode] = Bench(maker, mode, thresholds, maker.make(_continuity(mode)))
        bench = benches[mode]
        if what is None:
            measured.append(bench.uncached())
        else:
            measured.append(bench.warm(what) if isinstance(what, Warm) else bench.teacache(what))
        print(f"{mode}: {measured[-1]['name']}: {mean(measured[-1]['psnr']):.2f} dB", flush=True)
    return measured


def measure_in_parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same by several processes at once."""
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    folder = args.output / "shards"
    shards = measure_in_processes(args.processes, sys.argv[1:], folder, gpus)
    shutil.rmtree(folder)
    return [found for shard in shards for found in shard["measured"]]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny_wan", help="a model with a calibration of teacache")
    parser.add_argument("--prompt", default=Task.prompt)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--segments", type=int)
    parser.add_argument("--modes", default=",".join(MODES), help="some of %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help=", ".join(f"{key} {value}" for key, value in QUICK.items())
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's on the CPU; small models are fastest on one")
    parser.add_argument("--processes", type=int, default=1, help="share the settings among so many at once")
    parser.add_argument("--shard", type=Shard.parse, default=WHOLE, help="only every N-th setting, such as 0/8")
    parser.add_argument("--output", type=Path, default=Path("runs/reuse"), help="a folder")
    args = parser.parse_args()
    args.modes = args.modes.split(",")
    if unknown := [mode for mode in args.modes if mode not in MODES]:
        parser.error(f"--modes has {', '.join(unknown)}; it may have {', '.join(MODES)}")
    if min(args.seeds or 1, args.processes) < 1 or (args.segments or 2) < 2:
        parser.error("--seeds and --processes take a number from 1, --segments one from 2")
    return args


def write(output: Path, about: Mapping[str, Any], measured: Sequence[Measured], whole: bool) -> None:
    """Everything that was measured; tables and plot only of the whole."""
    content = {**about, "verdicts": verdicts(measured) if whole else [], "measured": measured}
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    if not whole:
        return
    task = about["task"]
    with (output / "reuse.md").open("w") as file:
        file.write(f'# Reuse between segments\n\n{about["model"]}, {task["seeds"]} seeds of "{task["prompt"]}", ')
        file.write(f"{task['segments']} segments, {task['num_inference_steps']} steps; {about['device']}.\n\n")
        file.writelines(f"- {key}: {about[key]}\n" for key in ("command", "date", "commit", "versions"))
        file.writelines(f"\n- {line}" for line in content["verdicts"])
        file.write("\n")
        for table in as_tables(measured):
            table.box, table.title, heading = box.MARKDOWN, None, table.title
            file.write(f"\n## {heading}\n\n")
            Console(file=file, width=200).print(table)
    plot(measured, output / "reuse.png")


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    task = Task(prompt=args.prompt, **(QUICK if args.quick else {}))
    task = replace(
        task, **{name: value for name in ("seeds", "segments") if (value := getattr(args, name)) is not None}
    )
    args.output.mkdir(parents=True, exist_ok=True)
    in_parts = args.processes > 1 and args.shard == WHOLE
    measured = measure_in_parts(args) if in_parts else measure_all(args, task)
    about = provenance(args.device) | {"model": args.model, "task": asdict(task)}
    write(args.output, about, measured, whole=args.shard == WHOLE)
    if args.shard == WHOLE:
        console = Console(width=150 if not sys.stdout.isatty() else None)
        for table in as_tables(measured):
            console.print(table)
        print("\n".join(verdicts(measured)))


if __name__ == "__main__":
    main()
