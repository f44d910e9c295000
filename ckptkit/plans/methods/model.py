"""What a method of merging is: its parameters with their ranges, its inputs, and the arithmetic that it chooses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, Self, TypeAlias

from ckptkit.core.text import did_you_mean, plural, printable, quoted, short_number
from ckptkit.errors import ArgumentError

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging

__all__ = [
    "MergedTensor", "Method", "Paper", "Parameter", "Share", "UsesBase", "Value", "choice", "count", "flag", "number",
    "planned",
]  # fmt: skip

UsesBase: TypeAlias = Literal["never", "optional", "always"]
Value: TypeAlias = float | int | bool | str
_LARGE: Final = 1e300  # the largest size of a number; larger integers are not shown with all their digits


class Paper(NamedTuple):
    """Where a method was published; ``arxiv`` is its number there, or empty."""

    title: str
    arxiv: str = ""

    def __str__(self) -> str:
        """Return the title, and the number if there is one."""
        return f"{self.title}, arXiv {self.arxiv}" if self.arxiv else self.title


class MergedTensor(NamedTuple):
    """The tensor that a method is resolved for.

    Attributes:
        key: Its key in the output, which random masks depend on.
        shape: Its shape, which is that of every input.
        inputs: How many inputs it has, besides the base if the method has one.
        has_base: Whether the first source is the base of the method.
        numbers: The number of each input in its recipe, from 1, which random masks depend on.
        limits: The smallest magnitude that is kept of each input, where all its tensors have one; else not used.
    """

    key: str
    shape: tuple[int, ...]
    inputs: int
    has_base: bool
    numbers: tuple[int, ...]
    limits: tuple[float, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """The last size of the shape; 1 for a tensor without dims."""
        return self.shape[-1] if self.shape else 1

    @property
    def positions(self) -> range:
        """The positions of the inputs among the sources: the base, if there is one, is the source 0."""
        return range(self.has_base, self.has_base + self.inputs)


class Share(NamedTuple):
    """The elements of the largest magnitudes that are kept of all merged tensors of one input together.

    Attributes:
        density: The share of these elements.
        elements: How many elements all these tensors have, which a plan finds; 0 before that.
    """

    density: float
    elements: int

    @property
    def kept(self) -> int:
        """How many elements are kept, and at least one."""
        return max(1, math.floor(self.density * self.elements))


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: Its name in recipes and options.
        meaning: What it is, in a few words.
        kind: What a value is.
        default: The value where none is given; None if one must be given.
        low: The least value, or None.
        high: The largest value, or None.
        is_open: Whether ``low`` and ``high`` themselves are not allowed: neither, the low, the high or both.
        choices: The values of a choice.
        is_per_input: Whether each input has a value of its own.
        is_planned: Whether only a plan sets it, from all of its tensors; then no recipe has it.
    """

    name: str
    meaning: str
    kind: Literal["number", "count", "flag", "choice"]
    default: Value | None = None
    low: float | None = None
    high: float | None = None
    is_open: tuple[bool, bool] = (False, False)
    choices: tuple[str, ...] = ()
    is_per_input: bool = False
    is_planned: bool = False

    @property
    def range_text(self) -> str:
        """The values that are allowed, as messages and help say it: ``from 0 to 1``."""
        if self.kind == "flag":
            return "true or false"
        if self.kind == "choice":
            return " or ".join(map(quoted, self.choices))
        what = "a number" if self.kind == "number" else "a whole number"
        if None not in (self.low, self.high) and not any(self.is_open):
            return f"{what} from {short_number(self.low)} to {short_number(self.high)}"
        words = (("at least", "above"), ("at most", "below"))
        limits = zip((self.low, self.high), words, self.is_open, strict=True)
        named = [f"{word[is_open]} {short_number(limit)}" for limit, word, is_open in limits if limit is not None]
        joined = " and ".join(named)
        return f"{what}{' of ' if joined.startswith('at') else ' ' if joined else ''}{joined}"

    def check(self, value: object) -> Value:
        """Return the value; raise ``ArgumentError`` with the name of the parameter where it is not allowed."""
        if self.kind == "flag" and isinstance(value, bool):
            return value
        if self.kind == "choice" and isinstance(value, str) and value in self.choices:
            return value
        if self.kind in ("number", "count") and self._is_in_range(value):
            return value  # type: ignore[return-value]
        is_large = isinstance(value, int) and abs(value) >= _LARGE
        shown = quoted(value) if isinstance(value, str) else "too large" if is_large else printable(repr(value))
        raise ArgumentError(f"{self.name} is {shown}, and must be {self.range_text}")

    def _is_in_range(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "count" else int | float):
            return False
        if abs(value) > _LARGE or not math.isfinite(value):
            return False
        low, high = self.low, self.high
        if low is not None and (value < low or (self.is_open[0] and value == low)):
            return False
        return high is None or not (value > high or (self.is_open[1] and value == high))


