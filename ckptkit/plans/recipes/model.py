"""The value of a recipe: the inputs of a merge, its method, and the parameters of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal, TypeAlias

from ckptkit.core.config_files import toml_value
from ckptkit.core.text import quoted, shell_word
from ckptkit.core.toml_lines import TomlPath
from ckptkit.errors import RecipeError
from ckptkit.tensor_ops.mismatch import MismatchName

__all__ = [
    "COMPUTE",
    "NON_FLOAT",
    "NOT_PARAMETERS",
    "ON_MISSING",
    "ON_NONFINITE",
    "Compute",
    "CopiedKeys",
    "Gradient",
    "MergeRecipe",
    "NonFloat",
    "OnMissingKey",
    "OnNonfinite",
    "Parameters",
    "Places",
    "RecipeInput",
    "Setting",
    "Slice",
    "Value",
]

Compute: TypeAlias = Literal["float32", "float64"]
OnMissingKey: TypeAlias = Literal["error", "base", "present", "drop"]
NonFloat: TypeAlias = Literal["error", "base", "first", "max"]
OnNonfinite: TypeAlias = Literal["error", "allow", "base"]
_METHOD: Final[TomlPath] = ("method",)
NOT_PARAMETERS: Final = ("seed",)  # of a method: the recipe has it
COMPUTE: Final = ("float32", "float64")
ON_MISSING: Final = ("error", "base", "present", "drop")
NON_FLOAT: Final = ("error", "base", "first", "max")
ON_NONFINITE: Final = ("error", "allow", "base")


@dataclass(frozen=True, slots=True)
class Gradient:
    """A number for each value of the capture ``over``: linear between ``values``, from index 0 to the largest one.

    Example:
        >>> from ckptkit.plans.recipes.model import Gradient
        >>> [Gradient("i", (0.0, 0.5, 1.0)).at(i, 4) for i in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    over: str
    values: tuple[float, ...]

    def at(self, index: int, largest: int) -> float:
        """Return the number for an index from 0 to ``largest``; where that is 0, it is the last of the values."""
        if largest == 0:
            return self.values[-1]
        place = index * (len(self.values) - 1) / largest
        before = min(int(place), len(self.values) - 1)
        after = min(before + 1, len(self.values) - 1)
        share = place - before
        return (1 - share) * self.values[before] + share * self.values[after]


Value: TypeAlias = bool | int | float | str | Gradient
Parameters: TypeAlias = Mapping[str, Value]  # of a method, by name


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a recipe are: the line of each key and table, if the recipe is a TOML file.

    ``path`` is the path of the file, or None. Without ``is_named``, as for options, tables are not named by numbers.
    """

    path: str | None = None
    lines: Mapping[TomlPath, int] = field(default_factory=dict)
    is_named: bool = True

    def of(self, *path: str | int) -> str:
        """Return the words for a part of the recipe: its line, the number of its table, or the line of the method.

        An array of tables, or a table without a header of its own, has the first line in it.
        """
        if path and path not in self.lines:
            inside = [line for place, line in self.lines.items() if place[: len(path)] == path]
            if inside:
                return f"line {min(inside)}"
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"line {self.lines[path[:end]]}"
        if not self.is_named:
            return ""
        numbered = [(name, number) for name, number in pairwise(path) if isinstance(number, int)]
        if numbered:
            return f"[[{numbered[0][0]}]] {numbered[0][1] + 1}"
        return f"line {self.lines[_METHOD]}" if _METHOD in self.lines else ""

    def setting(self, name: str, value: str | float, of_input: str = "") -> str:
        """Return how a field of the recipe, or of one input, gets a value: as a line of the file, or as an option."""
        if self.is_named:
            return f"{name} = {toml_value(value)}"
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return f"--param {shell_word(f'{of_input}.{name}={text}' if of_input else f'{name}={text}')}"

    def renaming(self, rename: str, of_input: str) -> str:
        """Return how the keys of an input are renamed by ``OLD=NEW``: as a line of the file, or as an option."""
        if self.is_named:
            return f"rename = {toml_value([rename])}"
        return f"--param {shell_word(f'{of_input}.rename={rename}')}"

    def error(self, reason: str, *path: str | int, hint: str | None = None) -> RecipeError:
        """Return the error about a part of the recipe, which names its place."""
        place = self.of(*path)
        return RecipeError(f"{place}: {reason}" if place else reason, hint=hint, path=self.path)


@dataclass(frozen=True, slots=True)
class RecipeInput:
    """One input: its name, its path, what is done to it before the merge, and its own parameters of the method.

    ``path`` is empty for an input that is given in Python. ``lora`` is the path of an adapter that is folded into the
    input, times ``lora_scale``. ``strip``, ``rename`` and ``rules`` give its keys other names. ``on_mismatch`` is the
    operation for a tensor of another shape, or one for each pattern of keys.
    """

    name: str
    path: str = ""
    parameters: Parameters = field(default_factory=dict)
    dequantize: bool | str = False
    lora: str = ""
    lora_scale: float = 1.0
    strip: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    rules: str = ""
    on_mismatch: MismatchName | Mapping[str, MismatchName] | Literal[""] = ""
    number: int = field(default=0, compare=False)  # of its [[input]], for messages


@dataclass(frozen=True, slots=True)
class Setting:
    """One ``[[set]]``: what holds for the keys that match a pattern of ``keys``.

    ``parameters`` are those of the method, and ``inputs`` has per-input parameters by the name of the input. ``method``
    is another method. ``take`` is the name of an input whose tensors are taken as they are.
    """

    keys: tuple[str, ...]
    parameters: Parameters = field(default_factory=dict)
    inputs: Mapping[str, Parameters] = field(default_factory=dict)
    method: str = ""
    take: str = ""


@dataclass(frozen=True, slots=True)
class CopiedKeys:
    """The keys that match a pattern of ``keys`` are taken from one input as they are."""

    keys: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of one input, from ``layers[0]`` up to and without ``layers[1]``, with parameters of their own."""

    input: str
    layers: tuple[int, int]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """A recipe: which inputs are merged, by which method, and with which parameters for which keys.

    Attributes:
        method: The name of the method.
        inputs: The inputs in order. A method with a base merges all others into that.
        base: The name of the base, or empty.
        is_base_apart: Whether the base is not an input of a method without a base: it only has the keys and the dtypes.
        parameters: Parameters of the method for all keys and all inputs.
        settings: What holds for some keys; the first that fits and has a parameter decides.
        compute: What the arithmetic is done in, unless an input has float64.
        out_dtype: The code of the dtype of all floats of the output, or empty: each has that of the base.
        seed: The seed of random masks.
        device: Where the arithmetic is done.
        on_missing: What happens to a key that only some inputs have.
        non_float: What happens to integers and booleans that differ.
        on_nonfinite: What happens to values that are NaN or infinite.
        only: Patterns of the keys that are merged, or none for all; the others are those of the base.
        copy: Keys that are taken from one input.
        slices: The layers of the output, for ``passthrough``.
        layer_keys: The pattern of the keys of a layer, with the capture that counts the layers.
        outer: The input that has the keys outside layers, or empty for the base.
        layer_count_field: The field of ``config.json`` with the number of layers, or empty to find it.
        dequantize: Whether quantised weights of all inputs are read as numbers, or their dtype.

    Example:
        >>> from ckptkit.plans.recipes.parse import parse_recipe
        >>> recipe = parse_recipe({"method": "linear", "input": [{"path": "a.pt"}, {"path": "b.pt", "weight": 2}]})
        >>> recipe.inputs[1].name, dict(recipe.inputs[1].parameters)
        ('b', {'weight': 2})
    """

    method: str
    inputs: tuple[RecipeInput, ...]
    base: str = ""
    is_base_apart: bool = False
    parameters: Parameters = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    compute: Compute = "float32"
    out_dtype: str = ""
    seed: int = 0
    device: str = "cpu"
    on_missing: OnMissingKey = "error"
    non_float: NonFloat = "error"
    on_nonfinite: OnNonfinite = "error"
    only: tuple[str, ...] = ()
    copy: tuple[CopiedKeys, ...] = ()
    slices: tuple[Slice, ...] = ()
    layer_keys: str = ""
    outer: str = ""
    layer_count_field: str = ""
    dequantize: bool | str = False
    places: Places = field(default_factory=Places, compare=False)

    def input(self, name: str) -> RecipeInput:
        """Return the input with this name; raise ``RecipeError`` where there is none."""
        for each in self.inputs:
            if each.name == name:
                return each
        raise RecipeError(f"there is no input {quoted(name)}")
