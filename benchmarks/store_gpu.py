"""What the tiers cost a segment on a GPU, beside bare pinned copies of the same run.

    python benchmarks/store_gpu.py --output benchmarks/results/store_gpu            with the CacheStore actor on Ray
    python benchmarks/store_gpu.py --no-ray                                         its class in a process of its own

- device: put + get of the device tier.
- host: put until the bytes are in the arena, then get until the tensor is ready on the device, by a segment and the
  next one, for residuals of 12 and 43 MB; nothing is loaded ahead. Beside it copies between device and pinned memory.
- put: how long the loop is held up by the writes of a generation of 192 MB, while the GPU computes.
- prefetch: segments that compute, read and write with a host tier that is too small, so that everything comes from
  disk; what the computing stream waits for reads, by what their transfer takes (disk to arena is not counted in it).

Prints a table, and writes results.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402
from benchmarks.store_process import AnyStore, RayStore, StoreProcess  # noqa: E402
from edit_ray.actors.leases import SegmentLeases  # noqa: E402
from edit_ray.actors.messages import RunSpec  # noqa: E402
from edit_ray.cache.stores.device import GPUStore  # noqa: E402
from edit_ray.cache.stores.planned import Form, PlannedStore  # noqa: E402
from edit_ray.cache.stores.store import Key  # noqa: E402
from edit_ray.cache.tiering.reuse_plan import make_reuse_plan  # noqa: E402
from edit_ray.config import Config  # noqa: E402
from edit_ray.engine.reuse import Reuse  # noqa: E402

RUN, EXPERT, BRANCHES = "gpu", "transformer", ("cond", "uncond")
SHAPES = {"12 MB": (1, 4096, 1536), "43 MB": (1, 14_040, 1536)}  # bf16 residuals of Wan2.1-1.3B
DEVICE = torch.device("cuda", 0)

Figures = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Segments that each write one residual per unit and branch, and read those of the one before."""

    shape: tuple[int, ...]
    units: int
    segments: int
    host_entries: int
    ahead_entries: int
    directory: Path

    @property
    def form(self) -> Form:
        return Form(DEVICE, torch.bfloat16, self.shape)

    def leases(self, store: AnyStore) -> SegmentLeases:
        """The GPU actor's side of a run with this plan."""
        plan = make_reuse_plan(
            RUN,
            self.segments,
            window=1,
            warm_steps=1,
            experts=[EXPERT] * 2,
            unit_bytes={EXPERT: [self.form.size] * self.units},
            branches=BRANCHES,
            align="last",
            combine="mean",
        )
        options = {
            "device_bytes": self.ahead_entries * self.form.size,
            "host_bytes": self.host_entries * self.form.size,
            "directory": str(self.directory),
        }
        prompts = [{"segment": 0, "prompt": "a red circle"}]
        config = Config.model_validate({"store": options, "video": {"num_segments": 1}, "prompt_segments": prompts})
        return SegmentLeases(store, RunSpec(RUN, self.directory, config), Reuse(plan, self.form))


def seconds(action: Callable[[], object], wait: bool = True) -> float:
    """Of a call, with `wait` until the device is through."""
    started = time.perf_counter()
    action()
    if wait:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run_segments(task: Task, store: AnyStore, act: Callable[[PlannedStore, int], None]) -> SegmentLeases:
    """Every segment in turn: `act(planned, segment)` carries out its ops."""
    leases = task.leases(store)
    for segment in range(task.segments):
        planned = leases.begin(segment, 0, history_len=1)
        act(planned, segment)
        planned.finish()
        leases.complete(segment, 0)
    leases.close()
    store.call("drop_run", RUN)()
    return leases


def device_figures(form: Form, rounds: int = 200) -> Figures:
    """put + get by reference."""
    store, tensor = GPUStore(), torch.randn(form.shape, device=DEVICE).bfloat16()

    def both() -> None:
        store.put((0, 1), tensor)
        assert store.get((0, 1)) is not None

    return {"ms": 1000 * statistics.median(seconds(both, wait=False) for _ in range(rounds)), "bar": 0.02}


def host_figures(task: Task, store: AnyStore) -> Figures:
    """Each entry's put and get, both waited for, against pinned copies of as many bytes made in between."""
    form = task.form
    pinned = torch.empty(form.shape, dtype=form.dtype, pin_memory=True)
    there = torch.randn(form.shape, device=DEVICE).bfloat16()
    put_s: dict[Any, float] = {}
    trips: list[float] = []
    bare: list[float] = []

    def act(planned: PlannedStore, segment: int) -> None:
        for index, op in enumerate(planned.ops):
            key = op.key[1:]
            _await_place(planned, index)
            if op.writes:
                put_s[op.key] = seconds(lambda key=key: planned.put(key, there))  # type: ignore[misc]
                planned.clear()
            else:
                trips.append(put_s[op.key] + seconds(lambda key=key: planned.get(key)))  # type: ignore[misc]
                bare.append(
                    seconds(lambda: pinned.copy_(there, non_blocking=True))
                    + seconds(lambda: there.copy_(pinned, non_blocking=True))
                )

    run_segments(task, store, act)
    ours, copies = 1000 * statistics.median(trips), 1000 * statistics.median(bare)
    return {"round_trips": len(trips), "ms": ours, "pinned_ms": copies, "rate_of_pinned": copies / ours}


