"""What of a run fits on which card: a part of `edit-ray plan`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edit_ray.cache.blocks import split_blocks
from edit_ray.config.run_memory import run_of
from edit_ray.engine.calibration import policy_of
from edit_ray.engine.card_memory import Placement, Run, most_frames, needs_of, place
from edit_ray.engine.model_info import read_configs

if TYPE_CHECKING:
    from edit_ray.config import Config

CARDS = (12, 16, 24, 48, 80)


def cached_run(config: Config, configs: Mapping[str, Mapping[str, Any]]) -> Run:
    """What the memory of a run depends on, its residuals included. Raises ValueError as the cache's checks do."""
    run, cache = run_of(config), config.cache
    if cache.policy == "none":
        return run
    policy = policy_of(cache, config.model)
    stacks = [of.get("num_layers", 40) for name, of in configs.items() if name.startswith("transformer")]
    units = sum(len(split_blocks(blocks, cache.granularity)) for blocks in stacks)
    stored = policy.most_stored(config.sampling.num_inference_steps)
    keeping = units * (1 if policy.uncond_follows else run.branches)
    return replace(
        run,
        entries=stored * units * run.branches,
        hidden=policy.kept_hidden * keeping,
        latents=policy.kept_latents * keeping,
    )


def card_lines(config: Config, cards: Sequence[float] = CARDS) -> list[str]:
    """The table, in lines of at most 100 columns. Raises ModelError, ValueError."""
    configs, per_token = read_configs(config.model.path)
    run = cached_run(config, configs)
    needs = needs_of(configs, run, per_token=per_token)
    kv = ["K/V"] if needs.kv else []
    rows: list[tuple[str, ...]] = [("card", "weights", *kv, "residuals", "denoising", "decoding", "peak", "set")]
    for card in cards:
        placed = place(needs, int(card * 1e9))
        tiled = placed is None or placed.tiled
        denoising = needs.weights + needs.forward + (0 if tiled else needs.decoder_state)
        decoding = needs.weights + (needs.tiled if tiled else needs.decoder)
        on_card = needs.least if placed is None else placed.device_bytes or needs.whole
        numbers = (on_card, *([needs.kv] if kv else []), needs.residuals, denoising, decoding)
        peak = needs.least + needs.beside(tiled=True) if placed is None else placed.peak
        if placed is not None:
            said = _said(placed)
        elif kv:
            said = "too small; a smaller continuity.window needs less"
        else:
            said = _fewer(most_frames(configs, run, int(card * 1e9), per_token=per_token))
        rows.append((f"{card:g} GB", *(_gb(number) for number in (*numbers, peak)), said))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]
    return [
        f"On a card, GB (estimated; the transformers have {_gb(needs.whole)}; the text encoder in host memory):",
        *table,
        "blocks: model.offload: blocks, with this model.device_bytes; tiled: engine.tiled_decode: always.",
    ]


def _said(placed: Placement) -> str:
    if placed.device_bytes is None:
        return "nothing"
    return f"blocks, {math.ceil(placed.device_bytes / 1e7) / 100:.2f}GB{', tiled' if placed.tiled else ''}"


def _fewer(num_frames: int) -> str:
    return f"too small; num_frames {num_frames} would fit" if num_frames else "too small at any num_frames"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"
