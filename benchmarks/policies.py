"""The front of cache policies and of other packages' caches: likeness to the uncached video against blocks evaluated.

    python benchmarks/policies.py --output benchmarks/results/front            everything, 16 prompts x 2 seeds
    python benchmarks/policies.py --quick                                      a look: a minute or two on a CPU
    python benchmarks/policies.py --methods teacache,"diffusers MagCache"      some of them
    python benchmarks/policies.py --device cuda --processes 8                  prompts dealt out among processes

All on the same weights in float32: an uncached run of each prompt and seed is the reference, then each method at each
setting makes the same videos, one at a time. At a share of the blocks a method enters with its best measured point at
or below it, nothing is interpolated. With several processes likeness is measured by all of them at once, then the
times by one alone, on the first prompt. Writes results.json (after every point), front.png, and with --videos
side-by-side mp4s of the first prompt (left: uncached) in the output folder. Times mean something only on a machine
that does nothing else.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

import torch  # noqa: E402
from diffusers import WanPipeline  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import MEASURES, Point, mean  # noqa: E402
from benchmarks.methods import METHODS, Method, Pipelines, Setting  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from benchmarks.report import SPEEDUPS, as_json, plot, tables, title, write_videos  # noqa: E402
from benchmarks.shards import Shard, joined, measure_in_processes  # noqa: E402
from edit_ray import EditWanPipeline  # noqa: E402
from edit_ray.tuning.likeness import likeness, psnr  # noqa: E402
from training.evaluate import scenes_of  # noqa: E402
from training.sampling import decode  # noqa: E402

BUILTIN = "builtin:tiny_wan"
SCENE_SEED, NOISE_SEED = 77_000, 770_000  # neither the training's nor the calibration's
_THE_SAME = 60.0  # dB: what rounding leaves of two runs of the same
_DECODED_TOGETHER = 16
WHOLE = Shard()


@dataclass(frozen=True)
class Task:
    """What is generated: prompts x seeds at one size."""

    prompts: list[str]
    seeds: int
    height: int = 128
    width: int = 128
    num_frames: int = 33
    num_inference_steps: int = 30
    guidance_scale: float = 4.0

    def samples(self, shard: Shard = WHOLE) -> Iterator[tuple[str, int]]:
        """Prompt and noise seed of every sample of a shard, the seeds of a prompt side by side."""
        for index, prompt in enumerate(self.prompts):
            for seed in range(self.seeds):
                if shard.has(index):
                    yield prompt, NOISE_SEED + index * self.seeds + seed


@dataclass(frozen=True)
class Sample:
    """Latents [1, C, t, h, w], the blocks that were evaluated for them and the loop's seconds."""

    latents: Tensor
    blocks: int
    seconds: float


class OutOfTime(Exception):
    """The minutes given are over."""


