"""What the three actors cost beside the same segments in a plain loop, decode and encode included.

    python benchmarks/overhead.py --output benchmarks/results/overhead        on a GPU: Wan2.1-1.3B with random weights
    python benchmarks/overhead.py --device cpu --pairs 5                      the embedded model, with the same threads
    python benchmarks/overhead.py --quick                                     a toy

Pairs of a loop in this process and of a run on Ray, one after the other, in which the model is loaded already. A
run's time is that from `submit` until its client has the last segment and the run is done. The loop decodes and encodes
as the actors do; these do it while the next segment is denoised, and also measure the joins.
"""

import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch

from benchmarks.gpu_actor import config_of
from benchmarks.gpu_results import MODE, LeftOut, Results, arguments
from benchmarks.ray_runs import DIRECTORY, Seen, folder_for_runs, in_denoiser, latents_at, private_ray, run
from benchmarks.real_size import PROMPT, Task, embeds, generate, save_model, stock_pipe, synchronise, task_for
from edit_ray.actors.messages import RunSpec
from edit_ray.cache.options import CacheOptions
from edit_ray.client import LongVideoClient
from edit_ray.config import Config
from edit_ray.engine.continuity import load_latents, save_latents
from edit_ray.engine.loading import usable_cores
from edit_ray.engine.segment import SegmentEngine
from edit_ray.files import write_atomic
from edit_ray.video.encode import encode

LOOP, ACTORS, FIRST = "plain loop", "three actors", "three actors, the first segment"
MOST_LATER_S = 1.5  # beyond a segment's own time, until its client has the first one
BARS = {"cuda": 1.01, "cpu": 1.05}


class Bench:
    """The same segments both ways."""

    def __init__(self, results: Results, task: Task, config: Config, folder: Path) -> None:
        self.results, self.task, self.config, self.folder = results, task, config, folder
        self.client = LongVideoClient(output=folder)
        self._runs = 0

    def load(self) -> None:
        """The model into both processes, and a first call of both, which is slow."""
        short = self.config.sampling.model_copy(update={"num_inference_steps": 2})
        of_one = {"sampling": short, "video": self.config.video.model_copy(update={"num_segments": 1})}
        with self.results.row("first run, model not loaded") as figures:
            seen = self.through_actors(self.config.model_copy(update=of_one))
            figures.update(seconds=seen.done, segments=1, steps=2)
        self.engine = SegmentEngine.load(self.config.model, self.config.engine.cpu_threads)
        self.engine.use_mode(self.config.engine.mode)
        self.engine.encode_prompts([PROMPT])
        self._segment(RunSpec("warm", self.folder, self.config, 1), 0, self.folder)

    def through_actors(self, config: Config | None = None) -> Seen:
        """A run of its own; its files stay until the benchmark ends."""
        self._runs += 1
        return run(self.client, config or self.config, f"run-{self._runs}")

    @property
    def last_run(self) -> str:
        return f"run-{self._runs}"

    def in_a_loop(self) -> dict[str, Any]:
        """Every segment: denoise, decode, encode, each file durable."""
        spec = RunSpec("loop", self.folder, self.config, self.config.num_segments)
        folder = self.folder / "loop"
        folder.mkdir(exist_ok=True)
        parts: dict[str, list[float]] = {"denoise": [], "decode": [], "encode": []}
        started = time.perf_counter()
        for index in range(self.config.num_segments or 0):
            for name, seconds in self._segment(spec, index, folder).items():
                parts[name].append(seconds)
        total = time.perf_counter() - started
        return {"total": total} | {f"{name}_s": median(of) for name, of in parts.items()}

    def _segment(self, spec: RunSpec, index: int, folder: Path) -> dict[str, float]:
        segment, device = spec.segment(index), self.engine.device.type
        moments = [time.perf_counter()]

        def lap() -> None:
            synchronise(device)
            moments.append(time.perf_counter())

        latents = self.engine.denoise(self.config.sampling, prompt=segment.prompt, seed=segment.seed)
        save_latents(folder / f"{index}.safetensors", latents)
        lap()
        frames = self.engine.decode(None, latents).numpy()
        lap()
        write_atomic(folder / f"{index}.mp4", encode(frames, fps=self.config.sampling.fps, options=self.config.output))
        lap()
        laps = (after - before for before, after in pairwise(moments))
        return dict(zip(("denoise", "decode", "encode"), laps, strict=True))

    def pair(self) -> None:
        """A loop, then a run; the rows' figures are those of all pairs so far."""
        if not self.results.time_for("another pair"):
            return
        segments = self.config.num_segments or 0
        with self.results.row(LOOP) as figures:
            found = self.in_a_loop()
            each = [*figures.get("each", []), found.pop("total") / segments]
            figures.update(found, ours=True, seconds=median(each), times=len(each), each=each)
        with self.results.row(ACTORS) as figures:
            seen = self.through_actors()
            loop = self.results.of(LOOP)
            each = [*figures.get("each", []), seen.done / segments]
            told = {
                f"{name}_s": median(of[f"{name}_s"] for of in seen.statistics)
                for name in ("denoise", "decode", "encode")
            }
            figures.update(
                told,
                ours=True,
                seconds=median(each),
                times=len(each),
                steady=seen.steady,
                first=seen.committed[0],
                first_later=seen.committed[0] - sum(loop[f"{name}_s"] for name in ("denoise", "decode", "encode")),
                ratio=median(of / to for of, to in zip(each, loop["each"], strict=True)),
                each=each,
            )
        with self.results.row(FIRST) as figures:
            figures.update(seen.first_by_stage, ours=True, seconds=seen.committed[0])

    def compare_latents(self) -> None:
        """A segment of the last run, bit for bit that of the loop and of diffusers' own pipeline."""
        with self.results.row("latents equal diffusers'") as figures:
            spec = RunSpec("loop", self.folder, self.config, self.config.num_segments)
            made = load_latents(latents_at(self.folder, self.last_run, 0))
            loop = load_latents(self.folder / "loop" / "0.safetensors")
            pipe = self.engine.pipe
            stock = generate(stock_pipe(pipe), self.task, embeds(pipe), seed=spec.segment(0).seed)
            equal = {"loop": torch.equal(made, loop), "diffusers": torch.equal(made, stock.float().cpu())}
            figures.update(compared=len(equal), equal=sum(equal.values()))
            self.results.bar("latents: diffusers eager = the actors', equal", sum(equal.values()) / 2, least=1.0)


