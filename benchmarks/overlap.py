"""How much of decoding a run hides behind denoising.

    python benchmarks/overlap.py [--pairs 3] [--segments 6] [--steps 30] [--output benchmarks/results/overlap]

The embedded model on the CPU with one thread for torch, cache off, `history`, through the real actors on a Ray of its
own. Alternating, a run as ever (A), and the same segments denoised by the same GPU actor with nothing decoded (B). From
A's first denoising step to the end of its last decoding it takes so long; that is compared with what it would take if
all decoding but the last segment's were hidden: B's denoising in all, and one decoding, which is that of A's last
segment, beside which nothing is denoised. The report page of the last A is drawn by Chromium, if that is installed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from benchmarks.cpu_run import config_for  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from edit_ray.config import Config, dump_yaml  # noqa: E402
from jobs.demo import private_ray  # noqa: E402

BAR = 1.1


def run_whole(root: Path, run_id: str, config: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """The figures of all segments of a run as ever."""
    from edit_ray import LongVideoClient

    client = LongVideoClient(output=root)
    client.submit(dict(config), run_id=run_id)
    return [segment.statistics for segment in client.stream(run_id, frames=False)]


def denoise_only(root: Path, run_id: str, config: Mapping[str, Any]) -> list[float]:
    """The seconds of denoising of each segment, by the GPU actor that lives, which is asked for nothing else."""
    import ray

    from edit_ray.actors.messages import RunSpec

    checked = Config.model_validate(config)
    spec = RunSpec(run_id, root, checked, checked.num_segments)
    spec.folder.create(dump_yaml(checked), spec.begun("", {})).close()
    actor: Any = ray.get_actor("denoiser", namespace="edit_ray")
    ask: Any = actor.call.options(concurrency_group="denoise")
    ray.get(ask.remote("prepare_run", spec))
    found = [
        ray.get(ask.remote("denoise_segment", spec, spec.segment(index), 0))["denoise_s"]
        for index in range(checked.num_segments or 0)
    ]
    ray.get(ask.remote("release_run", run_id))
    return found


def compare(whole: Sequence[Mapping[str, float]], alone: Sequence[float]) -> dict[str, float]:
    """Seconds from first to last, what they are compared with, and the ratio."""
    last = whole[-1]
    span = last["decode_at"] + last["decode_s"] - whole[0]["denoise_at"]
    ideal = sum(alone) + last["decode_s"]
    return {
        "span_s": span,
        "denoise_alone_s": sum(alone),
        "last_decode_s": last["decode_s"],
        "denoise_s": sum(figures["denoise_s"] for figures in whole),
        "decode_s": sum(figures["decode_s"] for figures in whole),
        "ratio": span / ideal,
        "ratio_if_nothing_were_hidden": (sum(alone) + sum(figures["decode_s"] for figures in whole)) / ideal,
    }


def draw(root: Path, run_id: str, picture: Path) -> None:
    """The top of the run's report as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("No timeline.png: Chromium is not installed.")
        return
    page = root / "report.html"
    command = [sys.executable, "-m", "edit_ray.cli", "--output", str(root), "report", run_id, "--page", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={root}/browser")
    command = [browser, *quiet, "--window-size=980,900", f"--screenshot={picture.resolve()}", page.as_uri()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)


def measure(root: Path, config: dict[str, Any], pairs: int) -> list[dict[str, float]]:
    """What each pair has shown; whichever comes first alternates. A short run warms up."""
    run_whole(root, "warm-up", config_for(2, 2))
    found = []
    for pair in range(pairs):
        if pair % 2:
            alone = denoise_only(root, f"alone-{pair}", config)
            whole = run_whole(root, f"whole-{pair}", config)
        else:
            whole = run_whole(root, f"whole-{pair}", config)
            alone = denoise_only(root, f"alone-{pair}", config)
        found.append(compare(whole, alone))
        print(f"pair {pair}: ratio {found[-1]['ratio']:.3f}", flush=True)
    return found


def table_of(found: Sequence[Mapping[str, float]]) -> Table:
    """One row a pair, one column a figure."""
    table = Table("pair", *(name.replace("_", " ") for name in found[0]))
    for pair, figures in enumerate(found):
        table.add_row(str(pair), *(f"{value:.3f}" for value in figures.values()))
    return table


def write(folder: Path, about: Mapping[str, Any], verdict: str, table: Table) -> None:
    """results.json, and overlap.md with the picture."""
    (folder / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    with (folder / "overlap.md").open("w") as file:
        file.write(f"# Decoding behind denoising\n\n{verdict}\n\n")
        file.writelines(f"- {key}: {about[key]}\n" for key in ("command", "date", "commit", "device", "machine"))
        file.write("\n")
        table.box = box.MARKDOWN
        Console(file=file, width=200).print(table)
        if (folder / "timeline.png").exists():
            file.write("\n![The timeline of the last run](timeline.png)\n")


def main() -> int:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--segments", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30, help="of denoising, for each segment")
    parser.add_argument("--output", type=Path, help="the folder to write into")
    args = parser.parse_args()
    config = config_for(args.segments, args.steps)
    # Ray's sockets lie below it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp") as temp, private_ray(Path(temp)) as environment:
        os.environ.update(environment)
        runs = Path(temp) / "runs"
        runs.mkdir()
        found = measure(runs, config, args.pairs)
        import ray

        ray.shutdown()
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            draw(runs, f"whole-{args.pairs - 1}", args.output / "timeline.png")
    ratio = statistics.median(figures["ratio"] for figures in found)
    verdict = f"The median of {args.pairs} ratios is {ratio:.3f} (bar: {BAR}): {'met' if ratio <= BAR else 'NOT met'}."
    Console(width=160).print(table_of(found))
    print(verdict)
    if args.output:
        about = provenance("cpu") | {"config": config, "bar": BAR, "ratio": ratio, "pairs": found}
        write(args.output, about, verdict, table_of(found))
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
