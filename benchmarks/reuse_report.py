"""What the reuse benchmark's measurements look like: tables, verdicts, plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.long_videos import mean
from benchmarks.measure import mean_interval

Measured = Mapping[str, Any]


def differences(warm: Measured, measured: Sequence[Measured]) -> list[float]:
    """dB by seed that a setting is above TeaCache with as many skips in the same segments, in the same mode."""
    other = next(
        found
        for found in measured
        if found["kind"] == "teacache" and found["mode"] == warm["mode"] and found["skips"] == warm["skips"]
    )
    return [one - two for one, two in zip(warm["psnr"], other["psnr"], strict=True)]


def as_tables(measured: Sequence[Measured]) -> list[Table]:
    """One table a mode, by blocks evaluated: the more are skipped, the further down."""
    tables = []
    for mode in dict.fromkeys(found["mode"] for found in measured):
        table = Table(
            "method", "blocks", "PSNR dB", "against TeaCache dB", "seam", "colour drift", title=f"Mode {mode}"
        )
        rows = [found for found in measured if found["mode"] == mode]
        for found in sorted(rows, key=lambda row: (sum(row["skips"]), row["skips"], row["kind"])):
            against = f"{mean(differences(found, measured)):+.2f}" if found["kind"] == "warm" else ""
            table.add_row(
                found["name"],
                f"{found['share']:.4f}",
                f"{mean(found['psnr']):.2f}",
                against,
                f"{mean(found['seam']):.2f}",
                f"{mean(found['color_drift']):.1f}",
            )
        tables.append(table)
    return tables


def verdicts(measured: Sequence[Measured]) -> list[str]:
    """Per mode and alignment, the setting that is furthest above TeaCache at equal blocks, and whether it wins."""
    lines = []
    for mode in dict.fromkeys(found["mode"] for found in measured):
        for align in ("step", "last"):
            warm = [
                found
                for found in measured
                if found["mode"] == mode and found["kind"] == "warm" and found["setting"]["align"] == align
            ]
            if not warm:
                continue
            best = max(warm, key=lambda found: mean(differences(found, measured)))
            middle, low, high = mean_interval(differences(best, measured), seeds=1)
            said = "wins" if low > 0 else "loses" if high < 0 else "is no better and no worse"
            above = sum(mean(differences(found, measured)) > 0 for found in warm)
            lines.append(
                f"{mode}, align {align}: {above} of {len(warm)} settings above TeaCache at equal blocks; the best, "
                f"{best['name']}, {said}: {middle:+.2f} dB ({low:+.2f} to {high:+.2f})"
            )
    return lines


def plot(measured: Sequence[Measured], path: Path) -> None:
    """PSNR over the share of blocks, one panel a mode; without matplotlib, nothing but a word."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No {path.name}: matplotlib is not installed (the extra `plot`).")
        return
    modes = list(dict.fromkeys(found["mode"] for found in measured))
    figure = Figure(figsize=(6 * len(modes), 5), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        of_mode = [found for found in measured if found["mode"] == mode]
        groups = {
            ("TeaCache", "s--"): [found for found in of_mode if found["kind"] == "teacache"],
            ("align step", "o"): [found for found in of_mode if found.get("setting", {}).get("align") == "step"],
            ("align last", "^"): [found for found in of_mode if found.get("setting", {}).get("align") == "last"],
        }
        for (label, style), of_group in groups.items():
            points = sorted((found["share"], mean(found["psnr"])) for found in of_group)
            axes.plot([share for share, _ in points], [decibels for _, decibels in points], style, label=label)
        axes.set(title=f"mode {mode}", xlabel="blocks evaluated / all blocks", ylabel="PSNR against uncached, dB")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
