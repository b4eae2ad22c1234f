"""Searches for the setting that computes least on the user's prompts and keeps the mean PSNR high enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edit_ray.engine.calibration import WHOLE
from edit_ray.tuning.confidence import least_of_others
from edit_ray.tuning.likeness import Likeness, overall
from edit_ray.tuning.search import Loop, Setting, lemica_setting, search
from edit_ray.tuning.videos import Measure, PolicyUnfit, Videos

# The option of each policy that makes it skip more as it rises, and the range in which it is searched. Policies with a
# calibration come first: the better the first find, the sooner the others are known to be slower.
TUNABLE: dict[str, tuple[str, float, float]] = {
    "ranked": ("skips", 1, 1000),
    "lemica": ("skips", 1, 1000),
    "dicache": ("rel_l1_thresh", 0.003, 3.0),
    "fbcache": ("rel_l1_thresh", 0.003, 3.0),
    "seacache": ("threshold", 0.003, 3.0),
    "teacache": ("rel_l1_thresh", 0.003, 3.0),
}
SEARCH = "search"  # beside the policies: a mask of one's own, for the policy `schedule`
TRIALS = 7  # halvings of the range of log(threshold) for each policy
CONFIDENCE = 1.64  # standard errors between a mean and what it may be on other videos, where it is given up: 95 %
FEWEST_PROMPTS = 4  # for the search: half of them are searched on
STARTS = ("reuse", "linear")  # what stands in for the skips on LeMiCa's path
START_REUSE = 2  # steps in a row that are measured alone, for the start of the search
_SOONEST = 4  # videos before a setting is given up

Verdict = Literal["holds", "too far", "slower"]


@dataclass(frozen=True)
class Trial:
    """One setting, measured on some videos against the uncached ones.

    `psnr` is the mean in dB; the mean over as many other prompts is at least `low`, with 95 % confidence by resampling
    the prompts. `blocks` is the share of the blocks that ran. "slower" computed more than a setting that holds already.
    """

    policy: str
    options: dict[str, Any]
    psnr: float
    low: float
    blocks: float
    verdict: Verdict
    likeness: Likeness


def tune(
    measure: Measure,
    psnr: float,
    policies: Sequence[str] = tuple(TUNABLE),
    *,
    seeds: int = 1,
    least: float = math.inf,
) -> Iterator[Trial]:
    """Every tried setting, in search of the one that computes least while its mean PSNR is at least `psnr`.

    Per policy the threshold is found by halving. PSNR does not fall evenly with it, so a setting counts by its own
    measurements: with 95 % confidence its mean holds on as many other prompts of the same kind. A setting that cannot
    hold any more, or is slower than one that holds, or than `least`, is given up before all videos are made. Of each
    prompt there are `seeds` videos, side by side.
    """
    for policy in policies:
        option, lowest, highest = TUNABLE[policy]
        low, high = math.log(lowest), math.log(highest)
        tried = set()
        for _ in range(TRIALS):
            middle = math.exp((low + high) / 2)
            value = round(middle) if option in WHOLE else float(f"{middle:.3g}")
            if value in tried:
                break
            tried.add(value)
            try:
                trial = _try(measure, policy, {option: value}, psnr, seeds, least)
            except PolicyUnfit:
                break
            yield trial
            if trial.verdict == "holds":
                least = trial.blocks
            low, high = (low, math.log(value)) if trial.verdict == "too far" else (math.log(value), high)


def _try(
    measure: Measure, policy: str, options: dict[str, Any], psnr: float, seeds: int, least: float = math.inf
) -> Trial:
    alike: list[Likeness] = []
    shares: list[float] = []
    given_up: Verdict | None = None
    for found, share in measure(policy, options):
        alike.append(found)
        shares.append(share)
        psnrs = [each.psnr for each in alike]
        mean, blocks = statistics.fmean(psnrs), statistics.fmean(shares)
        if len(psnrs) >= _SOONEST:
            error = statistics.stdev(psnrs) / math.sqrt(len(psnrs))  # the standard error of the mean
            given_up = "too far" if mean + CONFIDENCE * error < psnr else "slower" if blocks >= least else None
        if given_up:
            break
    low = -math.inf if given_up else least_of_others(psnrs, seeds)
    verdict = given_up or ("holds" if low >= psnr else "too far")
    return Trial(policy, options, mean, low, blocks, verdict, overall(alike))


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial that computed least of those that hold; None if none does."""
    good = [trial for trial in trials if trial.verdict == "holds"]
    return min(good, key=lambda trial: (trial.blocks, -trial.psnr), default=None)


