"""What the front's measurements look like: tables, JSON, a plot, videos.

python benchmarks/report.py benchmarks/results/front        results.json there -> front.md and front.png beside it
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import Interval, Point, best_at, compare, mean, mean_interval

SPEEDUPS = (1.5, 2.0, 2.5)
_FPS = 16

Missing = Sequence[tuple[str, Mapping[str, Any]]]


def described(setting: Mapping[str, Any]) -> str:
    """A setting on one line."""
    return " ".join(f"{key}={f'{value:.3g}' if isinstance(value, float) else value}" for key, value in setting.items())


def tables(points: Sequence[Point], skipped: Mapping[str, str], missing: Missing, seeds: int) -> list[Table]:
    """All points by method, and the front: our best and the best peer at each share of the blocks."""
    columns = "method", "setting", "blocks", "time", "PSNR dB (95 %)", "SSIM (95 %)"
    measured = Table(*columns, "worst frame", "MS-GMSD", "flicker", title="Measured points")
    for point in sorted(points, key=lambda point: (point.group, point.method, -point.share)):
        measured.add_row(
            point.method,
            described(point.setting),
            f"{point.share:.3f}",
            f"{point.time:.2f}",
            _interval(mean_interval(point.psnr, seeds), 2),
            _interval(mean_interval(point.ssim, seeds), 4),
            *(f"{mean(values):.{digits}f}" if values else "" for values, digits in _beside(point)),
        )
    for name, reason in skipped.items():
        measured.add_row(name, f"skipped: {reason}")
    for name, setting in missing:
        measured.add_row(name, described(setting), "missing: out of time")
    front = Table(
        "blocks at most", "our best", "PSNR dB", "best peer", "PSNR dB", "difference dB (95 %)", title="Front"
    )
    for speedup in SPEEDUPS:
        found = compare(points, speedup, seeds)
        difference = "" if found.difference is None else _interval(found.difference, 2, sign="+")
        front.add_row(f"1/{speedup:g}", *_entry(found.ours), *_entry(found.peer), difference)
    return [measured, front]


def _beside(point: Point) -> tuple[tuple[list[float], int], ...]:
    """The measures beside PSNR and SSIM, and the digits of each: the worst frame's PSNR, MS-GMSD, flicker."""
    return (point.worst_psnr, 2), (point.gmsd, 4), (point.flicker, 2)


def _interval(interval: Interval, digits: int, sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.{digits}f}" for number in interval)
    return f"{value} ({low} to {high})"


def _entry(point: Point | None) -> tuple[str, str]:
    if point is None:
        return "no point", ""
    return f"{point.method} {described(point.setting)} ({point.share:.3f})", f"{mean(point.psnr):.2f}"


def as_json(
    about: Mapping[str, Any], points: Sequence[Point], skipped: Mapping[str, str], missing: Missing, seeds: int
) -> dict[str, Any]:
    """Everything that was measured, with its provenance."""

    def summary(point: Point) -> dict[str, Any]:
        return asdict(point) | {
            "psnr_interval": mean_interval(point.psnr, seeds),
            "ssim_interval": mean_interval(point.ssim, seeds),
        }

    return {
        **about,
        "points": [summary(point) for point in points],
        "front": [asdict(compare(points, speedup, seeds)) for speedup in SPEEDUPS],
        "skipped": dict(skipped),
        "missing": [{"method": name, "setting": dict(setting)} for name, setting in missing],
    }


def title(about: Mapping[str, Any]) -> str:
    """What was measured, on what and when."""
    task = about["task"]
    samples = f"{len(task['prompts'])} prompts x {task['seeds']} seeds, {task['num_inference_steps']} steps"
    return f"{about['model']}, {samples}; {about['device']}, {about['date'][:10]}"


def plot(points: Sequence[Point], path: Path, heading: str) -> None:
    """PSNR over the share of blocks, one line a method, peers dashed; without matplotlib, nothing but a word."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No front.png: matplotlib is not installed (the extra `plot`).")
        return
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.add_subplot()
    for speedup in SPEEDUPS:
        axes.axvline(1 / speedup, color="0.8", zorder=0)
        axes.annotate(f"1/{speedup:g}", (1 / speedup, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    cached = [point for point in points if point.share < 1]  # what skipped nothing has nothing to compare
    if not cached:
        print("No front.png: nothing was skipped.")
        return
    for index, method in enumerate(dict.fromkeys(point.method for point in cached)):
        line = sorted((point for point in cached if point.method == method), key=lambda point: point.share)
        style = {"ours": "o-", "peer": "s--"}[line[0].group]
        shares, figures = [point.share for point in line], [mean(point.psnr) for point in line]
        axes.plot(
            shares, figures, style, color=f"C{index}" if index < 10 else f"{0.15 * (index - 9):.2f}", label=method
        )
    axes.set(xlabel="blocks evaluated / all blocks (probes counted)", ylabel="PSNR against uncached, dB")
    axes.set_title(heading, pad=18)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)


def write_videos(
    points: Sequence[Point], videos: Mapping[int, Tensor], reference: Tensor, folder: Path, speedup: float
) -> None:
    """For each method its best point at 1 / `speedup` of the blocks: the first sample, left uncached, right cached.

    `videos` are those of the points by index, and like `reference` [3, T, H, W] in [0, 1].
    """
    from edit_ray.video.encode import OutputOptions, encode  # here, as tables and plots need no ffmpeg

    folder.mkdir(parents=True, exist_ok=True)
    for method in dict.fromkeys(point.method for point in points):
        best = best_at((point for point in points if point.method == method), 1 / speedup)
        if best is None:
            continue
        both = torch.cat([reference, videos[points.index(best)]], dim=3)  # [3, T, H, 2 W]
        frames = (both * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        (folder / f"{method.replace(' ', '_')}.mp4").write_bytes(encode(frames, fps=_FPS, options=OutputOptions()))


def main() -> None:
    """Tables and plot of results that were measured before."""
    folder = Path(sys.argv[1])
    content = json.loads((folder / "results.json").read_text())
    names = Point.__dataclass_fields__
    points = [Point(**{key: value for key, value in point.items() if key in names}) for point in content["points"]]
    missing = [(left["method"], left["setting"]) for left in content["missing"]]
    with (folder / "front.md").open("w") as file:
        file.write(f"# The front\n\n{title(content)}.\n\n")
        about = {key: content[key] for key in ("command", "date", "commit", "device", "versions")}
        file.writelines(f"- {key}: {value}\n" for key, value in about.items())
        for table in tables(points, content["skipped"], missing, content["task"]["seeds"]):
            table.box, table.title, heading = box.MARKDOWN, None, table.title
            file.write(f"\n## {heading}\n\n")
            Console(file=file, width=260).print(table)
    plot(points, folder / "front.png", title(content))


if __name__ == "__main__":
    main()
