"""What the continuity benchmark's measurements look like: table, verdicts, plot, frames around joins."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.table import Table

from benchmarks.long_videos import Frames, mean

HISTORY_TO_INTERIOR, NONE_TO_HISTORY, OVERLAP_TO_NONE = 1.25, 3.0, 0.75
SHOWN = 5  # frames before and after a join
_GAP, _LABEL = 8, 150

Measured = Mapping[str, Any]


def join_means(variant: Measured) -> list[float]:
    """The mean score of the joins, by seed."""
    return [mean(seed["joins"]) for seed in variant["seeds"]]


def interior_means(variant: Measured) -> list[float]:
    """The mean score inside segments, by seed."""
    return [mean(seed["interior"]) for seed in variant["seeds"]]


def as_table(variants: Sequence[Measured]) -> Table:
    """One row a mode; drift is from the first segment to the last, the mean over seeds of its size."""
    none = next((variant for variant in variants if variant["name"] == "none"), None)
    table = Table("mode", "joins", "inside", "joins / inside", "joins / none's", "worst join", "colour", "sharpness")
    for variant in variants:
        joins, interior = mean(join_means(variant)), mean(interior_means(variant))
        table.add_row(
            variant["name"],
            f"{joins:.2f}",
            f"{interior:.2f}",
            f"{joins / interior:.2f}",
            "" if none is None else f"{joins / mean(join_means(none)):.2f}",
            f"{max(max(seed['joins']) for seed in variant['seeds']):.2f}",
            f"{mean([abs(seed['color_drift'][-1]) for seed in variant['seeds']]):.1f}",
            f"{mean([abs(seed['sharpness_drift'][-1]) for seed in variant['seeds']]):.2f}",
        )
    return table


def verdicts(variants: Sequence[Measured]) -> list[str]:
    """Each bar with the figure, met or not met; nothing of modes that were not measured."""
    found = {variant["name"]: variant for variant in variants}
    lines = []
    if history := found.get("history"):
        ratio = mean(join_means(history)) / mean(interior_means(history))
        lines.append(_line("history: joins / inside", ratio, HISTORY_TO_INTERIOR, ratio <= HISTORY_TO_INTERIOR))
    none = found.get("none")
    if history and none:
        ratio = mean(join_means(none)) / mean(join_means(history))
        lines.append(_line("joins of none / joins of history", ratio, NONE_TO_HISTORY, ratio >= NONE_TO_HISTORY))
    for name, variant in found.items():
        if name.startswith("overlap") and none:
            ratio = mean(join_means(variant)) / mean(join_means(none))
            pairs = list(zip(join_means(variant), join_means(none), strict=True))
            lower = sum(one < other for one, other in pairs)
            met = ratio <= OVERLAP_TO_NONE and lower == len(pairs)
            where = f"{name}: joins / joins of none (lower for {lower} of {len(pairs)} seeds)"
            lines.append(_line(where, ratio, OVERLAP_TO_NONE, met))
    return lines


def _line(what: str, figure: float, bar: float, met: bool) -> str:
    return f"{'met' if met else 'NOT MET'}: {what} is {figure:.2f}, the bar {bar:g}"


def plot(variants: Sequence[Measured], path: Path) -> None:
    """Scores of joins and inside segments by seed, and drift of colour; without matplotlib, nothing but a word."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No {path.name}: matplotlib is not installed (the extra `plot`).")
        return
    figure = Figure(figsize=(12, 5), layout="constrained")
    scores, drift = figure.subplots(1, 2)
    for row, variant in enumerate(variants):
        for values, style, label in (
            (join_means(variant), "o", "joins"),
            (interior_means(variant), "|", "inside segments"),
        ):
            color = "C3" if style == "o" else "0.3"
            scores.plot(
                values, [row] * len(values), style, color=color, markersize=9, label=label if row == 0 else None
            )
        colors = [mean(of_segment) for of_segment in zip(*(s["color_drift"] for s in variant["seeds"]), strict=True)]
        drift.plot(range(len(colors)), colors, "o-", label=variant["name"])
    scores.set_yticks(range(len(variants)), [variant["name"] for variant in variants])
    scores.invert_yaxis()
    scores.set(xlabel="mean seam score, one mark a seed", xlim=(0, None))
    scores.legend()
    drift.set(xlabel="segment", ylabel="colour drift from the first, grey levels")
    drift.legend(fontsize="small")
    for axes in (scores, drift):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def join_strip(frames: Frames, join: int) -> Image.Image:
    """The frames of a video [F, H, W, 3] around a join, a gap where it is."""
    height, width = frames.shape[1:3]
    strip = Image.new("RGB", (2 * SHOWN * width + _GAP, height), "white")
    for column in range(2 * SHOWN):
        x = column * width + (_GAP if column >= SHOWN else 0)
        strip.paste(Image.fromarray(frames[join - SHOWN + column]), (x, 0))
    return strip


def stack_strips(strips: Mapping[str, Path], path: Path) -> None:
    """The strips under each other, with their names; they are removed."""
    images = {}
    for name, strip in strips.items():
        with Image.open(strip) as file:
            images[name] = file.convert("RGB")
        strip.unlink()
    width = max(image.width for image in images.values())
    sheet = Image.new("RGB", (_LABEL + width, sum(image.height + 4 for image in images.values())), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for name, image in images.items():
        draw.text((6, y + image.height // 2), name, fill="black")
        sheet.paste(image, (_LABEL, y))
        y += image.height + 4
    sheet.save(path)
