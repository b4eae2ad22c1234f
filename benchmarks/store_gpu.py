"""What the tiers cost a segment on a GPU, beside bare pinned copies of the same run.

    python benchmarks/store_gpu.py --output benchmarks/results/store_gpu            with the CacheStore actor on Ray
    python benchmarks/store_gpu.py --no-ray                                         its class in a process of its own

- device: put + get of the device tier.
- host: from put, of one residual, until another of the segment before is ready on the device, its bytes on their way
  only after the first one's are in the arena; of 12 and 43 MB, nothing loaded ahead. Beside it, alternating, a copy
  from the device into pinned memory and back. And the same by the device's clock, in a loop that is ahead of it.
- put: how long the loop is held up by the writes of a generation of 192 MB, while the GPU computes.
- prefetch: segments that read in their first step what one before has written there, in place of computing it, with a
  host tier that does not hold it all; how long reads make the computing stream wait, by what their copies to the device
  take (from disk to arena is not counted in it).

Prints a table, and writes results.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402
from benchmarks.rolling_plan import rolling_plan  # noqa: E402
from benchmarks.store_process import AnyStore, RayStore, StoreProcess  # noqa: E402
from edit_ray.actors.messages import RunSpec  # noqa: E402
from edit_ray.cache.stores.memory import GPUStore  # noqa: E402
from edit_ray.config import Config  # noqa: E402
from edit_ray.tiers.leases import Reuse, SegmentLeases  # noqa: E402
from edit_ray.tiers.protocol import EntryForm, Op  # noqa: E402
from edit_ray.tiers.reuse_plan import Key, make_reuse_plan  # noqa: E402
from edit_ray.tiers.store_client import PlannedStore  # noqa: E402

RUN, EXPERT, BRANCHES = "gpu", "transformer", ("cond", "uncond")
SHAPES = {"12 MB": (1, 4096, 1536), "43 MB": (1, 14_040, 1536)}  # bf16 residuals of Wan2.1-1.3B
DEVICE = torch.device("cuda", 0)

Figures = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Segments of some units and two branches, and what they reuse.

    With align "last" each writes an entry per unit and branch in its last step, and reads those of the segment before
    in its first. With "step" one computes its first step and writes it, and the four after it read that.
    """

    shape: tuple[int, ...]
    units: int
    segments: int
    host_entries: int
    ahead_entries: int
    directory: Path
    align: Literal["step", "last"] = "last"

    @property
    def form(self) -> EntryForm:
        return EntryForm(DEVICE, torch.bfloat16, self.shape)

    def leases(self, store: AnyStore, reuse: type[Reuse]) -> SegmentLeases:
        """The GPU actor's side of a run with this plan."""
        spec = self.spec
        run, sizes = spec.residuals_id, [self.form.size] * self.units
        if self.align == "last":
            plan = rolling_plan(run, self.segments, window=1, unit_bytes=sizes)
        else:
            experts, units = [EXPERT] * 2, {EXPERT: sizes}
            plan = make_reuse_plan(run, self.segments, window=4, warm_steps=1, experts=experts, unit_bytes=units)
        return SegmentLeases(store, spec.reusing, reuse(plan, self.form))

    @property
    def spec(self) -> RunSpec:
        """The run."""
        options = {
            "device_bytes": self.ahead_entries * self.form.size,
            "host_bytes": self.host_entries * self.form.size,
            "directory": str(self.directory),
        }
        prompts = [{"segment": 0, "prompt": "a red circle"}]
        config = Config.model_validate({"store": options, "video": {"num_segments": 1}, "prompt_segments": prompts})
        return RunSpec(RUN, self.directory, config, config.num_segments)


def seconds(action: Callable[[], object], wait: bool = True) -> float:
    """Of a call, with `wait` until the device is through."""
    started = time.perf_counter()
    action()
    if wait:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run_segments(
    task: Task, store: AnyStore, act: Callable[[PlannedStore, int], None], reuse: type[Reuse] = Reuse
) -> dict[str, Any]:
    """Every segment in turn: `act(planned, segment)` carries out its ops. The store's statistics after the last."""
    leases, statistics = task.leases(store, reuse), {}
    for segment in range(task.segments):
        planned = leases.begin(segment, 0, history_len=1)
        act(planned, segment)
        planned.finish()
        statistics = leases.complete(segment, 0)
    leases.close()
    store.call("drop_run", task.spec.residuals_id)()
    return statistics


def device_figures(form: EntryForm, rounds: int = 200) -> Figures:
    """put + get by reference."""
    store, tensor = GPUStore(), torch.randn(form.shape, device=DEVICE).bfloat16()

    def both() -> None:
        store.put((0, 1), tensor)
        assert store.get((0, 1)) is not None

    return {"ms": 1000 * median(seconds(both, wait=False) for _ in range(rounds)), "bar": 0.02}


class Alternating(Reuse):
    """Each write before a read, so that the two make a round trip."""

    def ops(self, segment: int) -> list[Op]:
        ops = super().ops(segment)
        pairs = zip_longest((op for op in ops if op.writes), (op for op in ops if not op.writes))
        return [op for pair in pairs for op in pair if op is not None]


