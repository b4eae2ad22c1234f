"""How bytes fill the tiers over a long run, and what stays flat.

    python benchmarks/tiered_longrun.py                              in one process: 16 residuals of 12 MiB a generation
    python benchmarks/tiered_longrun.py --actor                      as in a run, whose store is another process
    python benchmarks/tiered_longrun.py --generations 200 --mib-scale 1/64        long, and small

Every generation stores 8 units x 2 branches of [1, 4096, 1536] bfloat16. In one process the tiers of a `TieredStore`,
bounded at 384, 768 and 2304 MiB, spill by LRU. With --actor each generation also reads the residuals of the four before
it, so what it works on is more than the host tier of 768 MiB: `prepare`, the arena's ops and `complete` are those of a
run. Every tensor that is read is compared with what was stored. Writes results.json, tiers.png and tiers.gif.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch
from rich.console import Console

from benchmarks.longrun_report import Row, draw, summary, table
from benchmarks.provenance import ROOT, provenance
from benchmarks.rolling_plan import rolling_plan
from benchmarks.store_process import AnyStore, StoreProcess
from edit_ray.actors.messages import RunSpec
from edit_ray.cache import CPUOffloadStore, DiskOffloadStore, GPUStore, TieredStore
from edit_ray.config import Config
from edit_ray.tiers.disk_tier import LOCK
from edit_ray.tiers.leases import Reuse, SegmentLeases
from edit_ray.tiers.protocol import EntryForm, Op
from edit_ray.tiers.store_client import PlannedStore

RUN, EXPERT, BRANCHES, UNITS = "longrun", "transformer", ("cond", "uncond"), 8
TOKENS, WIDTH = 4096, 1536
ENTRIES = {"device": 32, "host": 64, "disk": 192}  # the bounds: 384, 768 and 2304 MiB of 12 MiB each
WINDOW = 4


@dataclass(frozen=True)
class Task:
    """What is stored, and where; `scale` is a factor on the bytes of every entry and so of every bound."""

    directory: Path
    generations: int = 30
    scale: Fraction = Fraction(1)
    device: str = "cpu"
    allow_tmpfs: bool = False

    def __post_init__(self) -> None:
        tokens = self.scale * TOKENS
        if tokens < 4 or tokens % 4:  # four tokens fill three pages: so a place has no more bytes than its entry
            raise ValueError(f"mib-scale is {self.scale}; it must be a multiple of 1/{TOKENS // 4}, such as 1/64.")
        if self.generations < 1:
            raise ValueError(f"generations is {self.generations}; it must be 1 or more.")

    @property
    def form(self) -> EntryForm:
        return EntryForm(torch.device(self.device), torch.bfloat16, (1, int(self.scale * TOKENS), WIDTH))

    @property
    def bounds(self) -> dict[str, int]:
        """Bytes of each tier."""
        return {tier: entries * self.form.size for tier, entries in ENTRIES.items()}


def residual(form: EntryForm, generation: int, branch: str, unit: int) -> torch.Tensor:
    """An entry's bytes follow from what it is of; neighbours differ, as bfloat16 is exact up to 256."""
    value = (generation * len(BRANCHES) * UNITS + BRANCHES.index(branch) * UNITS + unit) % 251
    return torch.full(form.shape, value, dtype=form.dtype, device=form.device)


def resident_bytes(pid: int | str = "self") -> int:
    """A process's own and shared memory that is there, without the pages of files: of its code, for one."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
    return 1024 * (int(kib["RssAnon"]) + int(kib["RssShmem"]))


class Stopwatch:
    """Milliseconds of the blocks that it was entered for; on a GPU until what they have queued is done."""

    def __init__(self, device: str) -> None:
        self.ms, self._device, self._started = 0.0, device, 0.0

    def __enter__(self) -> None:
        self._synchronise()
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._synchronise()
        self.ms += 1000 * (time.perf_counter() - self._started)

    def _synchronise(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def in_one_process(task: Task) -> dict[str, Any]:
    """The library's tiers. Their moves are over when `put` returns, so there is nothing to flush."""
    disk = DiskOffloadStore(task.directory, allow_tmpfs=task.allow_tmpfs)
    bounds = task.bounds
    store = TieredStore([(GPUStore(), bounds["device"]), (CPUOffloadStore(), bounds["host"]), (disk, bounds["disk"])])
    rows = []
    for generation in range(1, task.generations + 1):
        put = Stopwatch(task.device)
        for branch in BRANCHES:
            for unit in range(UNITS):
                tensor = residual(task.form, generation, branch, unit)
                with put:
                    store.put((generation, EXPERT, branch, unit, 0), tensor)
        del tensor
        tiers, counts = store.tier_bytes, (store.num_spills, store.num_evictions)
        rows.append(Row(generation, tiers, disk.bytes_resident, *counts, put.ms, 0.0, resident_bytes()))
    store.promote = False  # that what is read back stays where it was
    read = _Readings()
    for generation in range(1, task.generations + 1):
        for branch in BRANCHES:
            for unit in range(UNITS):
                found = store.get((generation, EXPERT, branch, unit, 0))
                read.compare(found, residual(task.form, generation, branch, unit))
    store.clear()
    return _figures(rows, task, asdict(read), _files_in(task.directory))


