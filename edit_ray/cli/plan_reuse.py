"""`edit-ray plan`: prints the reuse estimate of a run before anything is loaded, in lines of at most 100 columns."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edit_ray.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from edit_ray.cli.reuse_estimate import ReuseEstimate
    from edit_ray.config import Config

# One eager forward of Wan2.1-1.3B on an H200: 480 x 832 pixels, 33 frames, bfloat16. Nothing else was measured.
MEASURED_MS, MEASURED_TOKENS, MEASURED_WIDTH, MEASURED_BLOCKS = 181.6, 14_040, 1536, {"transformer": 30}


def plan(options: argparse.Namespace) -> int:
    """Prints what the configured run will reuse, a causal one's K/V, and what fits on which card. Loads no weights.

    Raises ConfigError, ModelError.
    """
    from edit_ray.cli.plan_cards import CARDS, card_lines
    from edit_ray.cli.reuse_estimate import what_can_be_skipped
    from edit_ray.config import load_config

    forward_ms: float | None = options.forward_ms
    if forward_ms is not None and not 0 < forward_ms < math.inf:
        raise ConfigError([f"--forward-ms is {forward_ms:g}; it must be a number of milliseconds above 0"])
    cards = options.card or CARDS
    if any(not 0 < card < math.inf for card in cards):
        raise ConfigError([f"--card is {' '.join(f'{card:g}' for card in cards)}; it must be gigabytes above 0"])
    config = load_config(options.config, options.set)
    said = ["cache.reuse_window is 0: no segment of this run reuses residuals of another."]
    if config.cache.reuse_window:
        said = _reuse_lines(options, config, forward_ms)
    elif (skipped := what_can_be_skipped(config)) is not None:
        said.append(f"steps     {skipped}")
    print("\n".join([*kv_lines(config), *said, "", *card_lines(config, cards)]))
    return 0


def kv_lines(config: Config) -> list[str]:
    """What a causal run keeps of earlier chunks, and computes again; nothing of other runs. Raises ModelError."""
    if not config.continuity.causal:
        return []
    from edit_ray.config.run_memory import run_of
    from edit_ray.engine.card_memory import kv_bytes
    from edit_ray.engine.model_info import read_configs

    configs, _ = read_configs(config.model.path)
    run, spatial = run_of(config), configs["vae"].get("scale_factor_spatial", 8)
    chunk, window = (kv_bytes(configs["transformer"], run, spatial, count) for count in (run.chunk_size, run.window))
    rotated = f", {_bytes(window // 2)} of rotated keys" if run.rotated_keys else ""
    chunks, steps, shown = config.continuity.chunks, config.sampling.num_inference_steps, run.window // run.chunk_size
    stored = kv_bytes(configs["transformer"], run, spatial, chunks * run.chunk_size)
    said = (
        f"recache   a segment of {chunks} chunks takes {chunks * (steps + 1)} forwards of a chunk, and before them up "
    )
    said += f"to {shown}"
    if config.continuity.commits_kv:
        said = (
            f"commit    a segment reads up to {_bytes(window)} of K/V, and writes up to {_bytes(min(stored, window))}"
        )
    return [
        f"K/V       {_bytes(chunk)} a chunk of {run.chunk_size} latents, {_bytes(window)} in a window of {run.window}"
        f"{rotated}",
        said,
    ]


def _reuse_lines(options: argparse.Namespace, config: Config, forward_ms: float | None) -> list[str]:
    """What the run reuses, as text. Raises ConfigError, ModelError."""
    from edit_ray.cli.reuse_estimate import ReuseEstimate

    try:
        estimate = ReuseEstimate(config)
        needs_store = any(segment.working for segment in estimate.plan.segments)
    except ModelError:
        raise
    except ValueError as error:
        raise ConfigError([f"{options.config}: cache.{error}"]) from None
    host = config.store.host_bytes
    if needs_store and estimate.size > host:
        raise ConfigError([f"store.host_bytes is {host}; one residual of this run has {estimate.size} bytes."])
    if forward_ms is None and _is_measured(config, estimate):
        forward_ms = MEASURED_MS
    return lines(config, estimate, forward_ms)


def _is_measured(config: Config, estimate: ReuseEstimate) -> bool:
    sizes = estimate.shape[1], estimate.model.width, estimate.model.num_blocks
    dtype, device = config.model.torch_dtype, config.model.device
    return sizes == (MEASURED_TOKENS, MEASURED_WIDTH, MEASURED_BLOCKS) and dtype == "bfloat16" and device != "cpu"


def lines(config: Config, estimate: ReuseEstimate, forward_ms: float | None) -> list[str]:
    """The estimate as text; with `forward_ms`, the milliseconds of one forward, computing time is in seconds. Pure."""
    return [
        *_run_lines(config, estimate, forward_ms),
        "",
        *_choice_lines(config, estimate),
        "",
        *_tier_lines(config, estimate, forward_ms),
    ]


def _run_lines(config: Config, estimate: ReuseEstimate, forward_ms: float | None) -> list[str]:
    from edit_ray.cli.reuse_estimate import HOST_TO_DISK, what_can_be_skipped

    cache, plan, size = config.cache, estimate.plan, estimate.size
    _, tokens, width = estimate.shape
    found = [
        f"model     {config.model.path}",
        f"run       {config.num_segments} segments, reuse window {cache.reuse_window}, granularity {cache.granularity}",
        f"steps     {what_can_be_skipped(config)}",
        f"residual  {size:,} bytes ({_bytes(size)}): {tokens:,} tokens of width {width:,}, {config.model.torch_dtype}",
    ]
    alike: dict[tuple[int, int], list[int]] = {}
    for index, segment in enumerate(plan.segments):
        alike.setdefault((len(segment.writes), len(segment.reads)), []).append(index)
    for (writes, reads), segments in alike.items():
        wrote = f"writes {writes} residuals ({_bytes(writes * size)}, {writes * size / HOST_TO_DISK:.3g} s to disk)"
        read = f"reads {reads} residuals ({_bytes(reads * size)})"
        uses = " and ".join(text for text, count in ((wrote, writes), (read, reads)) if count) or "reuses nothing"
        found.append(f"segment   {_listed(segments)}: {uses}")
    capacity = config.store.disk_bytes
    limit = "unlimited" if capacity is None else _bytes(capacity)
    found.append(f"live      {_bytes(estimate.live_bytes)} at once; capacity (store.disk_bytes): {limit}")
    if plan.computed:
        lost = sum(slot.size for slot in plan.computed)
        found += [
            f"computed  {len(plan.computed)} residuals ({_bytes(lost)}) do not fit: every segment computes them,",
            f"          {_computing(estimate.lost, forward_ms)} in each that would have reused them; "
            f"all of them need {estimate.needed_bytes:,} bytes",
        ]
    else:
        found.append("computed  none: all residuals fit")
    saved = f"saved     {estimate.saved:.4g} of the run's {estimate.forwards:,} forwards"
    return [*found, saved if forward_ms is None else f"{saved}, {estimate.saved * forward_ms / 1000:.4g} s"]


def _choice_lines(config: Config, estimate: ReuseEstimate) -> list[str]:
    configured = (config.cache.granularity, config.cache.reuse_window)
    rows = [("granularity", "window", "residuals", "live at once", "run writes", "run reads", "forwards saved", "")]
    rows += [
        (
            str(choice.granularity),
            str(choice.window),
            str(choice.entries),
            _bytes(choice.live_bytes),
            _bytes(choice.written_bytes),
            _bytes(choice.read_bytes),
            f"{choice.saved:.4g}",
            "configured" if (choice.granularity, choice.window) == configured else "",
        )
        for choice in estimate.choices()
    ]
    return ["If all residuals fit, by granularity and window:", *_columns(rows)]


def _tier_lines(config: Config, estimate: ReuseEstimate, forward_ms: float | None) -> list[str]:
    from edit_ray.cli.reuse_estimate import DISK_TO_HOST, HOST_TO_DISK, HOST_TO_GPU

    on_gpu = config.model.device != "cpu"
    host, disk = estimate.simulated()
    moving = disk * estimate.size / DISK_TO_HOST + ((host + disk) * estimate.size / HOST_TO_GPU if on_gpu else 0)
    to_gpu = f"host to GPU {HOST_TO_GPU / 1e9:g}, " if on_gpu else ""
    known = "unknown (give --forward-ms)" if forward_ms is None else f"{forward_ms:g} ms"
    return [
        f"Simulated with a host tier of {_bytes(config.store.host_bytes)}, segments 0 to "
        f"{estimate.simulated_segments - 1}:",
        f"reads     {host} from the host tier, {disk} from disk; prefetch has {moving:.4g} s to hide",
        f"Assumed, GB/s as measured on one H200's host: {to_gpu}disk to host {DISK_TO_HOST / 1e9:g}, "
        f"host to disk {HOST_TO_DISK / 1e9:g}.",
        f"Assumed, one forward: {known}.",
    ]


def _computing(forwards: float, forward_ms: float | None) -> str:
    return f"{forwards:.4g} forwards" if forward_ms is None else f"{forwards * forward_ms / 1000:.4g} s"


def _bytes(count: int) -> str:
    """The amount with a decimal prefix."""
    power = min(max(len(str(count)) - 1, 0) // 3, 4)
    return f"{count / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _listed(segments: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, segments[:most])) + (f", … ({len(segments)} in all)" if len(segments) > most else "")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligns the first column left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