def _await_place(planned: PlannedStore, index: int) -> None:
    """The store has made room: a segment that computes would find it there."""
    deadline = time.monotonic() + 20
    while (planned.table.place(index) or 0) < 0 and time.monotonic() < deadline:
        time.sleep(0.0005)


class Work:
    """So many milliseconds of matrix products on the computing stream."""

    def __init__(self, ms: float) -> None:
        self._a = torch.randn(4096, 4096, device=DEVICE).bfloat16()
        for _ in range(20):
            self._a @ self._a
        one = seconds(lambda: [self._a @ self._a for _ in range(100)]) / 100
        self._times = max(1, round(ms / 1000 / one))

    def __call__(self) -> None:
        for _ in range(self._times):
            self._a @ self._a


def put_figures(task: Task, store: AnyStore) -> Figures:
    """What the calls of put take together, by generation, with work queued before each."""
    work, held_up = Work(2.0), []
    there = torch.randn(task.shape, device=DEVICE).bfloat16()

    def act(planned: PlannedStore, segment: int) -> None:
        total = 0.0
        for op in planned.ops:
            work()
            if op.writes:
                total += seconds(lambda key=op.key[1:]: planned.put(key, there), wait=False)  # type: ignore[misc]
            else:
                planned.get(op.key[1:])
        torch.cuda.synchronize()
        held_up.append(1000 * total)

    run_segments(task, store, act)
    return {"generations_ms": held_up, "ms": statistics.median(held_up), "most_ms": max(held_up), "bar": 10}


def value_of(key: Key) -> int:
    """An entry's value follows from its key; bfloat16 is exact up to 256."""
    _, segment, _, branch, unit, _ = key
    return (int(segment or 0) * 16 + int(unit or 0) * 2 + BRANCHES.index(str(branch))) % 251


def prefetch_figures(task: Task, store: AnyStore, compute_ms: float) -> Figures:
    """The computing stream's stalls at reads, and what was read: each value is compared."""
    work = Work(compute_ms)
    stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    waited: list[float] = []

    def act(planned: PlannedStore, segment: int) -> None:
        for index, op in enumerate(planned.ops):
            work()
            value = value_of(op.key)
            if op.writes:
                planned.put(op.key[1:], torch.full(task.shape, value, dtype=torch.bfloat16, device=DEVICE))
                continue
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            found = planned.get(op.key[1:])
            after.record()
            assert found is not None
            wrong.add_((found != value).sum())
            if segment > 1:  # the first ones find the disk's queue empty and the memory new
                stalls.append((before, after))
            if index % 8 == 7:
                torch.cuda.synchronize()  # as a scheduler's step does: the loop does not run far ahead of the device
        waited.append(planned.waits.seconds)

    run_segments(task, store, act)
    torch.cuda.synchronize()
    stalled_ms = sum(before.elapsed_time(after) for before, after in stalls)
    pinned = torch.empty(task.shape, dtype=torch.bfloat16, pin_memory=True)
    copy_ms = 1000 * statistics.median(seconds(lambda: pinned.to(DEVICE, non_blocking=True)) for _ in range(20))
    transfer_ms = copy_ms * len(stalls)
    return {
        "reads": len(stalls),
        "wrong_values": int(wrong.item()),
        "stalled_ms": stalled_ms,
        "transfer_ms": transfer_ms,
        "host_waits_s": waited,
        "hidden": 1 - stalled_ms / transfer_ms,
        "bar": 0.95,
    }


def measure(folder: Path, store: AnyStore, quick: bool) -> dict[str, Figures]:
    """All figures, by name."""
    trips, figures = 8 if quick else 60, {}
    small, large = SHAPES["12 MB"], SHAPES["43 MB"]
    figures["device round trip, 12 MB"] = device_figures(Form(DEVICE, torch.bfloat16, small))
    for name, shape in SHAPES.items():
        task = Task(shape, trips // 2, 4, 3 * trips, 0, folder / name[:2])
        figures[f"host round trip, {name}"] = host_figures(task, store)
    figures["put of 192 MB"] = put_figures(Task(small, 8, 12, 100, 40, folder / "put"), store)
    for name, shape, units in (("12 MB", small, 8), ("43 MB", large, 8)):
        task = Task(shape, units, 4 if quick else 12, 8, 6, folder / f"ahead-{name[:2]}")
        figures[f"prefetch, {name} from disk"] = prefetch_figures(task, store, 12 if name == "12 MB" else 45)
    return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-ray", action="store_true", help="the store's class in a process, without Ray")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--directory", type=Path, default=ROOT / "runs", help="on the disk to measure")
    parser.add_argument("--output", type=Path, default=Path("runs/store_gpu"), help="a folder")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    store: AnyStore = StoreProcess() if args.no_ray else RayStore()
    try:
        with tempfile.TemporaryDirectory(dir=args.directory) as folder:
            figures = measure(Path(folder), store, args.quick)
    finally:
        store.close()
    table = Table("what", "figures", title=f"{torch.cuda.get_device_name()}")
    for name, of in figures.items():
        table.add_row(name, ", ".join(f"{key} {_text(value)}" for key, value in of.items()))
    Console(width=150).print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(provenance("cuda") | {"figures": figures}, indent=1) + "\n")


def _text(value: float | Sequence[float]) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else f"[{', '.join(f'{one:.3g}' for one in value)}]"


if __name__ == "__main__":
    main()