def number(
    meaning: str,
    *,
    default: float | None = None,
    low: float | None = None,
    high: float | None = None,
    is_open: tuple[bool, bool] = (False, False),
    per_input: bool = False,
) -> Any:
    """Return the field of a method for a number, or for a tuple of one number an input."""
    return _field(Parameter("", meaning, "number", default, low, high, is_open, is_per_input=per_input))


def count(meaning: str, *, default: int | None = None, low: int | None = None, high: int | None = None) -> Any:
    """Return the field of a method for a whole number."""
    return _field(Parameter("", meaning, "count", default, low, high))


def planned(meaning: str, *, per_input: bool = False) -> Any:
    """Return the field for a whole number, or one for each input, that only a plan sets: 0, or none, before that."""
    parameter = Parameter("", meaning, "count", 0, 0, is_per_input=per_input, is_planned=True)
    return field(default=() if per_input else 0, metadata={"parameter": parameter})


def flag(meaning: str, *, default: bool) -> Any:
    """Return the field of a method for true or false."""
    return _field(Parameter("", meaning, "flag", default))


def choice(meaning: str, *choices: str) -> Any:
    """Return the field of a method for one of several words, of which the first is the default."""
    return _field(Parameter("", meaning, "choice", choices[0], choices=choices))


def _field(parameter: Parameter) -> Any:
    metadata = {"parameter": parameter}
    if parameter.default is None or parameter.is_per_input:
        return field(metadata=metadata)
    return field(default=parameter.default, metadata=metadata)


