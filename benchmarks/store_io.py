"""What the arena and the disk tier cost beside bare copies and bare direct I/O of the same bytes.

    python benchmarks/store_io.py [--pairs 31] [--disk-pairs 15] [--threads 2] [--directory .] [--output FILE]

Ours and the bare way alternate in one run, on buffers that were touched before, for residuals of 12 and 43 MB:
put + get through slots of the arena against a copy into the arena and one out; writes and reads of eight entries at
once by the disk tier, in a folder of `--directory`, against `pwritev` and `preadv` with O_DIRECT by as many threads,
which open a file each as well. Nothing is synced in either. Prints medians, and writes them with what they were
measured on.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere


from benchmarks.provenance import provenance  # noqa: E402
from edit_ray.tiers.arena import Arena  # noqa: E402
from edit_ray.tiers.disk_tier import DiskTier  # noqa: E402
from edit_ray.tiers.slots import Slots, slot_bytes  # noqa: E402

SHAPES = {"12 MB": (1, 4096, 1536), "43 MB": (1, 14_040, 1536)}  # bf16 residuals of Wan2.1-1.3B
ENTRIES = 8  # on their way at once
ARENA_BAR, DISK_BAR = 1.3, 1.2

Figures = dict[str, Any]


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def compared(bare: Callable[[], float], ours: Callable[[], float], pairs: int, bar: float) -> Figures:
    """Medians of alternating measurements in ms, after two that warm up; whichever comes first in a pair alternates."""
    measured: list[tuple[float, float]] = []
    for pair in range(pairs + 2):
        first = (bare(), ours()) if pair % 2 else (ours(), bare())
        measured.append(first if pair % 2 else (first[1], first[0]))
    bare_s, ours_s = (statistics.median(column) for column in zip(*measured[2:], strict=True))
    return {"pairs": pairs, "bare_ms": 1000 * bare_s, "ours_ms": 1000 * ours_s, "ratio": ours_s / bare_s, "bar": bar}


def arena_figures(arena: Arena, shape: tuple[int, ...], pairs: int) -> Figures:
    """Put + get as by an owner and a second process that map one arena, against two bare copies."""
    source, target = torch.randn(shape).bfloat16(), torch.empty(shape, dtype=torch.bfloat16)
    plain = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in (source, target)]
    size = slot_bytes(source.nbytes)
    slots = Slots({size: arena.size_bytes // size})
    fixed, _ = slots.take(size)
    assert fixed is not None
    place = arena.memory(fixed, source.nbytes)
    with Arena.open(arena.path) as other:

        def bare() -> None:
            place[:] = plain[0]
            plain[1][:] = place

        def ours() -> None:
            offset, _ = slots.take(size)
            assert offset is not None
            other.tensor(offset, source.dtype, shape).copy_(source)
            target.copy_(arena.tensor(offset, source.dtype, shape))
            slots.free(size, offset)

        ours()  # the second mapping touches its pages
        return compared(lambda: timed(bare), lambda: timed(ours), pairs, ARENA_BAR)


def disk_figures(folder: Path, arena: Arena, shape: tuple[int, ...], pairs: int, threads: int) -> dict[str, Figures]:
    """Writes and reads of `ENTRIES` entries at once, between the arena and files."""
    keys, size = count(), slot_bytes(torch.Size(shape).numel() * 2)
    memories = [arena.memory(index * size, size) for index in range(ENTRIES)]
    for index in range(ENTRIES):
        arena.tensor(index * size, torch.bfloat16, shape).normal_()
    paths = [folder / f"bare-{index}" for index in range(ENTRIES)]
    with closing(DiskTier(folder / "entries", num_threads=threads)) as tier, ThreadPoolExecutor(threads) as pool:
        written: list[int] = []

        def bare(call: Callable[[int, list[memoryview], int], int], flags: int) -> float:
            def one(path: Path, memory: memoryview) -> None:
                descriptor = os.open(path, flags | os.O_DIRECT)
                moved = call(descriptor, [memory], 0)
                os.close(descriptor)
                assert moved == len(memory)

            return timed(lambda: list(pool.map(one, paths, memories)))

        def write_bare() -> float:
            for path in paths:
                path.unlink(missing_ok=True)
            return bare(os.pwritev, os.O_WRONLY | os.O_CREAT)

        def write_ours() -> float:
            for number in written:
                tier.files.remove(tier.files.drop((number,)))
            written[:] = [next(keys) for _ in range(ENTRIES)]
            pairs = list(zip(written, memories, strict=True))
            return timed(lambda: wait([tier.write((key,), memory, torch.bfloat16, shape) for key, memory in pairs]))

        def read_ours() -> float:
            pairs = list(zip(written, memories, strict=True))
            return timed(lambda: wait([tier.read((key,), memory) for key, memory in pairs]))

        figures = {
            "write": compared(write_bare, write_ours, pairs, DISK_BAR),
            "read": compared(lambda: bare(os.preadv, os.O_RDONLY), read_ours, pairs, DISK_BAR),
        }
        assert not any(tier.files.faults.values())
        assert tier.files.files.direct
        return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--disk-pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="I/O threads of either way")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--output", type=Path, help="where to write the figures too, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a copy by several threads is no fair match for a bare one
    table = Table("what", "bytes", "bare ms", "ours ms", "ratio", "bar", title="Medians")
    figures: dict[str, dict[str, Figures]] = {}
    largest = max(torch.Size(shape).numel() * 2 for shape in SHAPES.values())
    with Arena.create(largest * ENTRIES) as arena, tempfile.TemporaryDirectory(dir=args.directory) as folder:
        for name, shape in SHAPES.items():
            figures[name] = {"arena put + get": arena_figures(arena, shape, args.pairs)}
            figures[name] |= disk_figures(Path(folder), arena, shape, args.disk_pairs, args.threads)
    for name, rows in figures.items():
        for what, row in rows.items():
            bytes_text = name if what.startswith("arena") else f"{ENTRIES} × {name}"
            table.add_row(
                what, bytes_text, *(f"{row[key]:.2f}" for key in ("bare_ms", "ours_ms", "ratio")), str(row["bar"])
            )
    Console().print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps(provenance("cpu") | {"threads": args.threads, "figures": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