def memory(_actor: Any) -> dict[str, int]:
    """Of the process that it is called in."""
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "allocated": torch.cuda.memory_allocated(),
    }


def note_memory(results: Results, device: str) -> None:
    """What the GPU actor has needed since it began, its model's loading included; the text encoder is a small one."""
    with results.row("GPU actor's memory") as figures:
        if device != "cuda":
            raise LeftOut("only a CUDA device says")
        found = in_denoiser(memory)
        figures.update({f"{name}_GB": size / 1e9 for name, size in found.items()})


def model_of(task: Task, device: str, embedded: bool, folder: Path) -> str:
    """What the actors are told to load."""
    if embedded:
        return "builtin:tiny_wan"
    return str(save_model(task, device, folder / "model"))


def main() -> None:
    """Measure, print, write."""
    args = arguments(
        __doc__ or "",
        seconds=120,
        mode=MODE,
        pairs={"type": int},
        steps={"type": int},
        segments={"type": int},
        directory=DIRECTORY,
    )
    embedded = args.device == "cpu" and not args.quick
    task = task_for(args.quick, num_inference_steps=args.steps or (4 if args.quick else 8))
    if embedded:
        size = {"height": 128, "width": 128, "guidance_scale": 4.0, "torch_dtype": "float32"}
        task = task_for(False, num_inference_steps=args.steps, model="the embedded model", **size)
    segments = args.segments or (2 if args.quick else 4)
    threads = 1 if args.quick else usable_cores()
    told = task.told() | {"quick": args.quick, "segments": segments, "threads": threads, "mode": args.mode}
    results = Results(args, told, figure="seconds")
    with folder_for_runs(args.directory, "overhead-", results.note) as folder:
        model = {"path": model_of(task, args.device, embedded, folder)}
        config = config_of(
            task,
            args.device,
            segments,
            cache=CacheOptions(),
            store={},
            threads=threads,
            model=model,
            engine={"mode": args.mode},
        )
        with private_ray(num_cpus=max(4, usable_cores())):
            measure(results, task, config, folder, args)
    results.finish()


def measure(results: Results, task: Task, config: Config, folder: Path, args: Any) -> None:
    """All rows."""
    bench = Bench(results, task, config, folder)
    bench.load()
    for pair in range(args.pairs or (1 if args.quick or args.device == "cuda" else 5)):
        bench.pair()
        shutil.rmtree(folder / bench.last_run / "segments", ignore_errors=True)
        if not args.quick:
            add_bars(results, args.device)
        if pair == 0 and args.mode == "exact":
            bench.compare_latents()
        if pair == 0:
            note_memory(results, args.device)


def add_bars(results: Results, device: str) -> None:
    """Of the pairs so far."""
    actors = results.of(ACTORS)
    results.bar("three actors / plain loop, per segment", actors.get("ratio"), most=BARS[device])
    if device == "cuda":
        later = "first segment visible after submit, beyond a segment's own time, s"
        results.bar(later, actors.get("first_later"), most=MOST_LATER_S)


if __name__ == "__main__":
    main()