@dataclass
class _Readings:
    """Entries read: equal to what was stored, not there, or other bytes."""

    equal: int = 0
    absent: int = 0
    wrong: int = 0

    def compare(self, found: torch.Tensor | None, stored: torch.Tensor) -> None:
        if found is None:
            self.absent += 1
        elif torch.equal(found.to(stored.device), stored):
            self.equal += 1
        else:
            self.wrong += 1


def through_the_actor(task: Task, make_store: Callable[[], AnyStore] = StoreProcess) -> dict[str, Any]:
    """As the GPU actor does it: two calls a generation, and between them memory that both processes map."""
    store = make_store()
    spec = _spec(task)
    leases = SegmentLeases(store, spec.reusing, made_up_reuse(task, spec.residuals_id))
    rows: list[Row] = []
    arenas: set[Path] = set()
    read, statistics = _Readings(), {}
    try:
        for segment in range(task.generations):
            put, get = Stopwatch(task.device), Stopwatch(task.device)
            planned = leases.begin(segment, 0, history_len=1)
            arenas.add(planned.arena.path)
            for op in planned.ops:
                _carry_out(planned, task.form, op, put if op.writes else get, read)
            planned.finish()
            statistics = leases.complete(segment, 0)
            counts = statistics["counts"]
            moved, evicted = counts["tier_moves", "host", "disk", "eviction"], counts["entries_dropped", "evicted"]
            row = (moved, evicted, put.ms, get.ms, resident_bytes(store.pid))
            tiers = {tier: statistics["bytes"][tier] for tier in ("host", "disk")}
            rows.append(Row(segment + 1, tiers, statistics["on_disk_bytes"], *row))
            del planned
        leases.close()
        store.call("drop_run", spec.residuals_id)()
    finally:
        store.close()
    left = _files_in(task.directory) + [str(path) for path in arenas if path.exists()]
    return _figures(rows, task, asdict(read), left) | {
        "peak_bytes": statistics["peak_bytes"],
        "prefetch": {name[-1]: number for name, number in statistics["counts"].items() if "prefetch" in name[0]},
        "faults": statistics["faults"],
    }


def made_up_reuse(task: Task, run: str) -> Reuse:
    """Every segment writes one residual of each unit and branch, and reads those of the four segments before it.

    It has four segments more than are made: so all those are alike, and the last ones' entries are still wanted.
    """
    unit_bytes = [task.form.size] * UNITS
    plan = rolling_plan(run, task.generations + WINDOW, window=WINDOW, unit_bytes=unit_bytes)
    return Reuse(plan, task.form)


def _spec(task: Task) -> RunSpec:
    options = {
        "host_bytes": task.bounds["host"],
        "disk_bytes": task.bounds["disk"],
        "directory": str(task.directory),
        "allow_tmpfs": task.allow_tmpfs,
    }
    prompts = [{"segment": 0, "prompt": "a red circle"}]
    config = Config.model_validate({"store": options, "video": {"num_segments": 1}, "prompt_segments": prompts})
    return RunSpec(RUN, task.directory, config, config.num_segments)


def _carry_out(store: PlannedStore, form: EntryForm, op: Op, watch: Stopwatch, read: _Readings) -> None:
    key = op.key[1:]
    generation, _, branch, unit, _ = key
    assert isinstance(generation, int)
    assert isinstance(branch, str)
    assert isinstance(unit, int)
    tensor = residual(form, generation, branch, unit)
    if op.writes:
        with watch:
            store.put(key, tensor)
    else:
        with watch:
            found = store.get(key)
        read.compare(found, tensor)


def _files_in(directory: Path) -> list[str]:
    """But for the lock of the store that has the folder open."""
    return sorted(str(path) for path in directory.rglob("*") if path.is_file() and path != directory / LOCK)


def _figures(rows: list[Row], task: Task, read: dict[str, int], left_behind: list[str]) -> dict[str, Any]:
    return {
        "entry_bytes": task.form.size,
        "bounds": task.bounds,
        "rows": [asdict(row) for row in rows],
        "summary": summary(rows, task.bounds),
        "read": read,
        "left_behind": left_behind,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actor", action="store_true", help="through the path of a run, to a store in another process")
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--mib-scale", type=Fraction, default=Fraction(1), help="a factor on all bytes, such as 1/64")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--directory", type=Path, help="for the disk tier; default: a temporary folder in runs/")
    parser.add_argument("--output", type=Path, default=Path("runs/longrun"), help="a folder")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    parent = args.directory or ROOT / "runs"
    parent.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    about = provenance(args.device) | {"path": "actor" if args.actor else "one process"}
    with tempfile.TemporaryDirectory(dir=parent, prefix="longrun-") as folder:
        try:
            task = Task(Path(folder), args.generations, args.mib_scale, args.device)
        except ValueError as error:
            sys.exit(f"error: {error}")
        figures = through_the_actor(task) if args.actor else in_one_process(task)
    rows = [Row(**row) for row in figures["rows"]]
    Console(width=110 if not sys.stdout.isatty() else None).print(table(rows))
    for name in ("summary", "read", "left_behind"):
        print(f"{name.replace('_', ' ')}: {figures[name]}")
    (args.output / "results.json").write_text(json.dumps(about | figures, indent=1) + "\n")
    heading = f"{about['path']}, {task.form.size / 2**20:g} MiB residuals; {about['device']}, {about['date'][:10]}"
    draw(rows, args.output, heading)


if __name__ == "__main__":
    main()