class Method(ABC):
    """A method of merging, with its numbers for one tensor.

    A subclass is a frozen dataclass with ``kw_only``. Its fields are made by ``number``, ``count``, ``flag`` and
    ``choice``; a name that Python reserves gets an underscore at its end (``lambda_``). A parameter of each input is a
    tuple in the order of the inputs. A base with a role of its own (``uses_base``) has no value in it.

    Attributes:
        name: Its name in recipes and options.
        paper: Where it was published, or None.
        uses_base: Whether the base has a role of its own: else a base is an input like the others.
        fewest: The least number of inputs, besides the base.
        most: The largest number of inputs, besides the base; None if there is no limit.
        for_more: The methods to choose for more inputs than ``most``, as a sentence for a hint.
        takes_complex: Whether the method multiplies and adds only, with factors for whole tensors.
    """

    __slots__ = ()
    name: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    uses_base: ClassVar[UsesBase] = "never"
    fewest: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    for_more: ClassVar[str | None] = None
    takes_complex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse values out of range, and values that do not go together."""
        for name, parameter in _parameters(type(self)).items():
            value = getattr(self, _attribute(name))
            for one in value if parameter.is_per_input else (value,):
                parameter.check(one)
        self.check()

    @classmethod
    def parameters(cls) -> Mapping[str, Parameter]:
        """Return the parameters by name that users give: without those that only a plan sets."""
        return {name: parameter for name, parameter in _parameters(cls).items() if not parameter.is_planned}

    @classmethod
    def of(cls, inputs: int, given: Mapping[str, object], *, has_base: bool) -> Self:
        """Return the method for a tensor with so many inputs besides the base, with defaults for what is not given.

        The value of a parameter for each input is a list, with None for the default, or one value for all of them.
        Raises ``ArgumentError`` with the name of the parameter: one that is not known, is missing, has another number
        of values than there are inputs, or is out of its range. It is also raised for another number of inputs than the
        method takes, and for a base that it lacks or does not take.
        """
        cls.check_inputs(inputs, has_base=has_base)
        known = _parameters(cls)
        values: dict[str, Any] = {}
        for name in given:
            if name not in known:
                offered = cls.parameters()
                hint = did_you_mean(name, offered, f"its parameters: {', '.join(offered) or 'none'}")
                raise ArgumentError(f"{cls.name} has no parameter {quoted(name)}", hint=hint)
        for name, parameter in known.items():
            value = given.get(name)
            if parameter.is_planned and value is None:
                continue
            if parameter.is_per_input:
                several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * inputs
                if len(several) != inputs:
                    raise ArgumentError(f"{name} has {plural(len(several), 'value')} for {plural(inputs, 'input')}")
                values[_attribute(name)] = tuple(_given(parameter, one, cls.name) for one in several)
            else:
                values[_attribute(name)] = _given(parameter, value, cls.name)
        return cls(**values)

    @classmethod
    def check_inputs(cls, inputs: int, *, has_base: bool) -> None:
        """Raise ``ArgumentError`` unless the method takes so many inputs besides the base, and a base or none."""
        if cls.uses_base == "always" and not has_base:
            raise ArgumentError(f"{cls.name} needs a base", hint="say which input is the base")
        if cls.uses_base == "never" and has_base:
            raise ArgumentError(f"{cls.name} takes no base")
        if inputs < cls.fewest or (cls.most is not None and inputs > cls.most):
            least, most = plural(cls.fewest, "input"), cls.most
            takes = least if most == cls.fewest else f"at least {least}" if most is None else f"{cls.fewest} to {most}"
            beside = " besides the base" if has_base else ""
            hint = cls.for_more if inputs > cls.fewest else None
            raise ArgumentError(f"{cls.name} takes {takes}{beside}, not {inputs}", hint=hint)

    def given(self) -> dict[str, object]:
        """Return the parameters by name as JSON values, also those that a plan has set; ``of`` takes them."""
        known = _parameters(type(self)).items()
        values = {name: getattr(self, _attribute(name)) for name, one in known if not one.is_planned}
        values |= {name: value for name, one in known if one.is_planned and (value := getattr(self, name))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def check(self) -> None:  # noqa: B027 - most methods need none
        """Refuse values that do not go together with ``ArgumentError``; each is in its range."""

    def shares(self) -> tuple[Share | None, ...]:
        """Return what each input keeps of all its tensors together; None, or no item, for each tensor by itself."""
        return ()

    def notes(self) -> tuple[str, ...]:
        """Return what a plan should say of these numbers: sentences without a key."""
        return ()

    @abstractmethod
    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the arithmetic for one tensor. Raises ``ArgumentError`` where the shape does not allow the method."""


@cache
def _parameters(kind: type[Method]) -> Mapping[str, Parameter]:
    found = {}
    for item in fields(kind):  # type: ignore[arg-type]
        name = item.name.rstrip("_")
        parameter: Parameter = item.metadata["parameter"]
        values = {one.name: getattr(parameter, one.name) for one in fields(parameter)}
        found[name] = Parameter(**{**values, "name": name})
    return found


def _attribute(name: str) -> str:
    return f"{name}_" if name == "lambda" else name


def _given(parameter: Parameter, value: object, method: str) -> object:
    if value is not None:
        return value
    if parameter.default is None:
        raise ArgumentError(f"{method} needs {parameter.name}", hint=f"{parameter.name} is {parameter.range_text}")
    return parameter.default
