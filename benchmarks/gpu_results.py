"""What the GPU benchmarks write: rows as they are measured, bars, a table, a plot.

    python benchmarks/gpu_results.py benchmarks/results/wan_table ...     results.json there -> results.md, results.png

A row that fails, or for which no time is left, is said so and loses nothing of the others: results.json is written
after each.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402

Figures = dict[str, Any]
HIDDEN = ("name", "each")  # of a row, not in the table


class LeftOut(Exception):
    """A row that cannot be measured here; the message says why."""


class Results:
    """The rows of one benchmark in `folder`. `figure` is the one that is drawn; `seconds` bound what is begun."""

    def __init__(self, args: argparse.Namespace, task: Mapping[str, Any], *, figure: str) -> None:
        self.folder: Path = args.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self._started, self._seconds = time.monotonic(), args.seconds
        self.content: dict[str, Any] = {
            **provenance(args.device),
            "benchmark": Path(sys.argv[0]).stem,
            "task": dict(task),
            "figure": figure,
            "notes": [],
            "rows": [],
            "bars": [],
            "left_out": [],
        }
        self.write()

    @property
    def rows(self) -> list[Figures]:
        return self.content["rows"]  # type: ignore[no-any-return]

    @property
    def elapsed(self) -> float:
        """Seconds since the benchmark began."""
        return time.monotonic() - self._started

    def of(self, name: str) -> Figures:
        """The row of that name; an empty one where it was not measured."""
        return next((row for row in self.rows if row["name"] == name), {})

    def time_for(self, name: str) -> bool:
        """Whether a row may be begun; if not, it is left out."""
        if self.elapsed <= self._seconds:
            return True
        self._leave_out(name, f"no time left of {self._seconds:g} s")
        self.write()
        return False

    @contextmanager
    def row(self, name: str) -> Iterator[Figures]:
        """What is put into the row that is yielded; an earlier one of that name goes on. Its errors end here."""
        row = self.of(name) or {"name": name}
        try:
            yield row
        except Exception as error:
            if not isinstance(error, LeftOut):
                traceback.print_exc()
            said = str(error) if isinstance(error, LeftOut) else f"{type(error).__name__}: {error}"
            self._leave_out(name, said.strip().splitlines()[0])
        else:
            if row not in self.rows:
                self.rows.append(row)
            print(f"{self.elapsed:6.1f} s  {name}: {shown(row)}", flush=True)
        self.write()

    def bar(self, what: str, value: float | None, *, most: float | None = None, least: float | None = None) -> None:
        """A figure and what it must be; None where it was not measured. The same again replaces it."""
        met = None
        if value is not None:
            met = (most is None or value <= most) and (least is None or value >= least)
        self.content["bars"] = [bar for bar in self.content["bars"] if bar["what"] != what]
        self.content["bars"].append({"what": what, "value": value, "most": most, "least": least, "met": met})
        self.write()

    def note(self, sentence: str) -> None:
        """Something without which the figures would be misread."""
        print(f"note: {sentence}", flush=True)
        self.content["notes"].append(sentence)
        self.write()

    def _leave_out(self, name: str, why: str) -> None:
        if {"name": name, "why": why} not in self.content["left_out"]:
            self.content["left_out"].append({"name": name, "why": why})
        print(f"{self.elapsed:6.1f} s  {name}: left out: {why}", flush=True)

    def write(self) -> None:
        """results.json, whole or as it was."""
        self.content["seconds"] = round(self.elapsed, 1)
        draft = self.folder / "results.json.part"
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        draft.replace(self.folder / "results.json")

    def finish(self) -> None:
        """Print the tables, and write what else is made of them."""
        console = Console(width=230 if not sys.stdout.isatty() else None)
        for table in tables(self.content):
            console.print(table)
        write_report(self.folder)


def arguments(description: str, *, seconds: float, **options: Mapping[str, Any]) -> argparse.Namespace:
    """The command line that these benchmarks share, and options of one's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy model, and few of everything: within a minute")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help="no row is begun later than this")
    name = Path(sys.argv[0]).stem
    parser.add_argument("--output", type=Path, default=Path(f"runs/{name}"), help="a folder")
    for option, of in options.items():
        parser.add_argument(f"--{option.replace('_', '-')}", **of)
    args = parser.parse_args()
    if args.quick:
        args.seconds = max(args.seconds, 600.0)  # what is quick may run beside much else
    return args


MODE = {"choices": ["exact", "fast"], "default": "exact", "help": "engine.mode"}


def shown(figures: Mapping[str, Any]) -> str:
    """A row on one line."""
    return ", ".join(f"{key} {text(value)}" for key, value in figures.items() if key not in HIDDEN)


def text(value: Any) -> str:
    """A figure as tables have it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(text(one) for one in value)
    return str(value)


def tables(content: Mapping[str, Any]) -> list[Table]:
    """The rows, the bars, and what was left out."""
    columns = list(dict.fromkeys(key for row in content["rows"] for key in row if key not in HIDDEN))
    measured = Table("row", *columns, title="Measured")
    for row in content["rows"]:
        measured.add_row(row["name"], *(text(row.get(column)) for column in columns))
    bars = Table("figure", "measured", "bar", "met", title="Bars")
    for bar in content["bars"]:
        bound = f"≤ {bar['most']:g}" if bar["most"] is not None else f"≥ {bar['least']:g}"
        verdict = {None: "not measured", True: "met", False: "missed"}[bar["met"]]
        bars.add_row(bar["what"], text(bar["value"]), bound, verdict)
    left_out = Table("row", "why", title="Left out")
    for left in content["left_out"]:
        left_out.add_row(left["name"], left["why"])
    return [table for table in (measured, bars, left_out) if table.row_count]


def heading(content: Mapping[str, Any]) -> str:
    """What was measured, on what and when."""
    task = content["task"]
    size = f"{task['height']}×{task['width']}×{task['num_frames']}, {task['num_inference_steps']} steps"
    return f"{task['model']}, {size}, {task['torch_dtype']}; {content['device']}, {content['date'][:10]}"


def write_report(folder: Path) -> None:
    """results.md and results.png of the results.json in a folder."""
    content = json.loads((folder / "results.json").read_text())
    with (folder / "results.md").open("w") as file:
        file.write(f"# {content['benchmark']}\n\n{heading(content)}.\n\n")
        about = {key: content[key] for key in ("command", "date", "commit", "machine", "versions")}
        file.writelines(f"- {key}: {value}\n" for key, value in about.items())
        file.writelines(f"- note: {sentence}\n" for sentence in content["notes"])
        for table in tables(content):
            table.box, table.title, title = box.MARKDOWN, None, table.title
            file.write(f"\n## {title}\n\n")
            Console(file=file, width=260).print(table)
    _draw(content, folder / "results.png")


def _draw(content: Mapping[str, Any], path: Path) -> None:
    """The rows' figure as bars beside each other; without matplotlib, nothing but a word."""
    figure_name = content["figure"]
    rows = [row for row in content["rows"] if isinstance(row.get(figure_name), int | float)]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No {path.name}: matplotlib is not installed (the extra `plot`).")
        return
    if not rows:
        return
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    names, values = [row["name"] for row in rows], [row[figure_name] for row in rows]
    bars = axes.barh(names, values, color=["C0" if row.get("ours", True) else "0.6" for row in rows])
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3)
    axes.invert_yaxis()
    axes.set(xlabel=figure_name, xlim=(0, 1.12 * max(values)))
    figure.suptitle(heading(content), fontsize=9)  # over the names too: beside them a long one would be cut off
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        write_report(Path(given))
