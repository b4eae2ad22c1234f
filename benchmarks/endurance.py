"""Whether a run of very many segments stays as it is: memory, open files, threads, time of a commit, disk.

    python benchmarks/endurance.py [--segments 2000] [--keep 8] [--output benchmarks/results/endurance]

A random model of a megabyte makes tiny segments through the real actors on a Ray of its own, with residuals that are
reused and written to disk, and `output.keep_segments`. After every segment each actor's process is looked at. From
segment 100 on, windows of 100 segments are compared by their medians. Flat is where the slope through these (Theil and
Sen: the median slope of all pairs, so that single windows do not decide) times the length of the run is within 5 % of
the first window's median. Ray is started with MALLOC_ARENA_MAX=2, unless that is set. Manifest and event log are
appended to by design; they are told apart.

Times may drift with the machine and its disk, with nothing of ours at work, by more than that. So commits are compared
in pairs as well: of 60 segments that the long run is extended by, and of a short run's 60, the last 40; then again.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from benchmarks.provenance import provenance  # noqa: E402
from edit_ray.testing import save_random_wan  # noqa: E402
from jobs.demo import private_ray  # noqa: E402

FIRST, WINDOW, BAR, PAIRS = 100, 100, 0.05, 12
BEFORE, COMPARED = 20, 40  # segments of each half of a pair: those not looked at, and those whose commits are
LONG = "endurance"
DISK_EVERY = 10  # segments between two looks at the disk
LOGS = ("manifest.jsonl", "events.jsonl")
ACTORS = ("segment_scheduler", "denoiser", "cache_store")


def config_for(model: Path, segments: int, keep: int) -> dict[str, Any]:
    """The smallest segments that still do everything: history, reuse through memory and disk, old files dropped."""
    return {
        "model": {"path": str(model), "device": "cpu"},
        "sampling": {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "seed": 3},
        "video": {"num_segments": segments},
        "prompt_segments": [{"segment": 0, "prompt": "a red circle"}],
        "continuity": {"mode": "history", "history_latents": 1},
        "cache": {"policy": "warmstart_reuse", "inner": "always", "warm_steps": 1, "reuse_window": 2},
        "store": {"host_bytes": 16384, "allow_tmpfs": True},
        "engine": {"cpu_threads": 1},
        "output": {"keep_segments": keep, "preset": "ultrafast"},
    }


def look_at(pid: int) -> dict[str, float]:
    """What a process has: resident bytes, of those its own alone, open files, threads."""
    told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "resident MB": int(told["VmRSS"].split()[0]) / 1024,
        "own MB": int(told["RssAnon"].split()[0]) / 1024,
        "open files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(told["Threads"]),
    }


def disk_of(root: Path, run: Path) -> dict[str, float]:
    """Kilobytes and files of all that is below the folder of runs, less the logs, which are told by themselves."""
    files = [path for path in root.rglob("*") if path.is_file()]
    logs = [run / name for name in LOGS]
    size = sum(_size(path) for path in files if path not in logs)
    return {"disk kB": size / 1024, "files on disk": len(files), "logs kB": sum(map(_size, logs)) / 1024}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # dropped meanwhile
        return 0


def commit_ms(segment: Any) -> float:
    """From the first write of the commit until a client that waits for the segment has it, which is now."""
    return 1000 * (time.time() - float(segment.statistics["publish_at"]))


def compare_commits(client: Any, config: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The median of a short run's commits, and of those that the long one is extended by, in turn."""
    pairs = []
    for pair in range(PAIRS):
        there = client.status(LONG).committed
        client.extend(LONG, BEFORE + COMPARED)
        late = [commit_ms(segment) for segment in client.stream(LONG, start=there, frames=False)][BEFORE:]
        short = dict(config) | {"video": {"num_segments": BEFORE + COMPARED}}
        run_id = client.submit(short, run_id=f"short-{pair}")
        early = [commit_ms(segment) for segment in client.stream(run_id, frames=False)][BEFORE:]
        pairs.append((statistics.median(early), statistics.median(late)))
        print(f"pair {pair}: {pairs[-1][0]:.2f} ms in the short run, {pairs[-1][1]:.2f} ms in the long one", flush=True)
    return pairs


def measure(client: Any, root: Path, config: Mapping[str, Any]) -> tuple[dict[str, list[tuple[int, float]]], float]:
    """Every quantity as (segment, value), and the seconds of the run."""
    import ray

    found: dict[str, list[tuple[int, float]]] = {}
    run_id = client.submit(dict(config), run_id=LONG)
    pids: dict[str, int] = {}
    began = last = time.monotonic()
    for segment in client.stream(run_id, frames=False):
        now, committed = time.monotonic(), commit_ms(segment)
        if not pids:
            actors: dict[str, Any] = {name: ray.get_actor(name, namespace="edit_ray") for name in ACTORS}
            told: dict[str, Any] = {name: ray.get(actor.describe.remote()) for name, actor in actors.items()}
            pids = {name: of["pid"] for name, of in told.items()}
        values = {f"{name}: {what}": of for name, pid in pids.items() for what, of in look_at(pid).items()}
        if segment.index % DISK_EVERY == 0:
            values |= disk_of(root, root / run_id)
        values["publish ms"] = 1000 * segment.statistics["publish_s"]
        values |= {"commit ms": committed, "segment ms": 1000 * (now - last)}
        last = now
        for name, value in values.items():
            found.setdefault(name, []).append((segment.index, value))
        if segment.index % 100 == 0:
            print(f"segment {segment.index}, {now - began:.0f} s", flush=True)
    return found, time.monotonic() - began