@dataclass
class Bench:
    """Generates and measures; `deadline` is of `time.monotonic`."""

    pipelines: Pipelines
    task: Task
    deadline: float = float("inf")
    shard: Shard = WHOLE
    references: dict[str, list[Sample]] = field(default_factory=dict)
    videos: list[Tensor] = field(default_factory=list)  # of our references
    _blocks: int = 0
    _embeds: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Count each block that runs by its self-attention, which a skipped block does not reach."""
        for expert in (self.pipelines.ours.transformer, self.pipelines.ours.transformer_2):
            for block in expert.blocks if expert is not None else ():
                block.attn1.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: Any) -> None:
        self._blocks += 1

    def generate(self, pipe: Any, prompt: str, seed: int) -> Sample:
        """One video."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        size = {key: value for key, value in asdict(self.task).items() if key not in ("prompts", "seeds")}
        embeds = self._encode(prompt)
        self._blocks = 0
        _synchronise()
        started = time.perf_counter()
        latents = pipe(
            **embeds,
            **size,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            return_dict=False,
        )[0]
        _synchronise()
        return Sample(latents, self._blocks, time.perf_counter() - started)

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """The embeddings of a prompt, made once: they are no part of the loop."""
        if prompt not in self._embeds:
            pipe = self.pipelines.ours
            embeds = pipe.encode_prompt(prompt, "", max_sequence_length=512, device=pipe._execution_device)
            self._embeds[prompt] = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
        return self._embeds[prompt]

    def decode(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Their videos, each [3, T, H, W] in [0, 1]."""
        latents = torch.cat([sample.latents for sample in samples])
        clips = [decode(self.pipelines.ours, part) for part in latents.split(_DECODED_TOGETHER)]
        return list(torch.cat(clips).float().clamp(-1, 1) / 2 + 0.5)

    def measure_references(self) -> None:
        """The uncached runs: of our pipeline, and of diffusers' for the times of what runs under it.

        Raises:
            RuntimeError: the two differ.
        """
        pipes = {"ours": self.pipelines.ours, "peer": self.pipelines.stock}
        prompt, seed = next(self.task.samples(self.shard))
        for pipe in pipes.values():
            self.generate(pipe, prompt, seed)  # a first call is slow
        self.references = {group: [] for group in pipes}
        for prompt, seed in self.task.samples(self.shard):
            for group, pipe in pipes.items():
                self.references[group].append(self.generate(pipe, prompt, seed))
        self.videos, stock = (self.decode(samples) for samples in self.references.values())
        for ours, other in zip(self.videos, stock, strict=True):
            if psnr(ours, other) < _THE_SAME:
                raise RuntimeError("Uncached, our pipeline and diffusers' give different videos: nothing to compare.")

    def measure(self, method: Method, setting: Setting) -> tuple[Point, Tensor]:
        """A point, and the video of the first sample.

        The method is turned on anew for each sample, so that nothing that it keeps comes from another.
        """
        made: list[Sample] = []
        for prompt, seed in self.task.samples(self.shard):
            with ExitStack() as stack:
                try:
                    pipe = stack.enter_context(method.enable(self.pipelines, setting))
                    made.append(self.generate(pipe, prompt, seed))
                except (ImportError, ValueError, TypeError) as error:
                    raise NotPossible(f"{type(error).__name__}: {error}") from error
        references, videos = self.references[method.group], self.decode(made)
        shares = [sample.blocks / reference.blocks for sample, reference in zip(made, references, strict=True)]
        pairs = zip(videos, self.videos, strict=True)
        alike = [likeness(video.transpose(0, 1), reference.transpose(0, 1)) for video, reference in pairs]
        point = Point(
            method=method.name,
            group=method.group,
            setting=setting,
            share=mean(shares),
            time=sum(sample.seconds for sample in made) / sum(reference.seconds for reference in references),
            shares=shares,
            **{name: [getattr(each, name) for each in alike] for name in MEASURES},
        )
        return point, videos[0].cpu()

    def check_unchanged(self) -> None:
        """Whether the model is what it was before all methods; raises RuntimeError if it is not."""
        again = self.generate(self.pipelines.ours, *next(self.task.samples(self.shard)))
        same = psnr(self.decode([again])[0], self.videos[0]) >= _THE_SAME
        if not same or again.blocks != self.references["ours"][0].blocks:
            raise RuntimeError("A method has changed the model: the uncached video is another one now.")


class NotPossible(Exception):
    """A method cannot be turned on here; the message says why."""


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(methods: list[Method]) -> list[tuple[Method, Setting]]:
    """The first setting of each method, then the second of each: what a run cut short has is of all methods."""
    rows = zip_longest(*([(method, setting) for setting in method.settings] for method in methods))
    return [pair for row in rows for pair in row if pair is not None]


def load(model: str, device: str, steps: int) -> Pipelines:
    """Both pipelines on one set of components, in float32 proper."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ours = EditWanPipeline.from_pretrained(model, torch_dtype=torch.float32, device=device)
    config = {key: ours.config[key] for key in ("expand_timesteps", "boundary_ratio")}
    stock = WanPipeline(**ours.components, **config)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    return Pipelines(ours, stock, steps)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILTIN, help="what EditWanPipeline.from_pretrained takes")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt a line; drawn for the embedded model")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2, help="videos of each prompt")
    parser.add_argument("--methods", help=f"some of: {', '.join(method.name for method in METHODS)}")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 1 seed, 6 steps, small, few settings")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's on the CPU; small models are fastest on one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="add no point after this time")
    parser.add_argument("--processes", type=int, default=1, help="measure likeness in so many at once")
    parser.add_argument("--shard", type=Shard.parse, default=WHOLE, help="only every N-th prompt, such as 0/8")
    parser.add_argument("--output", type=Path, default=Path("runs/front"), help="a folder")
    parser.add_argument("--videos", action="store_true", help="also mp4s of the first prompt")
    args = parser.parse_args()
    if args.prompts is None and args.model != BUILTIN:
        parser.error(f"--prompts is needed for any model but {BUILTIN}")
    names = [method.name for method in METHODS]
    args.methods = names if args.methods is None else [name.strip() for name in args.methods.split(",")]
    if unknown := [name for name in args.methods if name not in names]:
        parser.error(f"--methods has {', '.join(unknown)}; it may have {', '.join(names)}")
    if args.seeds < 1 or args.num_prompts < 1 or args.processes < 1:
        parser.error("--seeds, --num-prompts and --processes take a number from 1")
    return args


