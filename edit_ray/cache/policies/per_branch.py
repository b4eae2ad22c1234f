"""Options that may be given once, or per branch, or per expert and branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from edit_ray.cache.policies.checks import OptionError

T = TypeVar("T")

_ALL = ""
_VALID = '"cond", "uncond", or with the expert such as "transformer_2/cond"'


def parse_per_branch(name: str, value: Any, parse: Callable[[str, Any], T]) -> dict[str, T]:
    """An option's entries: those of a mapping, or one for all branches of all experts. `parse` reads each.

    Raises:
        OptionError: a key that names no branch.
    """
    if not isinstance(value, Mapping):
        return {_ALL: parse(name, value)}
    if not value:
        raise OptionError(name, f"{name} is an empty mapping; valid keys are {_VALID}.")
    for key in value:
        expert, slash, branch = key.rpartition("/") if isinstance(key, str) else ("", "", "")
        if branch not in ("cond", "uncond") or bool(expert) != bool(slash):
            raise OptionError(name, f"{name} has the key {key!r}; valid are {_VALID}.")
    return {key: parse(f"{name}[{key!r}]", entry) for key, entry in value.items()}


def pick_per_branch(name: str, entries: Mapping[str, T], expert: str, branch: str) -> T:
    """The entry of a branch of an expert: its own, else its branch's, else the one for all.

    Raises:
        ValueError: none fits.
    """
    for key in (f"{expert}/{branch}", branch, _ALL):
        if key in entries:
            return entries[key]
    raise ValueError(
        f'{name} has entries for {", ".join(entries)}, none of which is for the branch "{branch}" of "{expert}"; '
        f"valid keys are {_VALID}."
    )
