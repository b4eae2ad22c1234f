"""What policies need to know of a model: measured once, stored in the model's folder, used where no option is given.

And the threshold of a policy for a wanted speedup, chosen before the loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.policies import CachePolicy, OptionError, make_policy
from edit_ray.engine.lora_files import loras_digest
from edit_ray.engine.model_files import locate_model
from edit_ray.engine.options import ModelOptions
from edit_ray.errors import ModelError

FILE_NAME = "cache_calibration.json"
SCHEMA = 1
# The options that a calibration may give a policy, unless the user has given one of them.
CALIBRATED = {
    "teacache": ("coefficients", "wan_variant", "use_ret_steps"),
    "magcache": ("mag_ratios",),
    "schedule": ("mask",),
    "ranked": ("skip_rank",),
    "lemica": ("reuse_error",),
}
THRESHOLD_OF = {"teacache": "rel_l1_thresh", "magcache": "threshold", "ranked": "skips", "lemica": "skips"}
"""The option that decides how much a policy with a known mask skips."""
WHOLE = frozenset({"skips"})
"""The options of `THRESHOLD_OF` that are whole numbers."""
_HIGHEST, _HIGHEST_WHOLE = 64.0, 2.0**20  # more forwards than any loop has


def calibrated_options(
    folder: Path | None, policy: str, options: Mapping[str, Any], lora_digest: str | None = ""
) -> dict[str, Any]:
    """`options`, completed by the calibration of the model in `folder`, if it has one with the same LoRAs.

    For `warmstart_reuse` the options of its inner policy are completed.

    Raises:
        ValueError: the model's calibration cannot be read.
    """
    name = str(options.get("inner", "teacache")) if policy == "warmstart_reuse" else policy
    if folder is None or any(key in options for key in CALIBRATED.get(name, ())):
        return dict(options)
    content = _read(folder / FILE_NAME)
    if content.get("measured", {}).get(name, {}).get("loras", "") != lora_digest:
        return dict(options)
    return {**content.get("policies", {}).get(name, {}), **options}


def policy_of(cache: CacheOptions, model: ModelOptions) -> CachePolicy:
    """The policy of a configuration's cache section, completed by the calibration in the model's folder.

    Raises:
        ValueError, TypeError: as `make_policy`, or the calibration cannot be read.
    """
    try:
        folder, digest = Path(locate_model(model.path)), loras_digest(model.loras)
    except ModelError:
        folder, digest = None, ""
    return make_policy(cache.policy, calibrated_options(folder, cache.policy, cache.policy_options, digest))


def read_calibration(path: Path) -> dict[str, dict[str, Any]]:
    """By policy, the measured options; empty without a file.

    Raises:
        ValueError: the file is not a calibration.
    """
    policies: dict[str, dict[str, Any]] = _read(path).get("policies", {})
    return policies


def write_calibration(path: Path, policy: str, options: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Put a policy's measured options into the file, beside those of others; `measured` says how they were measured.

    Raises:
        ValueError: the file exists and is not a calibration.
    """
    content = _read(path) or {"schema": SCHEMA, "policies": {}}
    content["policies"][policy] = dict(options)
    content.setdefault("measured", {})[policy] = dict(measured)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a calibration: {error}.") from None
    policies = content.get("policies") if isinstance(content, dict) and content.get("schema") == SCHEMA else None
    if not isinstance(policies, dict) or not all(isinstance(options, dict) for options in policies.values()):
        raise ValueError(f"{path} is not a calibration of schema {SCHEMA}.")
    return dict(content)


def check_target(name: str, policy: CachePolicy, options: Mapping[str, Any]) -> None:
    """Raise OptionError if a target speedup cannot choose the policy's threshold."""
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


def threshold_for(option: str, speedup: float, computed_share: Callable[[Any], float]) -> Any:
    """The value of an option of `THRESHOLD_OF` whose 1 / `computed_share(value)` is nearest to `speedup`.

    `computed_share`, of all forwards, falls in steps as the value rises. The step at `speedup` is found by halving.
    """
    number, high = (int, _HIGHEST_WHOLE) if option in WHOLE else (float, _HIGHEST)

    def reached(value: float) -> float:
        return 1 / computed_share(number(value))

    low = 0.0
    if reached(high) <= speedup:
        return number(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < speedup else (low, middle)
    return number(min((high, low), key=lambda value: (abs(reached(value) - speedup), value)))
