"""What `edit-ray plan` prints, in lines that fit 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from edit_ray.cli.outlook import DISK_TO_HOST, HOST_TO_DISK, HOST_TO_GPU, Outlook
from edit_ray.config import Config


def lines(config: Config, outlook: Outlook, forward_ms: float | None) -> list[str]:
    """What `plan` prints. Pure."""
    return [
        *_about_the_run(config, outlook, forward_ms),
        "",
        *_about_choices(config, outlook),
        "",
        *_about_tiers(config, outlook, forward_ms),
    ]


def _about_the_run(config: Config, outlook: Outlook, forward_ms: float | None) -> list[str]:
    cache, plan, size = config.cache, outlook.plan, outlook.size
    _, tokens, width = outlook.shape
    found = [
        f"model     {config.model.path}",
        f"run       {config.num_segments} segments, reuse window {cache.reuse_window}, granularity {cache.granularity}",
        f"residual  {size:,} bytes ({_bytes(size)}): {tokens:,} tokens of width {width:,}, {config.model.torch_dtype}",
    ]
    turns: dict[tuple[int, int], list[int]] = {}
    for index, segment in enumerate(plan.segments):
        turns.setdefault((len(segment.writes), len(segment.reads)), []).append(index)
    for (writes, reads), segments in turns.items():
        wrote = f"writes {writes} residuals ({_bytes(writes * size)}, {writes * size / HOST_TO_DISK:.3g} s to disk)"
        read = f"reads {reads} residuals ({_bytes(reads * size)})"
        does = " and ".join(text for text, given in ((wrote, writes), (read, reads)) if given) or "reuses nothing"
        found.append(f"segment   {_some(segments)}: {does}")
    bound = config.store.disk_bytes
    found.append(
        f"alive     {_bytes(outlook.alive_bytes)} at a time; bound (store.disk_bytes): "
        f"{'none' if bound is None else _bytes(bound)}"
    )
    if plan.computed:
        lost = sum(slot.size for slot in plan.computed)
        found += [
            f"computed  {len(plan.computed)} residuals ({_bytes(lost)}) do not fit: every segment computes them,",
            f"          {_computing(outlook.lost, forward_ms)} in each that would have reused them; "
            f"all of them need {outlook.needed_bytes:,} bytes",
        ]
    else:
        found.append("computed  nothing for want of room")
    saved = f"{outlook.saved:.4g} of the run's {outlook.forwards:,} forwards"
    return [
        *found,
        f"saved     {saved}" + ("" if forward_ms is None else f", {outlook.saved * forward_ms / 1000:.4g} s"),
    ]


def _about_choices(config: Config, outlook: Outlook) -> list[str]:
    configured = (config.cache.granularity, config.cache.reuse_window)
    rows = [("granularity", "window", "residuals", "alive at a time", "run writes", "run reads", "forwards saved", "")]
    rows += [
        (
            str(choice.granularity),
            str(choice.window),
            str(choice.entries),
            _bytes(choice.alive_bytes),
            _bytes(choice.written_bytes),
            _bytes(choice.read_bytes),
            f"{choice.saved:.4g}",
            "configured" if (choice.granularity, choice.window) == configured else "",
        )
        for choice in outlook.choices
    ]
    return ["If everything fitted, by granularity and window:", *_columns(rows)]


def _about_tiers(config: Config, outlook: Outlook, forward_ms: float | None) -> list[str]:
    on_gpu = config.model.device != "cpu"
    tiers = {"host": config.store.host_bytes, "disk": config.store.disk_bytes}
    budgets = [f"{name} {'without bound' if size is None else _bytes(size)}" for name, size in tiers.items()]
    rows = [("eviction", "host hits", "disk hits", "misses", "stall", "recompute", "of the bound")]
    for name, result in outlook.simulated.items():
        hits = result.hits.total()
        stall = result.stall_seconds + (hits * outlook.size / HOST_TO_GPU if on_gpu else 0)
        rows.append(
            (
                name,
                str(result.hits["host"]),
                str(result.hits["disk"]),
                str(result.reads - hits),
                f"{stall:.4g} s",
                _computing(result.recompute_seconds, forward_ms),
                f"{result.ratio:.1%}",
            )
        )
    to_gpu = f"host to GPU {HOST_TO_GPU / 1e9:g}, " if on_gpu else ""
    known = "unknown (--forward-ms says it)" if forward_ms is None else f"{forward_ms:g} ms"
    return [
        "Simulated, as if all were planned and nothing brought ahead:",
        f"{', '.join(budgets)}; segments 0 to {outlook.simulated_segments - 1}",
        *_columns(rows),
        "Bound: the computing that no choice of victims saves more of; stall: what prefetch has to hide.",
        f"Assumed, GB/s as measured on one H200's host: {to_gpu}disk to host {DISK_TO_HOST / 1e9:g}, "
        f"host to disk {HOST_TO_DISK / 1e9:g}.",
        f"Assumed, one forward: {known}.",
    ]


def _computing(forwards: float, forward_ms: float | None) -> str:
    return f"{forwards:.4g} forwards" if forward_ms is None else f"{forwards * forward_ms / 1000:.4g} s"


def _bytes(count: int) -> str:
    """In units of a thousand, as speeds are."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.4g} {unit}"


def _some(segments: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, segments[:most])) + (f", … ({len(segments)} in all)" if len(segments) > most else "")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
