"""The profiler's trace of a denoising loop with a known mask, as a picture: who waits for whom.

    python benchmarks/loop_trace.py --output benchmarks/results/loop_trace     Wan2.1-1.3B, random weights, on a GPU
    python benchmarks/loop_trace.py --draw runs/loop_trace                     the picture anew, of exact.trace.json
    python benchmarks/loop_trace.py --quick                                    a toy; a CPU has no kernels

Six steps, of which the third and the fifth are skipped. Above, when Python launches kernels; below, the kernels on the
GPU. A synchronisation would be a call that ends where a kernel does.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.provenance import provenance
from benchmarks.real_size import compiled_graphs, embeds, generate, make_pipe, synchronise, task_for
from edit_ray.engine.options import Mode

MASK = [True, True, False, True, False, True]
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
KINDS = {"attention": ("sdpa", "flash", "fmha"), "products": ("nvjet", "gemm", "cutlass"), "others": ("",)}


def trace(device: str, quick: bool, mode: Mode) -> dict[str, Any]:
    """Intervals in milliseconds of launches and of kernels, and the synchronisations from the second step on."""
    task = task_for(quick, num_inference_steps=len(MASK))
    pipe = make_pipe(task, device)
    pipe.use_mode(mode)
    pipe.enable_cache("schedule", len(MASK), mask=MASK)
    given = embeds(pipe)
    for _ in range(2):  # the first loops compile, and make what is kept
        generate(pipe, task, given)
    compiled = compiled_graphs()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=activities) as profiler:
            generate(pipe, task, given, callback_on_step_end=_mark)
            synchronise(device)
    return told(profiler.events(), task.told(), mode) | {"compilations": compiled_graphs() - compiled}


def _mark(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
    """Where in the trace a step has been queued."""
    with record_function("step"):
        return {}


def told(events: Any, task: dict[str, Any], mode: Mode) -> dict[str, Any]:
    """What of the profiler's events is drawn and counted."""
    steps = [event.time_range.start for event in events if event.name == "step" and _is_on(event, "CPU")]
    start, end = min(steps), max(steps)  # the first step has been queued, and the last

    def interval(event: Any) -> list[float]:
        return [round((event.time_range.start - start) / 1000, 4), round(event.time_range.elapsed_us() / 1000, 4)]

    on_cpu = [event for event in events if _is_on(event, "CPU")]
    kernels = [event for event in events if _is_on(event, "CUDA")]
    launches = [event for event in on_cpu if event.name.startswith(("cudaLaunch", "cuLaunch"))]
    waits = [event.name for event in on_cpu if event.name in WAITS and start <= event.time_range.start <= end]
    return {
        **provenance("cuda" if kernels else "cpu"),
        "task": task | {"mode": mode, "mask": MASK},
        "loop_ms": round((end - start) / 1000, 3),
        "launches": [interval(event) for event in launches],
        "kernels": [[*interval(event), kind_of(event.name)] for event in kernels if event.name != "step"],
        "synchronisations": {name: waits.count(name) for name in sorted(set(waits))},
    }


def _is_on(event: Any, device: str) -> bool:
    return str(event.device_type).endswith(device)


def kind_of(name: str) -> str:
    return next(kind for kind, words in KINDS.items() if any(word in name for word in words))


def draw(content: dict[str, Any], path: Path) -> None:
    """Launches and kernels over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.broken_barh([(at, max(took, 0.05)) for at, took in content["launches"]], (1.1, 0.8), facecolors="#555")
    for kind, colour in zip(KINDS, ("#c0392b", "#2980b9", "#95a5a6"), strict=True):
        bars = [(at, took) for at, took, of in content["kernels"] if of == kind]
        axes.broken_barh(bars, (0.1, 0.8), facecolors=colour, label=kind)
    last = max((at + took for at, took, _ in content["kernels"]), default=content["loop_ms"])
    axes.axvline(content["loop_ms"], color="#555", linestyle=":", label="the last step is queued")
    axes.set(yticks=[0.5, 1.5], yticklabels=["GPU kernels", "launches (CPU)"], xlim=(0, last), xlabel="ms")
    waits = sum(content["synchronisations"].values())
    axes.set_title(
        f"{content['task']['model']}, {content['device']}, mode {content['task']['mode']}: six steps, "
        f"two skipped; {waits} synchronisations in the loop"
    )
    axes.legend(loc="upper center", ncols=4, bbox_to_anchor=(0.5, -0.22), frameon=False)
    figure.savefig(path, dpi=110)


def note(content: dict[str, Any], mode: Mode, path: Path) -> None:
    """The figures of this mode beside those of the other: of launches and kernels their number."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[mode] = {key: len(of) if key in ("launches", "kernels") else of for key, of in content.items()}
    path.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    """Trace, count, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mode", choices=["exact", "fast"], default="exact")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/loop_trace"), help="a folder")
    parser.add_argument("--draw", type=Path, help="a folder with a trace, which is only drawn")
    args = parser.parse_args()
    folder: Path = args.draw or args.output
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.mode}.trace.json"
    if args.draw is None:
        path.write_text(json.dumps(trace(args.device, args.quick, args.mode)) + "\n")
    content = json.loads(path.read_text())
    note(content, args.mode, folder / "results.json")
    print(
        f"{content['loop_ms']} ms, {len(content['kernels'])} kernels, waits: {content['synchronisations'] or 'none'}, "
        f"compilations: {content['compilations']}"
    )
    try:
        draw(content, folder / f"{args.mode}.png")
    except ImportError:
        print(f"No {args.mode}.png: matplotlib is not installed (the extra `plot`).")


if __name__ == "__main__":
    main()
