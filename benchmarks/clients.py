"""What clients cost a run: three of them (one slow, one that is killed and started again in the middle) against none.

    python benchmarks/clients.py [--pairs 5] [--segments 4] [--output benchmarks/results/clients]

The embedded model through the real actors on a Ray of its own, with one thread for torch. Runs with clients and without
alternate; each client is a process of its own that follows the run with `frames=False`, and each has to see every
segment once. A run's time is told by its manifest: from the first step's beginning to the last segment's publishing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from benchmarks.cpu_run import config_for  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from edit_ray.runs.folder import RunFolder  # noqa: E402
from edit_ray.runs.manifest import Manifest  # noqa: E402
from jobs.demo import private_ray  # noqa: E402

BAR = 1.03
SLOW_S = 1.0  # that the slow client takes for each segment
CLIENT = """
import sys, time
from edit_ray import LongVideoClient
root, run_id, start, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
client = LongVideoClient(output=root)
print("ready", flush=True)
sys.stdin.readline()
for segment in client.stream(run_id, start, frames=False):
    print(segment.index, flush=True)
    time.sleep(pause)
"""


def seconds_of(manifest: Manifest) -> float:
    """From the first denoising step's beginning until the last segment is published."""
    told = [segment.statistics for segment in manifest.segments]
    return told[-1]["publish_at"] + told[-1]["publish_s"] - told[0]["denoise_at"]


class Follower:
    """A client in a process of its own, connected before the run begins."""

    def __init__(self, root: Path, run_id: str, start: int = 0, pause: float = 0.0) -> None:
        command = [sys.executable, "-c", CLIENT, str(root), run_id, str(start), str(pause)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seen: list[int] = []

    def await_ready(self) -> None:
        """It has joined Ray; what that costs is none of the run's."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        """The run is there; from now on it is followed."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)

    def read(self, until: int | None = None) -> list[int]:
        """The segments seen up to `until`, or up to the end of the run."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(int(line))
            if self.seen[-1] == until:
                break
        return self.seen

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def run_once(root: Path, run_id: str, config: dict[str, Any], with_clients: bool) -> float:
    """The seconds of a run; the clients' segments are checked."""
    from edit_ray import LongVideoClient

    client, segments = LongVideoClient(output=root), config["video"]["num_segments"]
    followers = [Follower(root, run_id, pause=pause) for pause in (0.0, SLOW_S, 0.0)] if with_clients else []
    for follower in followers:
        follower.await_ready()
    client.submit(config, run_id=run_id)
    for follower in followers:
        follower.go()
    seen = []
    if followers:
        middle = segments // 2
        again = followers.pop()
        before = list(again.read(until=middle))
        again.kill()
        followers.append(Follower(root, run_id, middle + 1))
        followers[-1].await_ready()
        followers[-1].go()
        seen = [follower.read() for follower in followers]
        seen[-1] = before + seen[-1]
        for follower in followers:
            follower.process.communicate()
    folder = RunFolder(root, run_id)
    while (manifest := folder.read_manifest()).end is None:  # a client that asked would be one
        time.sleep(0.5)
    assert manifest.state == "done", manifest.error
    assert all(of == list(range(segments)) for of in seen), seen
    return seconds_of(manifest)


def measure(root: Path, config: dict[str, Any], pairs: int) -> list[tuple[float, float]]:
    """Seconds (without clients, with them) of each pair; whichever comes first alternates. One run warms up."""
    run_once(root, "warm-up", config, with_clients=True)
    found = []
    for pair in range(pairs):
        took = {}
        for with_clients in (bool(pair % 2), not pair % 2):
            took[with_clients] = run_once(root, f"run-{pair}-{int(with_clients)}", config, with_clients)
        found.append((took[False], took[True]))
        print(f"pair {pair}: {took[False]:.2f} s without, {took[True]:.2f} s with clients", flush=True)
    return found


def main() -> int:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--segments", type=int, default=4, help="of each run")
    parser.add_argument("--steps", type=int, default=24, help="of denoising, for each segment")
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
    ratios = [with_clients / without for without, with_clients in found]
    ratio = statistics.median(ratios)
    verdict = f"The median of {args.pairs} ratios is {ratio:.3f} (bar: {BAR}): {'met' if ratio <= BAR else 'NOT met'}."
    table = Table("pair", "without clients, s", "with three, s", "ratio", title="Time of a run")
    for pair, ((without, with_clients), of) in enumerate(zip(found, ratios, strict=True)):
        table.add_row(str(pair), f"{without:.2f}", f"{with_clients:.2f}", f"{of:.3f}")
    Console().print(table)
    print(verdict)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        about = provenance("cpu") | {"config": config, "bar": BAR, "ratio": ratio, "ratios": ratios, "seconds": found}
        (args.output / "results.json").write_text(json.dumps(about, indent=1) + "\n")
        with (args.output / "clients.md").open("w") as file:
            file.write(f"# What clients cost a run\n\n{verdict}\n\n")
            file.writelines(f"- {key}: {about[key]}\n" for key in ("command", "date", "commit", "device", "machine"))
            file.write("\n")
            table.box, table.title = box.MARKDOWN, None
            Console(file=file, width=120).print(table)
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
