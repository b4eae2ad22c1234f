"""What a crowd at the HTTP door costs a run, and how long the door takes to tell of a run of 20,000 segments.

    python benchmarks/door_load.py [--seconds 330] [--segments 8] [--output benchmarks/results/door_load]

The embedded model through the real actors, with one thread for torch, and the door as it is deployed: on Ray Serve, one
replica behind Serve's proxy, on a Ray of its own. Runs without clients and with them alternate, the door being there in
both: 200 readers of the video, each every 5 s, 50 readers of its events and 20 HLS players, all in this process. Each
reader of events must be told of every segment once, each player must get every fragment, and no request may fail. A
run's time is told by its manifest. Beside the crowd one more client reads a run of 20,000 committed segments, which
grows by one each second; without a run at work, 200 do. Pairs are measured until `--seconds` are over.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from benchmarks.clients import seconds_of  # noqa: E402
from benchmarks.cpu_run import config_for  # noqa: E402
from benchmarks.door_clients import Attendance, Crowd  # noqa: E402
from benchmarks.long_folder import LongFolder  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from edit_ray.config import config_of  # noqa: E402
from edit_ray.runs.folder import RunFolder  # noqa: E402
from edit_ray.runs.ids import Owner, owner_here  # noqa: E402
from jobs.demo import free_port, private_ray  # noqa: E402

BAR, P99_BAR_MS = 1.05, 150.0
READERS, FOLLOWERS, PLAYERS, POLL_S = 200, 50, 20, 5.0
LONG, LONG_SEGMENTS = "long", 20_000
LONG_POLL_S = 0.25  # of the one client that reads the long run beside the crowd
GROWS_S = 1.0


@dataclass(frozen=True)
class Place:
    """Where runs are made and asked for; `client` is that of runs."""

    client: Any
    url: str
    root: Path
    config: dict[str, Any]
    long: LongFolder

    @property
    def segments(self) -> int:
        count: int = self.config["video"]["num_segments"]
        return count


async def run_once(place: Place, run_id: str, crowd: Crowd | None) -> tuple[float, Attendance]:
    """The seconds of a segment of a run, and what one client has got of the long run beside the crowd."""
    ended, beside = asyncio.Event(), Crowd(place.url, LONG, readers=1, poll_s=LONG_POLL_S)
    await asyncio.to_thread(place.client.submit, place.config, run_id=run_id)
    attending = [asyncio.create_task(of.attend(ended)) for of in ([crowd, beside] if crowd else [])]
    folder = RunFolder(place.root, run_id)
    while (manifest := await asyncio.to_thread(folder.read_manifest)).end is None:  # a client that asked would be one
        place.long.grow_to(time.monotonic())
        await asyncio.sleep(0.5)
    ended.set()
    await asyncio.gather(*attending)
    assert manifest.state == "done", manifest.error
    if crowd:
        crowd.seen.check(place.segments)
        beside.seen.check(0)
    return seconds_of(manifest) / place.segments, beside.seen


async def read_long(place: Place, seconds: float) -> tuple[float, Attendance]:
    """Milliseconds of the first answer about the long run, and what 200 readers then get of it."""
    over, first, crowd = asyncio.Event(), Crowd(place.url, LONG, readers=1), Crowd(place.url, LONG, readers=READERS)
    attending = asyncio.create_task(first.attend(over))
    while not first.seen.seconds["video"]:
        await asyncio.sleep(0.05)
    over.set()
    await attending
    over.clear()
    attending = asyncio.create_task(crowd.attend(over))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        place.long.grow_to(time.monotonic())
        await asyncio.sleep(0.25)
    over.set()
    await attending
    crowd.seen.check(0)
    return round(1000 * first.seen.seconds["video"][0], 1), crowd.seen


async def measure(place: Place, deadline: float, most_pairs: int, long_s: float, scale: float) -> dict[str, Any]:
    """The figures of all pairs that can be had before the deadline, one at least, and of the long run."""
    counts = {"readers": READERS, "followers": FOLLOWERS, "players": PLAYERS}
    crowd = {name: max(1, round(count * scale)) for name, count in counts.items()}
    first_ms, alone = await read_long(place, long_s)
    await run_once(replace(place, config=place.config | {"video": {"num_segments": 2}}), "warm-up", None)
    pairs, seen, beside, took = list[tuple[float, float]](), Attendance(), Attendance(), 0.0
    while len(pairs) < most_pairs and (not pairs or time.monotonic() + took < deadline):
        began, pair, found = time.monotonic(), len(pairs), dict[bool, float]()
        for with_clients in (bool(pair % 2), not pair % 2):
            run_id = f"run-{pair}-{int(with_clients)}"
            clients = Crowd(place.url, run_id, **crowd, poll_s=POLL_S) if with_clients else None
            found[with_clients], read = await run_once(place, run_id, clients)
            for into, of in ((beside, read), (seen, clients.seen if clients else Attendance())):
                for kind, answers in of.seconds.items():
                    into.seconds[kind] += answers
        pairs.append((found[False], found[True]))
        took = time.monotonic() - began
        print(f"pair {pair}: {found[False]:.2f} s a segment without, {found[True]:.2f} s with clients", flush=True)
    return {
        "crowd": crowd,
        "seconds_a_segment": pairs,
        "ratios": [with_clients / without for without, with_clients in pairs],
        "answers": seen.figures(),
        "long_run": {
            "first_ms": first_ms,
            "alone": alone.figures()["video"],
            "beside_the_crowd": beside.figures()["video"],
        },
    }


def verdicts(figures: dict[str, Any]) -> dict[str, bool]:
    """What is held to a bar, in words, and whether it is met."""
    ratio, long = statistics.median(figures["ratios"]), figures["long_run"]
    found = {f"The median of {len(figures['ratios'])} ratios is {ratio:.3f} (bar: {BAR})": ratio <= BAR}
    for name, of in (("without a run at work", long["alone"]), ("beside the crowd", long["beside_the_crowd"])):
        said = f"GET of a run of {LONG_SEGMENTS:,} segments {name}: p50 {of['p50_ms']} ms, p99 {of['p99_ms']} ms"
        found[f"{said} (bar: {P99_BAR_MS:g} ms)"] = of["p99_ms"] <= P99_BAR_MS
    return found


def tables(figures: dict[str, Any]) -> list[Table]:
    """The pairs, and the answers by kind of request."""
    pairs = Table("pair", "alone, s", "with the crowd, s", "ratio", title="Seconds a segment")
    for pair, ((without, with_clients), ratio) in enumerate(
        zip(figures["seconds_a_segment"], figures["ratios"], strict=True)
    ):
        pairs.add_row(str(pair), f"{without:.2f}", f"{with_clients:.2f}", f"{ratio:.3f}")
    answers = Table("request", "answers", "p50, ms", "p99, ms", "longest, ms", title="Answers")
    long = figures["long_run"]
    rows = figures["answers"] | {
        "long run, beside the crowd": long["beside_the_crowd"],
        f"long run, {READERS} readers": long["alone"],
    }
    for kind, of in rows.items():
        answers.add_row(kind, str(of["answers"]), *(f"{of[name]:.1f}" for name in ("p50_ms", "p99_ms", "most_ms")))
    return [pairs, answers]


def write(folder: Path, about: dict[str, Any]) -> None:
    """results.json and door_load.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    with (folder / "door_load.md").open("w") as file:
        file.write("# What a crowd at the HTTP door costs a run\n\n")
        file.writelines(f"- {said}: {'met' if met else 'NOT met'}\n" for said, met in about["verdicts"].items())
        first = about["long_run"]["first_ms"]
        file.write(f"- The first answer of a replica about that run, which reads all of its manifest: {first} ms\n\n")
        file.writelines(f"- {key}: {about[key]}\n" for key in ("command", "date", "commit", "device", "machine"))
        for table in tables(about):
            table.box, table.title, heading = box.MARKDOWN, None, table.title
            file.write(f"\n## {heading}\n\n")
            Console(file=file, width=120).print(table)


