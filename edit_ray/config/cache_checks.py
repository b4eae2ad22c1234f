"""Whether a run's cache can be made: its policy, its options, its granularity. Loads neither torch nor weights."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.policies import POLICIES, check_granularity, make_policy
from edit_ray.config.mistakes import Mistake
from edit_ray.engine.calibration import calibrated_options
from edit_ray.engine.targets import check_target

REUSING = "warmstart_reuse"  # the policy that reads other segments' residuals


def cache_mistakes(cache: CacheOptions, num_inference_steps: int, model_folder: Path | None) -> Iterator[Mistake]:
    """Everything that is wrong with the section; `model_folder` is where the model's own calibration may lie."""
    options = cache.policy_options
    if cache.policy == "none":
        of_policy = {"target_speedup": cache.target_speedup is not None, "reuse_window": cache.reuse_window > 0}
        for name in [*options, *(name for name, given in of_policy.items() if given)]:
            said = f"cache.{name} is an option of no policy: cache.policy is none."
            yield Mistake(("cache", name), said, needs=(("cache", "policy"),))
        return
    valid = ["none", *POLICIES.names()]
    if cache.policy not in valid:
        yield Mistake(("cache", "policy"), f"cache.policy is {cache.policy!r}; it must be one of {', '.join(valid)}.")
        return
    if (cache.policy == REUSING) != (cache.reuse_window > 0):
        said = (
            f"cache.reuse_window is {cache.reuse_window} and cache.policy {cache.policy!r}; for segments that reuse "
            f"each other's residuals the policy is {REUSING!r} and the window 1 or more, for others neither."
        )
        yield Mistake(("cache", "reuse_window" if cache.reuse_window else "policy"), said)
    elif options.get("align", "step") == "last":
        said = "cache.align is 'last', which works in the library; in a run it must be 'step'."
        yield Mistake(("cache", "align"), said)
    try:
        policy = make_policy(cache.policy, calibrated_options(model_folder, cache.policy, options))
        check_granularity(policy, cache.granularity)
        policy.check(num_inference_steps)
        if cache.target_speedup is not None:
            check_target(cache.policy, policy, options)
    except (ValueError, TypeError) as error:
        text, key = str(error), _key_named_first(str(error), (*options, "granularity", "target_speedup"))
        said = f"cache.{text}" if key and text.startswith(key) else f"cache: {text}"
        needs = (("sampling", "num_inference_steps"), ("model", "path"))
        yield Mistake(("cache", key or "policy"), said, needs)


def _key_named_first(text: str, keys: Iterable[str]) -> str | None:
    """Of the keys that a sentence names, the one that it names first."""
    found = {match.start(): key for key in keys if (match := re.search(rf"\b{re.escape(key)}\b", text))}
    return found[min(found)] if found else None
