"""What the front compares: policies of this package and the caches of others, each with its settings.

Thresholds were chosen on other prompts and seeds than those measured, so that each method's settings reach from about
0.7 to 0.35 of the blocks; no working peer has fewer settings than any of ours. Settings stand in the order in which
they are measured: first those around 1/1.5, 1/2 and 1/2.5, so that a run that is cut short has them of all methods.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
)

from edit_ray import EditWanPipeline
from edit_ray.engine.calibration import FILE_NAME, read_calibration

Setting = dict[str, Any]


@dataclass(frozen=True)
class Pipelines:
    """The same components under our pipeline and under diffusers' own; `steps` is the length of the loop."""

    ours: EditWanPipeline
    stock: WanPipeline
    steps: int


Enable = Callable[[Pipelines, Setting], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Method:
    """A way of caching: `enable(pipelines, setting)` is entered to get the pipeline on which it is on."""

    name: str
    group: str
    enable: Enable
    settings: list[Setting] = field(default_factory=list)


def our(
    policy: str, options_of: Callable[[Pipelines, Setting], Setting] = lambda pipelines, setting: setting
) -> Enable:
    """A policy of this package under our pipeline; `options_of` makes its options of a setting."""

    @contextmanager
    def enable(pipelines: Pipelines, setting: Setting) -> Iterator[EditWanPipeline]:
        pipelines.ours.enable_cache(policy, pipelines.steps, **options_of(pipelines, setting))
        try:
            yield pipelines.ours
        finally:
            pipelines.ours.disable_cache()

    return enable


def skipping(pipelines: Pipelines, setting: Setting) -> Setting:
    """`ranked` with as many skips as leave a share of the forwards to compute; other options unchanged."""
    others = {name: value for name, value in setting.items() if name != "computed"}
    return {"skips": round(2 * pipelines.steps * (1 - setting["computed"])), **others}


def skipping_steps(pipelines: Pipelines, setting: Setting) -> Setting:
    """The same for `lemica`, which skips steps of both branches."""
    return {"skips": round(pipelines.steps * (1 - setting["computed"]))}


def diffusers_cache(config_of: Callable[[Pipelines, Setting], Any]) -> Enable:
    """One of diffusers' own caches, under its own pipeline."""

    @contextmanager
    def enable(pipelines: Pipelines, setting: Setting) -> Iterator[WanPipeline]:
        transformer = pipelines.stock.transformer
        transformer.enable_cache(config_of(pipelines, setting))
        try:
            yield pipelines.stock
        finally:
            transformer.disable_cache()

    return enable


def magcache_config(pipelines: Pipelines, setting: Setting) -> Any:
    """diffusers' MagCache with the model's ratios: it takes one list, the mean of the branches' here.

    Raises:
        ValueError: the model has no calibration.
    """
    folder = Path(str(pipelines.ours.config.get("_name_or_path") or ""))
    ratios = read_calibration(folder / FILE_NAME).get("magcache", {}).get("mag_ratios")
    if ratios is None:
        raise ValueError("the model has no calibration for magcache")
    if isinstance(ratios, Mapping):
        ratios = [sum(step) / len(step) for step in zip(*ratios.values(), strict=True)]
    return MagCacheConfig(num_inference_steps=pipelines.steps, mag_ratios=ratios, **setting)


def cache_dit(taylorseer: bool) -> Enable:
    """DBCache of the package cache-dit under diffusers' pipeline, with its TaylorSeer or without."""

    @contextmanager
    def enable(pipelines: Pipelines, setting: Setting) -> Iterator[WanPipeline]:
        import cache_dit  # of the extra `bench`

        stock = pipelines.stock
        held = set(stock.transformer.__dict__)
        cache_dit.enable_cache(
            stock,
            cache_config=cache_dit.DBCacheConfig(num_inference_steps=pipelines.steps, **setting),
            calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylorseer else None,
        )
        try:
            yield stock
        finally:
            cache_dit.disable_cache(stock)
            for left in set(stock.transformer.__dict__) - held:  # it leaves a `forward` on the object
                del stock.transformer.__dict__[left]

    return enable


def thresholds(option: str, *values: float, **fixed: Any) -> list[Setting]:
    """One setting a value."""
    return [{option: value, **fixed} for value in values]


_TEA = (0.09, 0.15, 0.25, 0.12, 0.19)
_FIRST_BLOCK = (0.16, 0.27, 0.35, 0.21, 0.45, 0.12)
_MAG = [
    {"threshold": threshold, "max_skip_steps": skips, "retention_ratio": 0.2}
    for threshold, skips in ((0.06, 2), (0.12, 2), (0.25, 4), (0.12, 4), (0.4, 4), (0.6, 6))
]
_SEA = [
    {"threshold": threshold, "max_consecutive_cached": skips}
    for threshold, skips in ((0.2, 2), (0.4, 2), (0.5, 4), (0.3, 2), (0.4, 4), (0.7, 6))
]
_DB = [
    {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4, "residual_diff_threshold": threshold}
    for threshold in _FIRST_BLOCK
]

# Of loops of 30 steps, by the masks alone.
_SPECTRUM = [
    {"warmup_steps": warmup, "window_size": window, "flex_window": flex, "w": w}
    for warmup, window, flex, w in (
        (10, 2.0, 0.0, 1.0),
        (5, 2.0, 0.25, 1.0),
        (5, 2.0, 0.75, 1.0),
        (5, 2.0, 0.25, 0.5),
        (5, 2.0, 0.75, 0.5),
    )
]
_INTERVALS = ((2, 10), (2, 5), (3, 6), (3, 3), (4, 3))  # interval, first steps
_EASY = ((0.05, 10), (0.1, 5), (0.15, 5), (0.07, 5), (0.2, 3))  # threshold, first steps

METHODS = [
    Method(
        "diffusers FirstBlockCache",
        "peer",
        diffusers_cache(lambda pipelines, setting: FirstBlockCacheConfig(**setting)),
        thresholds("threshold", *_FIRST_BLOCK),
    ),
    Method("diffusers MagCache", "peer", diffusers_cache(magcache_config), _MAG),
    Method("diffusers SeaCache", "peer", diffusers_cache(lambda pipelines, setting: SeaCacheConfig(**setting)), _SEA),
    # As it comes it finds nothing in Wan to hook, whatever its interval: one setting shows it.
    Method(
        "diffusers TaylorSeer",
        "peer",
        diffusers_cache(lambda pipelines, setting: TaylorSeerCacheConfig(**setting)),
        [{"cache_interval": 5}],
    ),
    Method("cache-dit DBCache", "peer", cache_dit(taylorseer=False), _DB),
    Method("cache-dit DBCache + TaylorSeer", "peer", cache_dit(taylorseer=True), _DB),
    Method("ranked", "ours", our("ranked", skipping), [{"computed": share} for share in (2 / 3, 0.5, 0.4, 0.75, 0.45)]),
    Method(
        "lemica",
        "ours",
        our("lemica", skipping_steps),
        [{"computed": share} for share in (2 / 3, 0.5, 0.4, 0.75, 0.45)],
    ),
    Method("dicache", "ours", our("dicache"), thresholds("rel_l1_thresh", 0.14, 0.22, 0.3, 0.1, 0.4)),
    Method("fbcache", "ours", our("fbcache"), thresholds("rel_l1_thresh", *_FIRST_BLOCK[:5])),
    Method("teacache", "ours", our("teacache"), thresholds("rel_l1_thresh", *_TEA)),
    Method("seacache", "ours", our("seacache"), _SEA[:5]),
    Method("magcache", "ours", our("magcache"), _MAG[:5]),
    Method(
        "taylorseer",
        "ours",
        our("taylorseer"),
        [
            {"cache_interval": interval, "max_order": order, "disable_cache_before_step": first}
            for interval, order, first in ((2, 1, 10), (2, 1, 3), (3, 1, 6), (2, 2, 8), (3, 2, 3))
        ],
    ),
    Method("spectrum", "ours", our("spectrum"), _SPECTRUM),
    *(
        Method(
            name,
            "ours",
            our(name),
            [{"cache_interval": interval, "disable_cache_before_step": first} for interval, first in _INTERVALS],
        )
        for name in ("foca", "dmd")
    ),
    Method("easycache", "ours", our("easycache"), [{"thresh": thresh, "ret_steps": first} for thresh, first in _EASY]),
    Method(
        "ranked + cfg_gate",
        "ours",
        our("ranked", skipping),
        [{"computed": share, "cfg_gate": gate} for share, gate in ((0.8, 2 / 3), (0.7, 0.5), (0.6, 0.4), (0.75, 0.5))],
    ),
]