def tune_by_search(
    videos: Videos, loop: Loop, psnr: float, budget: int, said: Callable[[str], None] = lambda line: None
) -> Iterator[Trial]:
    """Every setting that was checked, of those that a search of masks, forecasts, units and the CFG gate has found.

    The search has every other prompt, and at most `budget` videos of them, those for its start included. It compares
    final latents, and takes the difference between their likeness and that of the frames to be that of its start, video
    by video. What it finds is checked by the frames of the other prompts, on which nothing was chosen: from the fewest
    blocks upwards, until one holds.

    Raises:
        ValueError: there are fewer than `FEWEST_PROMPTS` prompts.
    """
    seeds = videos.seeds
    prompts = range(len(videos) // seeds)
    if len(prompts) < FEWEST_PROMPTS:
        raise ValueError(f"the search takes at least {FEWEST_PROMPTS} prompts, and has {len(prompts)}.")
    searched, checked = ([p * seeds + n for p in prompts[half::2] for n in range(seeds)] for half in (0, 1))
    near = _Near(videos, searched)

    def tried(setting: Setting, only: Sequence[int]) -> Trial:
        return _try(lambda policy, given: videos(policy, given, only), "schedule", setting.options(), psnr, seeds)

    errors = _reuse_errors(loop, near, budget)
    said(f"{near.spent} videos for the errors of single reuses")
    start = Setting(loop)
    for forecast in STARTS:
        holds, fails = 0, len(loop.later_steps()) + 1
        while fails - holds > 1:
            middle = (holds + fails) // 2
            path = lemica_setting(loop, errors, middle, forecast)
            near.spent += len(searched)
            found = tried(path, searched).verdict == "holds"
            holds, fails = (middle, fails) if found else (holds, middle)
            start = path if found and path.blocks < start.blocks else start
    if start.skips:
        near.shift_to(start)

    def least(psnrs: Sequence[float]) -> float:
        return least_of_others(psnrs, seeds)

    by_blocks: dict[float, Setting] = {}
    for made in search(start, near, least, psnr, len(searched), budget - near.spent):
        by_blocks[round(made.setting.blocks, 9)] = made.setting  # the most alike of as many blocks comes last
        mean = statistics.fmean(made.psnr)
        said(f"{near.spent} videos: {made.setting.blocks:.3f} of the blocks, {mean:.2f} dB (at least {made.low:.2f})")
    for blocks in sorted(by_blocks):
        trial = tried(by_blocks[blocks], checked)
        yield trial
        if trial.verdict == "holds":
            return


class _Near:
    """The PSNR of some videos' frames with a setting, from their final latents alone; `spent` counts the videos."""

    def __init__(self, videos: Videos, only: Sequence[int]) -> None:
        self._videos, self._only, self._shift, self.spent = videos, only, [0.0] * len(only), 0

    def shift_to(self, setting: Setting) -> None:
        """Take the difference between frames and latents to be that of this setting, video by video."""
        frames = self._videos("schedule", setting.options(), self._only)
        latents = self(setting, [-math.inf] * len(self._only))
        self._shift = [alike.psnr - near for (alike, _), near in zip(frames, latents, strict=True)]

    def __call__(self, setting: Setting, needed: Sequence[float]) -> list[float]:
        """Of the first videos, one for each of `needed`; fewer if their mean is below that of `needed` so far."""
        found: list[float] = []
        for near in self._videos.latents("schedule", setting.options(), self._only[: len(needed)]):
            found.append(near + self._shift[len(found)])
            self.spent += 1
            if len(found) >= _SOONEST and statistics.fmean(found) < statistics.fmean(needed[: len(found)]):
                break
        return found


def _reuse_errors(loop: Loop, near: _Near, budget: int) -> list[list[float]]:
    """For LeMiCa's path: by step the errors when its residual alone is reused in the next one, two, … steps.

    Of as many videos as a third of the budget has for each, from one to four.
    """
    errors: list[list[float]] = [[] for _ in loop.experts]
    reuses = loop.reuses(START_REUSE)
    each = min(max(1, budget // (3 * len(reuses) or 1)), _SOONEST)
    for step, count in reuses:
        likeness_of = near(loop.reusing(step, count), [-math.inf] * each)
        errors[step].append(statistics.fmean(10 ** (-found / 20) for found in likeness_of))
    return errors