def main() -> int:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=330, help="for all of it; one pair is measured in any case")
    parser.add_argument("--pairs", type=int, default=9, help="at most")
    parser.add_argument("--segments", type=int, default=8, help="of each run")
    parser.add_argument("--steps", type=int, default=24, help="of denoising, for each segment")
    parser.add_argument("--crowd", type=float, default=1.0, help="this share of the clients, to try the script")
    parser.add_argument("--output", type=Path, help="the folder to write into")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds - 10  # in which Ray ends
    config = config_for(args.segments, args.steps)
    # Ray's sockets lie below it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp") as temp, private_ray(Path(temp)) as environment:
        os.environ.update(environment)
        root = Path(temp) / "runs"
        root.mkdir()
        import ray

        from edit_ray import LongVideoClient
        from edit_ray.server import door
        from edit_ray.server.gate import Entrance

        owner = Owner(owner_here(os.environ).name, door.JOB)
        settings = door.DoorSettings(root, owner, (("tiny", config_of(config)),), Entrance(port=free_port()))
        url = door.start(settings).url
        long = LongFolder(root, LONG, config, LONG_SEGMENTS, GROWS_S)
        place = Place(LongVideoClient(output=root), url, root, config, long)
        try:
            figures = asyncio.run(measure(place, deadline, args.pairs, min(30.0, args.seconds / 10), args.crowd))
        finally:
            door.stop()
            ray.shutdown()
    found = verdicts(figures)
    for table in tables(figures):
        Console().print(table)
    print(*(f"{said}: {'met' if met else 'NOT met'}." for said, met in found.items()), sep="\n")
    if args.output:
        about = {"config": config, "door": "Ray Serve, one replica behind its proxy", "verdicts": found}
        write(args.output, provenance("cpu") | about | figures)
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
