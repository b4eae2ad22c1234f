"""What policies have to know of a model: measured once, kept in the model's folder, filled in where not given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.policies import CachePolicy, make_policy
from edit_ray.engine.model_files import locate_model
from edit_ray.errors import ModelError

FILE_NAME = "cache_calibration.json"
SCHEMA = 1
# The options that a calibration may give a policy, each only where the user has given none of them.
CALIBRATED = {
    "teacache": ("coefficients", "wan_variant", "use_ret_steps"),
    "magcache": ("mag_ratios",),
    "schedule": ("mask",),
    "ranked": ("skip_rank",),
}


def calibrated_options(folder: Path | None, policy: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, and where they lack what a calibration can give, that of the model in `folder`, if it has one.

    For `warmstart_reuse` the options of its inner policy are filled in.

    Raises:
        ValueError: the model's calibration cannot be read.
    """
    name = str(options.get("inner", "teacache")) if policy == "warmstart_reuse" else policy
    if folder is None or any(key in options for key in CALIBRATED.get(name, ())):
        return dict(options)
    return {**read_calibration(folder / FILE_NAME).get(name, {}), **options}


def policy_of(cache: CacheOptions, model_path: str) -> CachePolicy:
    """The policy of a configuration's cache section, with what the model's folder has calibrated.

    Raises:
        ValueError, TypeError: as `make_policy`, or the calibration cannot be read.
    """
    try:
        folder = Path(locate_model(model_path))
    except ModelError:
        folder = None
    return make_policy(cache.policy, calibrated_options(folder, cache.policy, cache.policy_options))


def read_calibration(path: Path) -> dict[str, dict[str, Any]]:
    """By policy, the options that were measured; empty without a file.

    Raises:
        ValueError: the file is no calibration.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no calibration: {error}.") from None
    policies: dict[str, dict[str, Any]] | None = content.get("policies") if isinstance(content, dict) else None
    if (
        not isinstance(policies, dict)
        or content.get("schema") != SCHEMA
        or not all(isinstance(options, dict) for options in policies.values())
    ):
        raise ValueError(f"{path} is no calibration of schema {SCHEMA}.")
    return policies


def write_calibration(path: Path, policy: str, options: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Put a policy's measured options into the file, beside those of others; `measured` says how they were got.

    Raises:
        ValueError: the file is there and is no calibration.
    """
    content: dict[str, Any] = {"schema": SCHEMA, "policies": {}}
    if path.exists():
        read_calibration(path)
        content = json.loads(path.read_text())
    content["policies"][policy] = dict(options)
    content.setdefault("measured", {})[policy] = dict(measured)
    path.write_text(json.dumps(content, indent=1) + "\n")