def host_figures(task: Task, store: AnyStore) -> Figures:
    """Round trips by the clock, those of bare copies made in between, and round trips by the device's own clock, in a
    loop that is ahead of the device, as a denoising loop is.
    """
    form = task.form
    pinned = torch.empty(form.shape, dtype=form.dtype, pin_memory=True)
    there = torch.randn(form.shape, device=DEVICE).bfloat16()
    work = Work(1.0)
    trips: list[float] = []
    bare: list[float] = []
    by_device: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def round_trip(planned: PlannedStore, pair: Sequence[Op]) -> None:
        planned.put(pair[0].key[1:], there)
        planned.copies.loading.wait_stream(planned.copies.leaving)  # type: ignore[attr-defined]  # a GPU has both
        planned.get(pair[1].key[1:])

    def bare_trip() -> None:
        pinned.copy_(there, non_blocking=True)
        there.copy_(pinned, non_blocking=True)

    def act(planned: PlannedStore, segment: int) -> None:
        for index in range(len(planned.ops)):  # not between trips: a thread that has slept is slow at first
            _await_place(planned, index)
        for index in range(0, len(planned.ops), 2):
            pair = planned.ops[index : index + 2]
            if pair[1].writes:  # the first segment has nothing to read
                for op in pair:
                    planned.put(op.key[1:], there)
            elif segment % 2:
                trips.append(seconds(lambda pair=pair: round_trip(planned, pair)))  # type: ignore[misc]
                bare.append(seconds(bare_trip))
            else:
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                work()
                events[0].record()
                round_trip(planned, pair)
                events[1].record()
                torch.cuda.synchronize()
                by_device.append(events)
            planned.clear()

    run_segments(task, store, act, Alternating)
    ours, copies = 1000 * median(trips), 1000 * median(bare)
    return {
        "round_trips": len(trips),
        "ms": ours,
        "pinned_ms": copies,
        "rate_of_pinned": copies / ours,
        "device_round_trips": len(by_device),
        "device_ms": median(before.elapsed_time(after) for before, after in by_device),
    }


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
    return {"generations_ms": held_up, "ms": median(held_up), "most_ms": max(held_up), "bar": 10}


def value_of(key: Key) -> int:
    """An entry's value follows from its key; bfloat16 is exact up to 256."""
    _, segment, _, branch, unit, _ = key
    return (int(segment or 0) * 16 + int(unit or 0) * 2 + BRANCHES.index(str(branch))) % 251


def prefetch_figures(task: Task, store: AnyStore, compute_ms: float, steps: int) -> Figures:
    """The computing stream's stalls at reads in loops of so many steps; each value that was read is compared."""
    work = Work(compute_ms)
    stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    host_waits: list[float] = []
    small = torch.zeros(1, device=DEVICE)

    def use(planned: PlannedStore, op: Op) -> None:
        if op.writes:
            value = torch.full(task.shape, value_of(op.key), dtype=torch.bfloat16, device=DEVICE)
            return planned.put(op.key[1:], value)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        found = planned.get(op.key[1:])
        after.record()
        assert found is not None
        wrong.add_((found != value_of(op.key)).sum())
        stalls.append((before, after))

    def act(planned: PlannedStore, segment: int) -> None:
        work()  # so that the stream waits for reads, if for anything, and not for Python to ask for them
        for step in range(steps):
            for op in planned.ops:
                if step or op.writes:
                    work()  # what is read takes the place of what would be computed
                if step == 0:
                    use(planned, op)
                else:
                    planned.put((*op.key[1:5], step), small)  # a unit's latest residual, which no plan wants
            torch.cuda.synchronize()  # as a scheduler's step may: the loop does not run far ahead of the device
        host_waits.append(planned.waits.seconds)

    of_store = run_segments(task, store, act)
    stalled_ms = sum(before.elapsed_time(after) for before, after in stalls)
    pinned = torch.empty(task.shape, dtype=torch.bfloat16, pin_memory=True)
    copy_ms = 1000 * median(seconds(lambda: pinned.to(DEVICE, non_blocking=True)) for _ in range(20))
    transfer_ms = copy_ms * len(stalls)
    return {
        "reads": len(stalls),
        "wrong_values": int(wrong.item()),
        "from_disk": of_store["counts"]["prefetches_requested",],
        "stalled_ms": stalled_ms,
        "transfer_ms": transfer_ms,
        "host_waits_s": host_waits,
        "hidden": 1 - stalled_ms / transfer_ms,
        "bar": 0.95,
    }


def measure(folder: Path, store: AnyStore, quick: bool) -> dict[str, Figures]:
    """All figures, by name."""
    trips, figures = 8 if quick else 60, {}
    small, large = SHAPES["12 MB"], SHAPES["43 MB"]
    figures["device round trip, 12 MB"] = device_figures(EntryForm(DEVICE, torch.bfloat16, small))
    for name, shape in SHAPES.items():
        task = Task(shape, trips // 2, 3 if quick else 7, 3 * trips, 0, folder / name[:2])
        figures[f"host round trip, {name}"] = host_figures(task, store)
    figures["put of 192 MB"] = put_figures(Task(small, 8, 12, 100, 40, folder / "put"), store)
    # A segment reads 16 entries one after the other: all have a place on the device, and 10 in the arena. A unit is an
    # eighth of Wan2.1-1.3B, with 14,040 tokens 22 ms.
    for name, shape, unit_ms in (("12 MB", small, 6), ("43 MB", large, 22)):
        task = Task(shape, 8, 3 if quick else 10, 10, 16, folder / f"ahead-{name[:2]}", "step")
        figures[f"prefetch, {name}"] = prefetch_figures(task, store, unit_ms, steps=5)
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
