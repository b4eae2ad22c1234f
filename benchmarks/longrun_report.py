"""What a long run's bytes look like: a table, when each tier engages, a plot and a GIF of the tiers filling."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
FLAT_FROM = 30  # generations, after which the resident set is compared with itself
_SHOWN = 20  # rows of a table at most, and ...
_FRAMES = 60  # ... pictures of a GIF
_COLOURS = {"device": "#c0392b", "host": "#e59866", "disk": "#5d7b9d"}


@dataclass(frozen=True)
class Row:
    """The end of a generation. Spills and evictions are of all generations so far, milliseconds of this one.

    `tier_bytes` is what each tier holds or has reserved, `file_bytes` what of it or of the host's lies in files too;
    `resident_bytes` is the own and shared memory of the process that has the store.
    """

    generation: int
    tier_bytes: dict[str, int]
    file_bytes: int
    spills: int
    evictions: int
    put_ms: float
    get_ms: float
    resident_bytes: int

    @property
    def total(self) -> int:
        """Bytes in all tiers."""
        return sum(self.tier_bytes.values())


def summary(rows: Sequence[Row], bounds: Mapping[str, int]) -> dict[str, Any]:
    """From which generation on what holds, None if it never does; and how the total and the resident set vary.

    `flat_from` is the first generation from which every tier holds the same to the end. The spread of the resident set
    is (highest - lowest) / lowest from generation 30 on, None where there are not two.
    """
    tiers = rows[0].tier_bytes
    late = [row.resident_bytes for row in rows if row.generation >= FLAT_FROM]
    changes = [row.generation for row in rows if row.tier_bytes != rows[-1].tier_bytes]
    return {
        "full_from": {tier: _pinned(rows, tier, bounds[tier]) for tier in tiers},
        "engaged_from": {tier: _first(row.generation for row in rows if row.tier_bytes[tier]) for tier in tiers},
        "evicts_from": _first(row.generation for row in rows if row.evictions),
        "flat_from": max(changes, default=0) + 1,
        "most_bytes": max(row.total for row in rows),
        "resident_spread": (max(late) - min(late)) / min(late) if len(late) > 1 else None,
    }


def _first(generations: Iterable[int]) -> int | None:
    return next(iter(generations), None)


def _pinned(rows: Sequence[Row], tier: str, bound: int) -> int | None:
    """The first generation from which a tier is at its bound, to the end."""
    below = max((row.generation for row in rows if row.tier_bytes[tier] != bound), default=0)
    return below + 1 if below < rows[-1].generation else None


def shown(rows: Sequence[Row]) -> list[Row]:
    """The rows of a table: all of a few, else the first ones, and every so many."""
    if len(rows) <= 2 * _SHOWN:
        return list(rows)
    every = -(-len(rows) // _SHOWN)
    return [row for row in rows if row.generation <= _SHOWN or row.generation % every == 0 or row is rows[-1]]


def table(rows: Sequence[Row]) -> Table:
    """A line for each generation."""
    tiers = list(rows[0].tier_bytes)
    sizes_of = (*tiers, "total", "files", "resident")
    title = "Bytes in MiB at each generation's end"
    made = Table("generation", *sizes_of, "spills", "evictions", "put ms", "get ms", title=title)
    for column in made.columns:
        column.justify = "right"
    for row in shown(rows):
        sizes = [*row.tier_bytes.values(), row.total, row.file_bytes, row.resident_bytes]
        counts = (str(row.spills), str(row.evictions), f"{row.put_ms:.1f}", f"{row.get_ms:.1f}")
        made.add_row(str(row.generation), *(f"{size / MIB:.4g}" for size in sizes), *counts)
    return made


def draw(rows: Sequence[Row], folder: Path, heading: str) -> None:
    """tiers.png and tiers.gif in a folder; without matplotlib, nothing but a word."""
    try:
        from matplotlib.figure import Figure
        from PIL import Image  # matplotlib needs it too
    except ImportError:
        print("No tiers.png and tiers.gif: matplotlib is not installed (the extra `plot`).")
        return
    every = -(-len(rows) // _FRAMES)
    frames = []
    for count in [*range(1, len(rows), every), len(rows)]:
        figure = Figure(figsize=(8, 5), layout="constrained")
        tiers, resident = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        _bars(tiers, rows, count)
        _resident(resident, rows, count)
        figure.suptitle(heading, fontsize=10)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=90)
        frames.append(Image.open(picture).convert("P"))
    (folder / "tiers.png").write_bytes(picture.getvalue())
    pauses = [150] * (len(frames) - 1) + [2500]  # ms
    frames[0].save(folder / "tiers.gif", save_all=True, append_images=frames[1:], duration=pauses, loop=0)


def _bars(axes: "Axes", rows: Sequence[Row], count: int) -> None:
    """The first `count` generations as bars of bytes on each other; the axes are those of all of them."""
    generations = [row.generation for row in rows[:count]]
    base = [0.0] * count
    for tier in rows[0].tier_bytes:
        heights = [row.tier_bytes[tier] / MIB for row in rows[:count]]
        axes.bar(generations, heights, bottom=base, width=0.9, color=_COLOURS.get(tier), label=tier)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    axes.set(xlim=(0, len(rows) + 1), ylim=(0, 1.15 * max(row.total for row in rows) / MIB), ylabel="in the tiers, MiB")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", ncols=3, fontsize=8)


def _resident(axes: "Axes", rows: Sequence[Row], count: int) -> None:
    """The resident set of the same generations, as a line."""
    axes.plot([row.generation for row in rows[:count]], [row.resident_bytes / MIB for row in rows[:count]], "k.-", ms=3)
    most = max(row.resident_bytes for row in rows) / MIB
    axes.set(ylim=(0, 1.15 * most), xlabel="generation", ylabel="resident, MiB")
    axes.grid(axis="y", alpha=0.3)
