"""What the policies' options may be: each function returns the value, or says in one sentence what was given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


class OptionError(ValueError, TypeError):
    """A wrong option of a policy, as a whole sentence. It is both a ValueError and a TypeError.

    Args:
        option: The option's name; what follows a "[", such as in "mask[3]", is left out.
        text: The sentence: what was given and what is valid.
    """

    def __init__(self, option: str, text: str) -> None:
        super().__init__(option, text)  # both, so that the error can be pickled
        self.option, self.text = option.partition("[")[0], text

    def __str__(self) -> str:
        return self.text


def finite(name: str, value: Any) -> float:
    """A finite number.

    Raises:
        OptionError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(name, f"{name} is {value!r}; valid is a finite number.")
    number = float(value)
    if not math.isfinite(number):
        raise OptionError(name, f"{name} is {number}; valid is a finite number.")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0; raises as `finite` does."""
    number = finite(name, value)
    if number <= 0:
        raise OptionError(name, f"{name} is {number}; valid is a finite number above 0.")
    return number


def fraction(name: str, value: Any) -> float:
    """A number from 0 to 1; raises as `finite` does."""
    number = finite(name, value)
    if not 0 <= number <= 1:
        raise OptionError(name, f"{name} is {number}; valid is a number from 0 to 1.")
    return number


def whole(name: str, value: Any, least: int | None = 0) -> int:
    """A whole number, from `least` upwards unless that is None.

    Raises:
        OptionError: no whole number, or one below `least`.
    """
    valid = "a whole number" if least is None else f"a whole number from {least}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(name, f"{name} is {value!r}; valid is {valid}.")
    number = int(value)
    if least is not None and number < least:
        raise OptionError(name, f"{name} is {number}; valid is {valid}.")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False; anything else is an OptionError."""
    if not isinstance(value, bool):
        raise OptionError(name, f"{name} is {value!r}; valid are True and False.")
    return value


def numbers(name: str, value: Any) -> tuple[float, ...]:
    """At least one finite number, from any sequence, array or tensor of one dimension.

    Raises:
        OptionError: no such sequence, an empty one, or a number that is not finite.
    """
    return tuple(finite(f"{name}[{i}]", item) for i, item in enumerate(_items(name, value, "finite numbers")))


def mask(name: str, value: Any) -> tuple[bool, ...]:
    """At least one of True and False (or 1 and 0); raises as `numbers` does."""
    items = _items(name, value, "True and False")
    for i, item in enumerate(items):
        if not isinstance(item, bool) and item not in (0, 1):
            raise OptionError(name, f"{name}[{i}] is {item!r}; valid are True and False.")
    return tuple(bool(item) for item in items)


def ranks(name: str, value: Any) -> tuple[int | None, ...]:
    """At least one of whole numbers from 0 and None; raises as `whole` does."""
    items = _items(name, value, "whole numbers from 0 and None")
    return tuple(None if item is None else whole(f"{name}[{i}]", item) for i, item in enumerate(items))


def _items(name: str, value: Any, valid: str) -> list[Any]:
    if hasattr(value, "tolist"):  # numpy's and torch's own; a scalar among them gives no list
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise OptionError(name, f"{name} is {value!r}; valid is a sequence of {valid}.")
    if not value:
        raise OptionError(name, f"{name} is empty; valid is a sequence of {valid}.")
    return list(value)
