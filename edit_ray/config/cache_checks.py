"""Whether a run's cache can be made: its policy, its options, its granularity. Loads neither torch nor weights."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.policies import POLICIES, check_granularity, make_policy
from edit_ray.config.mistakes import Mistake
from edit_ray.engine.calibration import calibrated_options
from edit_ray.engine.targets import check_target

LIBRARY_ONLY = "warmstart_reuse"


def cache_mistakes(cache: CacheOptions, num_inference_steps: int, model_folder: Path | None) -> Iterator[Mistake]:
    """Everything that is wrong with the section; `model_folder` is where the model's own calibration may lie."""
    options = cache.policy_options
    if cache.policy == "none":
        for name in [*options, *(["target_speedup"] if cache.target_speedup is not None else [])]:
            said = f"cache.{name} is an option of no policy: cache.policy is none."
            yield Mistake(("cache", name), said, needs=(("cache", "policy"),))
        return
    valid = ["none", *(name for name in POLICIES.names() if name != LIBRARY_ONLY)]
    if cache.policy not in valid:
        why = ", which works in the library and not yet in a run" if cache.policy == LIBRARY_ONLY else ""
        yield Mistake(
            ("cache", "policy"), f"cache.policy is {cache.policy!r}{why}; it must be one of {', '.join(valid)}."
        )
        return
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
