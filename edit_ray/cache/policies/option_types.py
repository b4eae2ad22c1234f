"""The options of policies: their types, and one sentence for a wrong one.

`with_options` turns the annotated fields of a policy into keyword arguments. A field declares the option's type,
bounds, default and description; error messages and documents are made from that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from edit_ray.options import Schema, describe, node_at

T = TypeVar("T")


class OptionError(ValueError, TypeError):
    """A wrong option of a policy, as a complete sentence. It is both a ValueError and a TypeError.

    Args:
        option: The option's name, without an index such as in "mask[3]".
        text: The sentence, with the given and the valid values.
    """

    def __init__(self, option: str, text: str) -> None:
        super().__init__(option, text)  # both, so that the error can be pickled
        self.option, self.text = option.partition("[")[0], text

    def __str__(self) -> str:
        return self.text


def _real(value: Any) -> Any:
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _bit(value: Any) -> Any:
    return bool(value) if value in (0, 1) else value


def _items(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's and torch's own; a scalar among them gives no list
        value = value.tolist()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


_BRANCHES = (
    '"cond", "uncond", or with the expert such as "transformer_2/cond", or of one unit such as "transformer/cond/0"'
)


def _by_branch(value: Any) -> dict[Any, Any]:
    """A mapping unchanged; anything else under "", for all branches of all experts."""
    if not isinstance(value, Mapping):
        return {"": value}
    if not value:
        raise ValueError(f"is an empty mapping; valid keys are {_BRANCHES}.")
    for key in value:
        *expert, branch = _without_unit(key).split("/") if isinstance(key, str) else [""]
        if branch not in ("cond", "uncond") or len(expert) > 1 or "" in expert:
            raise ValueError(f"has the key {key!r}; a key must be one of {_BRANCHES}.")
    return dict(value)


def _without_unit(key: str) -> str:
    branch, _, unit = key.rpartition("/")
    return branch if "/" in branch and unit.isdecimal() and unit.isascii() else key


def _sequence_of(things: str) -> Any:
    return Field(min_length=1, json_schema_extra={"valid": f"a sequence of {things}"})


Number = Annotated[float, BeforeValidator(_real)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_real)]
NotNegative = Annotated[float, Field(ge=0), BeforeValidator(_real)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_real)]
Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Natural = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Order = Annotated[int, Field(ge=0, le=1, json_schema_extra={"choices": "0 and 1"}), BeforeValidator(_whole)]
Flag = Annotated[bool, Field(json_schema_extra={"choices": "True and False"})]
Numbers = Annotated[tuple[Number, ...], _sequence_of("finite numbers"), BeforeValidator(_items)]
Positives = Annotated[tuple[Positive, ...], _sequence_of("finite numbers"), BeforeValidator(_items)]
Mask = Annotated[
    tuple[Annotated[Flag, BeforeValidator(_bit)], ...], _sequence_of("True and False"), BeforeValidator(_items)
]
Forecasts = Annotated[
    tuple[
        Annotated[
            Literal["reuse", "linear", "spectrum", "dmd"],
            Field(json_schema_extra={"choices": "reuse, linear, spectrum and dmd"}),
        ],
        ...,
    ],
    _sequence_of("reuse, linear, spectrum and dmd"),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else _items(value)),
]
Ranks = Annotated[tuple[Count | None, ...], _sequence_of("whole numbers from 0 and None"), BeforeValidator(_items)]
Errors = Annotated[
    tuple[
        Annotated[
            tuple[NotNegative, ...],
            Field(json_schema_extra={"valid": "a sequence of finite numbers from 0"}),
            BeforeValidator(_items),
        ],
        ...,
    ],
    _sequence_of("sequences of finite numbers from 0"),
    BeforeValidator(_items),
]
PerBranch = Annotated[dict[str, T], BeforeValidator(_by_branch)]
"""An option for all branches, per branch, per expert and branch, or per unit of these."""


def pick_per_branch(name: str, entries: Mapping[str, T], expert: str, branch: str, unit: int = 0) -> T:
    """The entry of a unit: its own, else that of its branch of its expert, of its branch, of all. Raises ValueError."""
    for key in (f"{expert}/{branch}/{unit}", f"{expert}/{branch}", branch, ""):
        if key in entries:
            return entries[key]
    raise ValueError(
        f'{name} has entries for {", ".join(entries)}, none of which is for the branch "{branch}" of "{expert}"; '
        f"valid keys are {_BRANCHES}."
    )


def check_lengths(name: str, entries: Mapping[str, Sequence[Any]], num_steps: int, why: str = "") -> None:
    """Raise OptionError unless every entry has `num_steps` items. `name` is the option; `why` ends the message."""
    for branch, entry in entries.items():
        if len(entry) != num_steps:
            which = f"{name}[{branch!r}]" if branch else name
            raise OptionError(
                which, f"{which} has {len(entry)} entries, and the loop has {num_steps} steps; it takes one each{why}."
            )


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(Field,))
def with_options(cls: type[T] | None = None, *, extra: Literal["allow", "forbid"] = "forbid") -> Any:
    """A class decorator: the annotated fields become checked keyword arguments and attributes.

    A wrong value raises OptionError. With `extra="allow"` unknown arguments become attributes, unchecked.
    """
    if cls is None:
        return lambda cls: with_options(cls, extra=extra)
    config = ConfigDict(strict=True, allow_inf_nan=False, extra=extra)
    made: Any = dataclass(kw_only=True, eq=False, config=config)(cls)
    check, parameters = made.__init__, list(signature(made).parameters.values())

    @wraps(check)
    def __init__(self: Any, **options: Any) -> None:  # noqa: N807
        before, self.__dict__ = self.__dict__, {}  # attributes that a subclass has set are not options
        try:
            check(self, **options)
        except ValidationError as error:
            raise _first_mistake(error, made) from None
        self.__dict__ = before | self.__dict__

    if extra == "allow":
        others = Parameter("others", Parameter.VAR_KEYWORD)
        made.__signature__ = signature(made).replace(parameters=[*parameters, others])
    made.__init__ = __init__
    return made


def _first_mistake(error: ValidationError, cls: type) -> ValueError:
    first = error.errors(include_url=False)[0]
    path, kind, cause = first["loc"], first["type"], first.get("ctx", {}).get("error")
    if not path and isinstance(cause, ValueError):  # of `__post_init__`
        return cause
    name = str(path[0]) + "".join(f"[{part!r}]" for part in path[1:] if part != "")
    if kind == "unexpected_keyword_argument":
        return OptionError(
            name, f"{cls.__name__} has no option {name}; it takes {', '.join(signature(cls).parameters)}."
        )
    if kind == "value_error":
        return OptionError(name, f"{name} {cause}")
    given = {"missing": "missing", "too_short": "empty"}.get(kind, repr(first["input"]))
    return OptionError(name, f"{name} is {given}; {_valid(path, option_schema(cls))}.")


def _valid(path: Sequence[str | int], schema: Schema) -> str:
    node = node_at(path, schema)
    choices = node.get("choices") or " and ".join(map(repr, node.get("enum", ())))
    if choices:
        return f"it must be {'one of ' if ', ' in choices else ''}{choices.replace(' and ', ' or ')}"
    return f"it must be {describe(node, schema)}"


def option_schema(cls: type) -> Schema:
    """The JSON schema of the options of a `with_options` class."""
    return TypeAdapter(cls).json_schema()
