"""A wanted speedup, turned into a policy's threshold before the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edit_ray.cache.policies import CachePolicy, OptionError

THRESHOLD_OF = {"teacache": "rel_l1_thresh", "magcache": "threshold", "ranked": "skips"}
"""The option that decides how much a policy with a known mask skips."""
WHOLE = frozenset({"skips"})
"""Those of them that are whole numbers."""
_HIGHEST_WHOLE = 2.0**20  # more than any loop has forwards


def check_target(name: str, policy: CachePolicy, options: Mapping[str, Any]) -> None:
    """Raises OptionError where a target cannot choose the threshold."""
    if name not in THRESHOLD_OF or not policy.timestep_only:
        raise OptionError(
            "target_speedup",
            f"target_speedup needs a policy whose mask a threshold decides before the loop: {', '.join(THRESHOLD_OF)}; "
            f"the policy is {name!r}.",
        )
    if THRESHOLD_OF[name] in options:
        raise OptionError(
            "target_speedup", f"target_speedup and {THRESHOLD_OF[name]} were both given; each decides the other."
        )


def option_for(option: str, speedup: float, computed_share: Callable[[Any], float]) -> Any:
    """The value of an option of `THRESHOLD_OF` for a speedup; see `threshold_for`."""
    if option not in WHOLE:
        return threshold_for(speedup, computed_share)
    return int(threshold_for(speedup, lambda threshold: computed_share(int(threshold)), _HIGHEST_WHOLE))


def threshold_for(speedup: float, computed_share: Callable[[float], float], highest: float = 64.0) -> float:
    """A threshold at which 1 / `computed_share(threshold)` is as near to `speedup` as any makes it.

    `computed_share`, of all forwards, falls as the threshold rises, in steps; the one at `speedup` is found by halving.
    """
    low, high = 0.0, highest
    if 1 / computed_share(high) <= speedup:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        if 1 / computed_share(middle) < speedup:
            low = middle
        else:
            high = middle
    return min((high, low), key=lambda threshold: (abs(1 / computed_share(threshold) - speedup), threshold))