def task_of(args: argparse.Namespace) -> Task:
    """What the command line asks to be generated."""
    if args.prompts is not None:
        prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()][: args.num_prompts]
    else:
        prompts = scenes_of(args.num_prompts, SCENE_SEED)[1]
    task = Task(prompts, args.seeds)
    if args.quick:
        return replace(task, prompts=prompts[:2], seeds=1, height=64, width=64, num_frames=9, num_inference_steps=6)
    return task


@dataclass
class Results:
    """What is measured, as it grows; `missing` are the pairs of method and setting to come."""

    missing: list[tuple[str, Setting]]
    points: list[Point] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    videos: dict[int, Tensor] = field(default_factory=dict)  # of the first sample, by point


def measure_all(bench: Bench, methods: list[Method], write: Callable[[Results], None]) -> Results:
    """Every method at every setting, until the time is over; `write` is called after each."""
    started = time.monotonic()
    results = Results([(method.name, setting) for method, setting in in_turns(methods)])
    write(results)
    try:
        bench.measure_references()
        for method, setting in in_turns(methods):
            if method.name not in results.skipped:
                try:
                    point, video = bench.measure(method, setting)
                except NotPossible as reason:
                    results.skipped[method.name] = str(reason)
                else:
                    results.videos[len(results.points)] = video
                    results.points.append(point)
                    seconds = f"{time.monotonic() - started:6.0f} s"
                    name = f"{method.name} {setting}"
                    print(f"{seconds}  {name}: {point.share:.3f} of the blocks, {mean(point.psnr):.2f} dB", flush=True)
            results.missing.remove((method.name, setting))
            write(results)
        bench.check_unchanged()
    except OutOfTime:
        print(f"Out of time; {len(results.missing)} points are missing.")
    return results


def measure_in_parts(args: argparse.Namespace, bench: Bench, methods: list[Method]) -> Results:
    """Likeness by several processes at once; then times by this one alone, of the first prompt's videos."""
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    shards = measure_in_processes(args.processes, sys.argv[1:], args.output / "shards", gpus)
    timed = measure_all(bench, methods, lambda results: None)
    points = joined(shards, timed.points)
    measured = [(point.method, point.setting) for point in points]
    there = [(method.name, setting) for method, setting in in_turns(methods) if method.name not in timed.skipped]
    found = [(point.method, point.setting) for point in timed.points]
    videos = {index: timed.videos[found.index(name)] for index, name in enumerate(measured)}
    return Results([name for name in there if name not in measured], points, timed.skipped, videos)


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    deadline = time.monotonic() + 60 * args.minutes
    task = task_of(args)
    in_parts = args.processes > 1 and args.shard == WHOLE
    pipelines = load(args.model, args.device, task.num_inference_steps)
    # In parts this process has the first prompt alone, and its time begins when the others are through.
    shard = Shard(0, len(task.prompts)) if in_parts else args.shard
    bench = Bench(pipelines, task, float("inf") if in_parts else deadline, shard)
    methods = [method for method in METHODS if method.name in args.methods]
    if args.quick:
        methods = [replace(method, settings=method.settings[:3:2]) for method in methods]
    args.output.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = provenance(args.device) | {"model": args.model, "task": asdict(task)}

    def write(results: Results) -> None:
        content = as_json(about, results.points, results.skipped, results.missing, task.seeds)
        (args.output / "results.json").write_text(json.dumps(content, indent=1) + "\n")

    results = measure_in_parts(args, bench, methods) if in_parts else measure_all(bench, methods, write)
    write(results)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    for table in tables(results.points, results.skipped, results.missing, task.seeds):
        console.print(table)
    if results.points and args.shard == WHOLE:
        plot(results.points, args.output / "front.png", title(about))
        if args.videos:
            folder = args.output / "videos"
            write_videos(results.points, results.videos, bench.videos[0].cpu(), folder, SPEEDUPS[1])


if __name__ == "__main__":
    main()