def windows(
    values: Sequence[tuple[int, float]], segments: int, first: int = FIRST, length: int = WINDOW
) -> list[float]:
    """The median of each whole window of segments from `first` on."""
    spans = range(first, segments - length + 1, length)
    return [statistics.median(value for index, value in values if at <= index < at + length) for at in spans]


def drift(medians: Sequence[float]) -> float:
    """How much grows from the first window to the last, by the median slope of all pairs, as a share of the first."""
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(medians), 2)]
    return 0.0 if not slopes else statistics.median(slopes) * (len(medians) - 1) / medians[0] if medians[0] else 0.0


def summary(found: Mapping[str, Sequence[tuple[int, float]]], segments: int) -> dict[str, dict[str, Any]]:
    """Each quantity: its windows, its drift, whether that is within the bar; None where it is not held to it."""
    told = {}
    for name, values in found.items():
        medians = windows(values, segments)
        grows = drift(medians)
        held = not (name.startswith(("logs", "segment ms")) or name.endswith("own MB"))
        told[name] = {"windows": medians, "drift": grows, "flat": abs(grows) <= BAR if held else None}
    return told


def of_pairs(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How much more a commit takes late than early, by the median of the pairs' ratios."""
    grows = statistics.median(late / early for early, late in pairs) - 1
    return {"windows": [of for pair in pairs for of in pair], "drift": grows, "flat": abs(grows) <= BAR}


def table_of(told: Mapping[str, Mapping[str, Any]], heading: str) -> Table:
    """One row a quantity."""
    table = Table("what", "first window", "last window", "least", "most", "drift", "flat", title=heading)
    for name, row in told.items():
        of = row["windows"]
        verdict = {True: "yes", False: "NO", None: ""}[row["flat"]]
        table.add_row(name, *(f"{v:.2f}" for v in (of[0], of[-1], min(of), max(of))), f"{row['drift']:+.1%}", verdict)
    return table


def write(folder: Path, content: dict[str, Any], table: Callable[[], Table], heading: str) -> None:
    """results.json and endurance.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    with (folder / "endurance.md").open("w") as file:
        file.write(f"# A long run stays as it is\n\n{heading}\n\n")
        file.writelines(f"- {key}: {content[key]}\n" for key in ("command", "date", "commit", "device", "machine"))
        file.write("\n")
        shown = table()
        shown.box, shown.title = box.MARKDOWN, None
        Console(file=file, width=160).print(shown)


def main() -> int:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=2000, help=f"at least {FIRST + 2 * WINDOW}, to be judged")
    parser.add_argument("--keep", type=int, default=8, help="output.keep_segments")
    parser.add_argument("--output", type=Path, help="the folder to write into")
    args = parser.parse_args()
    if args.segments < FIRST + 2 * WINDOW:
        parser.error(f"--segments is {args.segments}; it must be at least {FIRST + 2 * WINDOW}")
    # As docs/operations.md advises for such runs. Otherwise glibc gives threads memory pools of their own, and what
    # each keeps of what was given back would look like growth.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    # Ray's sockets lie below it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp") as temp, private_ray(Path(temp)) as environment:
        os.environ.update(environment)
        model, runs = save_random_wan(Path(temp) / "model", expand_timesteps=True), Path(temp) / "runs"
        runs.mkdir()
        import ray

        from edit_ray import LongVideoClient

        client, config = LongVideoClient(output=runs), config_for(model, args.segments, args.keep)
        found, seconds = measure(client, runs, config)
        pairs = compare_commits(client, config)

        ray.shutdown()
    told = summary(found, args.segments) | {"commit ms, short run and long one in turn": of_pairs(pairs)}
    failed = [name for name, row in told.items() if row["flat"] is False]
    heading = (
        f"{args.segments} segments in {seconds:.0f} s ({1000 * seconds / args.segments:.0f} ms each), of which "
        f"{args.keep} are kept. Medians of windows of {WINDOW} segments from {FIRST} on; flat is a drift within "
        f"{BAR:.0%}. {'Not flat: ' + ', '.join(failed) if failed else 'All is flat'}."
    )
    print(heading)
    Console(width=160).print(table_of(told, "Medians of windows"))
    if args.output:
        about = provenance("cpu") | {"segments": args.segments, "seconds": seconds, "bar": BAR}
        write(args.output, about | {"figures": told}, lambda: table_of(told, ""), heading)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
