"""How visible the joins of segments are, and how far colours drift, in every continuity mode.

    python benchmarks/continuity.py --device cuda --processes 8     everything: 4 seeds, 8 segments
    python benchmarks/continuity.py --quick                         a look: about a minute on a CPU
    python benchmarks/continuity.py --modes "none; history"         some of them

One prompt, the same seeds in each mode, on the embedded model in float32. A join's seam score is the worst of four
figures, each relative to the frames around it (`edit_ray/video/seam.py`); 0 is seamless. What it is worth is shown by
the same score at all places inside the segments. Writes results.json, continuity.md, continuity.png and joins.png, the
frames around the middle join of the first seed, into the output folder.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.continuity_report import as_table, join_strip, plot, stack_strips, verdicts  # noqa: E402
from benchmarks.long_videos import Maker, Seams, Task, load  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from benchmarks.shards import Shard, measure_in_processes  # noqa: E402
from edit_ray.engine.options import ContinuityOptions  # noqa: E402

WHOLE = Shard()
QUICK = {"seeds": 2, "segments": 3, "height": 64, "width": 64, "num_inference_steps": 6}


@dataclass(frozen=True)
class Variant:
    """A mode with its options, and whether openings are reused (`warm_start`)."""

    name: str
    continuity: ContinuityOptions
    reuse: bool = False


def overlapping(source: str, adain: float = 0.0) -> Variant:
    """`overlap` with a source."""
    name = f"overlap, {source}" + (f", adain {adain:g}" if adain else "")
    return Variant(
        name, ContinuityOptions.model_validate({"mode": "overlap", "overlap_source": source, "adain": adain})
    )


VARIANTS = [
    Variant("none", ContinuityOptions(mode="none")),
    Variant("history", ContinuityOptions(mode="history")),
    overlapping("hybrid"),
    overlapping("latent"),
    overlapping("reencode"),
    Variant("warm_start", ContinuityOptions(mode="warm_start"), reuse=True),
    Variant("history, adain 0.25", ContinuityOptions(mode="history", adain=0.25)),
    overlapping("hybrid", 0.25),
    Variant("image, still", ContinuityOptions(mode="image", picture_as="still")),
    Variant("image, first_frame", ContinuityOptions(mode="image")),
]


def measure(maker: Maker, variant: Variant, output: Path) -> dict[str, Any]:
    """A variant's videos: the seams of each, and a strip of frames around the middle join of the first."""
    task, cache = maker.task, None
    if variant.reuse:
        cache = maker.pipe.enable_cache("warmstart_reuse", task.num_inference_steps, warm_steps=2, inner="always")

    def before(index: int) -> None:
        if cache is not None:
            cache.set_generation(index)
            cache.set_reuse_window(range(max(0, index - 2), index))

    started = time.perf_counter()
    made = maker.make(variant.continuity, before)
    seconds = time.perf_counter() - started
    maker.pipe.disable_cache()
    layout = task.layout(variant.continuity)
    seams = [Seams.of(frames, layout, task.segments) for frames in made.frames]
    join = layout.first_frame(task.segments // 2)
    join_strip(made.frames[0], join).save(output / f"{variant.name}.png")
    return {
        "name": variant.name,
        "continuity": variant.continuity.model_dump(exclude={"init"}),
        "frames": made.frames.shape[1],
        "seconds": seconds,
        "blocks": made.blocks,
        "seeds": [asdict(of_video) for of_video in seams],
    }


def measure_all(args: argparse.Namespace, task: Task) -> list[dict[str, Any]]:
    """The variants of this process, one after the other."""
    maker, measured = Maker(load(args.model, args.device), task), []
    for index, variant in enumerate(args.variants):
        if args.shard.has(index):
            measured.append(measure(maker, variant, args.output))
            print(f"{variant.name}: {measured[-1]['seconds']:.0f} s", flush=True)
    return measured


def measure_in_parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same by several processes at once."""
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    folder = args.output / "shards"
    shards = measure_in_processes(args.processes, sys.argv[1:], folder, gpus)
    found = {variant["name"]: variant for shard in shards for variant in shard["variants"]}
    for path in folder.glob("*/*.png"):
        shutil.copy(path, args.output)
    shutil.rmtree(folder)
    return [found[variant.name] for variant in args.variants]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny_wan", help="a model with per-token timesteps")
    parser.add_argument("--prompt", default=Task.prompt)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--segments", type=int)
    parser.add_argument("--modes", help=f"some of: {'; '.join(variant.name for variant in VARIANTS)}")
    parser.add_argument(
        "--quick", action="store_true", help=", ".join(f"{key} {value}" for key, value in QUICK.items())
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's on the CPU; small models are fastest on one")
    parser.add_argument("--processes", type=int, default=1, help="share the modes among so many at once")
    parser.add_argument("--shard", type=Shard.parse, default=WHOLE, help="only every N-th mode, such as 0/8")
    parser.add_argument("--output", type=Path, default=Path("runs/continuity"), help="a folder")
    args = parser.parse_args()
    names = [variant.name for variant in VARIANTS]
    wanted = names if args.modes is None else [name.strip() for name in args.modes.split(";")]
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--modes has {'; '.join(unknown)}; it may have {'; '.join(names)}")
    args.variants = [variant for variant in VARIANTS if variant.name in wanted]
    if (args.seeds or 1) < 1 or args.processes < 1:
        parser.error("--seeds and --processes take a number from 1")
    if args.segments is not None and args.segments < 2:
        parser.error("--segments takes a number from 2: one segment has no join")
    return args


def task_of(args: argparse.Namespace) -> Task:
    """What the command line asks to be generated."""
    task = Task(prompt=args.prompt, **(QUICK if args.quick else {}))
    given = {name: getattr(args, name) for name in ("seeds", "segments") if getattr(args, name) is not None}
    return replace(task, **given)


def write(output: Path, about: Mapping[str, Any], variants: Sequence[Mapping[str, Any]], whole: bool) -> None:
    """Everything that was measured; tables and pictures only of the whole."""
    content = {**about, "verdicts": verdicts(variants), "variants": variants}
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    if not whole:
        return
    task = about["task"]
    with (output / "continuity.md").open("w") as file:
        file.write(f'# Continuity\n\n{about["model"]}, {task["seeds"]} seeds of "{task["prompt"]}", ')
        file.write(f"{task['segments']} segments, {task['num_inference_steps']} steps; {about['device']}.\n\n")
        file.writelines(f"- {key}: {about[key]}\n" for key in ("command", "date", "commit", "versions"))
        table = as_table(variants)
        table.box = box.MARKDOWN
        Console(file=file, width=200).print(table)
        file.writelines(f"\n- {line}" for line in content["verdicts"])
        file.write("\n")
    plot(variants, output / "continuity.png")
    stack_strips({variant["name"]: output / f"{variant['name']}.png" for variant in variants}, output / "joins.png")


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    task = task_of(args)
    args.output.mkdir(parents=True, exist_ok=True)
    in_parts = args.processes > 1 and args.shard == WHOLE
    variants = measure_in_parts(args) if in_parts else measure_all(args, task)
    about = provenance(args.device) | {"model": args.model, "task": asdict(task)}
    write(args.output, about, variants, whole=args.shard == WHOLE)
    if args.shard == WHOLE:
        Console(width=150 if not sys.stdout.isatty() else None).print(as_table(variants))
        print("\n".join(verdicts(variants)))


if __name__ == "__main__":
    main()
