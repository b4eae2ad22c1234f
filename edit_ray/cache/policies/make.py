"""From a policy's name and options to the policy, with every mistake found before the loop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from edit_ray.cache.policies.checks import OptionError
from edit_ray.cache.policies.policy import POLICIES, CachePolicy

_GRANULARITIES = {"stack": '"stack"', "per_block": '"per_block"', "groups": "an integer from {}, the size of a group"}


def make_policy(policy: str | CachePolicy, options: Mapping[str, Any]) -> CachePolicy:
    """The policy of a registered name, made with `options`; a policy that is made already comes back as it is.

    Raises:
        ValueError: no policy has this name, or an option's value is out of range.
        TypeError: the policy lacks a method, an option has no such name or no such type, or a required one is missing.
    """
    if isinstance(policy, CachePolicy):
        if options:
            raise TypeError(
                f"{type(policy).__name__} is a policy that is made already; it takes no {', '.join(options)}."
            )
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy is {policy!r}; valid are {', '.join(POLICIES.names())}, or a CachePolicy object.")
    cls = POLICIES.find(policy)
    _check_complete(policy, cls)
    _check_options(policy, cls, options)
    return cls(**options)


def check_granularity(policy: CachePolicy, granularity: str | int) -> None:
    """Whether the policy has a meaning for a granularity: "stack", "per_block", or the size of a group.

    Raises:
        OptionError: it has none; names those that it has.
        TypeError: the policy declares granularities that there are not.
    """
    valid, where = policy.granularities, f"{type(policy).__module__}.{type(policy).__qualname__}"
    if not valid or not set(valid) <= set(_GRANULARITIES):
        raise TypeError(
            f"The cache policy {where} declares the granularities {valid!r}; "
            f"valid are some of {', '.join(_GRANULARITIES)}."
        )
    # A group of one is a block: a policy that has no meaning for blocks has none for it.
    smallest = 1 if "per_block" in valid else 2
    if isinstance(granularity, int) and not isinstance(granularity, bool):
        fits = "groups" in valid and granularity >= smallest
    else:
        fits = granularity in ("stack", "per_block") and granularity in valid
    if not fits:
        raise OptionError(
            "granularity",
            f"granularity is {granularity!r}; {type(policy).__name__} works with "
            f"{' or '.join(_GRANULARITIES[kind].format(smallest) for kind in valid)}.",
        )


def _check_complete(name: str, cls: type[CachePolicy]) -> None:
    where = f"{cls.__module__}.{getattr(cls, '__qualname__', cls)}"
    if not isinstance(cls, type) or not issubclass(cls, CachePolicy):
        raise TypeError(f"The cache policy {name!r} is {where}, which is no subclass of CachePolicy.")
    missing = sorted(cls.__abstractmethods__)
    if missing:
        raise TypeError(f"The cache policy {name!r} ({where}) lacks the method {', '.join(missing)}.")


def _check_options(name: str, cls: type[CachePolicy], options: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(cls).parameters.values())
    valid = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes = f"it takes {', '.join(valid)}" if valid else "it takes none"
    unknown = [option for option in options if option not in valid]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise OptionError(unknown[0], f"The cache policy {name!r} has no option {', '.join(unknown)}; {takes}.")
    required = [p.name for p in parameters if p.name in valid and p.default is p.empty and p.name not in options]
    if required:
        raise OptionError(required[0], f"The cache policy {name!r} needs the option {', '.join(required)}; {takes}.")
