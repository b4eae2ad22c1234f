"""docs/gpu.md, and the table in README.md: made of the results of the GPU benchmarks, and of nothing else.

python benchmarks/gpu_page.py
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from benchmarks.gpu_results import HIDDEN, heading, text  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE, README = ROOT / "docs" / "gpu.md", ROOT / "README.md"
BEGIN, END = "<!-- wan_table: made by benchmarks/gpu_page.py -->", "<!-- /wan_table -->"

ABOUT = {
    "wan_table": "Steps skipped: time, speedup, memory, and the peers that skip the same steps. `skipped_step` is what "
    "a skipped step costs in computed ones of its baseline; `blocks` how many ran; `deviation` the latents' distance "
    "from those of the mode exact, relative to their norm. FastVideo, LightX2V and SGLang were not run.",
    "skip_cost": "A skipped forward beside a full one, in each pipeline's own loop.",
    "skip_policies": "The same of later policies; `spectrum`, `foca` and `dmd` sum five or six stored residuals.",
    "skip_layouts": "The same of image to video and VACE.",
    "long_video": "Segments that reuse each other's residuals: everything in VRAM, and bounded tiers over disk.",
    "memory_bound": "Forecasting every block's residual with less memory than that takes.",
    "overhead": "The three actors beside the same segments in a plain loop.",
    "peak_memory": "What each phase of a segment needs, the full-size text encoder included.",
    "cards": "What `edit-ray plan` says of a card, and what a process takes that is held to as much memory.",
    "block_offload": "Both experts' blocks in host memory, under the memory of a card of 24 GB.",
    "causal": "A causal model's steady state, window 12 of which 3 are the sink, beside the plain loop.",
    "causal_windows": "A window parked in host memory and taken back; and half of a window in host memory, with the "
    "device's memory capped so that the whole of it runs out (`whole_runs_out`).",
    "scale": "Several GPUs.",
}
_INTRO = """# On a GPU

Made by `python benchmarks/gpu_page.py` of `benchmarks/results/`, which `make bench-gpu` writes. The architecture is the
real one, the weights are random: what it takes does not depend on their values, what a threshold skips does, so masks
say it here. A figure is a ratio within one run, or holds for the GPU and the day that are named. Bars that are missed
are here as well.
"""


def content_of(name: str) -> dict[str, Any] | None:
    """A benchmark's results, None where there are none."""
    path = RESULTS / name / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def page() -> str:
    """The whole of docs/gpu.md."""
    return "\n".join([_INTRO, *(_section(name, about, content_of(name)) for name, about in ABOUT.items())])


def _section(name: str, about: str, content: Mapping[str, Any] | None) -> str:
    lines = [f"## {name}", "", about, ""]
    if content is None:
        return "\n".join([*lines, f"Not measured yet: `python benchmarks/{name}.py`.", ""])
    commit, *changes = content["commit"].split(maxsplit=1)
    lines += [f"{heading(content)}, commit {' '.join([commit[:12], *changes])}: `{content['command']}`.", ""]
    lines += [f"- {note}" for note in content["notes"]]
    lines += [""] if content["notes"] else []
    lines += _bars(content["bars"]) + _rows(content["rows"])
    lines += [f"Left out: {left['name']} ({left['why']})." for left in content["left_out"]]
    lines += [""] if content["left_out"] else []
    if (RESULTS / name / "results.png").exists():
        lines += [f"![{name}](../benchmarks/results/{name}/results.png)", ""]
    return "\n".join(lines)


def _bars(bars: Sequence[Mapping[str, Any]]) -> list[str]:
    verdicts = {None: "not measured", True: "met", False: "**missed**"}
    bounds = [f"≤ {bar['most']:g}" if bar["most"] is not None else f"≥ {bar['least']:g}" for bar in bars]
    rows = [
        [bar["what"], text(bar["value"]), bound, verdicts[bar["met"]]] for bar, bound in zip(bars, bounds, strict=True)
    ]
    return _table(["figure", "measured", "bar", ""], rows)


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    hidden = (*HIDDEN, "ours")
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
    return _table(["", *columns], [[row["name"], *(text(row.get(column)) for column in columns)] for row in rows])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def readme_table() -> str:
    """Ours at each number of skipped steps, in the columns of the table of github.com/Antlera/EDiT."""
    content = content_of("wan_table")
    rows = [row for row in content["rows"] if row["name"].startswith(("ours, exact", "ours, fast"))] if content else []
    if content is None or not rows:
        return ""
    steps = content["task"]["num_inference_steps"]
    cells = [
        [
            row["name"].removeprefix("ours, "),
            f"{row['seconds']:.2f} s",
            f"{row['speedup']:.2f}×",
            f"{row['skipped'] / steps:.0%}",
            f"{row['peak_GB']:.1f} GB" if "peak_GB" in row else "",
        ]
        for row in rows
    ]
    unrun = "" if content["task"]["real_weights"] else " TeaCache's thresholds 0.1, 0.2 and 0.3 were not run."
    said = f"{heading(content)}, text encoder and VAE left out.{unrun} More is in [docs/gpu.md](docs/gpu.md)."
    return "\n".join([*_table(["", "time", "speedup", "steps skipped", "peak"], cells), said, ""])


def filled(readme: str) -> str:
    """README.md with its table; as it is where it has no place for one."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{readme_table()}{end}{after}" if begin and end else readme


def main() -> None:
    """Write both."""
    PAGE.write_text(page())
    README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    main()
