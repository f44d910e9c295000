"""The method of each key and the values of its parameters: the first ``[[set]]`` that fits and has one decides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ckptkit.core.patterns import KeyMatch, Pattern, parse_pattern, suggest_pattern
from ckptkit.core.text import plural, quoted
from ckptkit.core.toml_lines import TomlPath
from ckptkit.errors import ArgumentError, RecipeError, RuleError
from ckptkit.plans.methods.model import Method
from ckptkit.plans.methods.table import method_named
from ckptkit.plans.recipes.model import Gradient, MergeRecipe, Parameters, Value

__all__ = ["Chosen", "KeySettings", "index_of"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the recipe says about one key: the input that it is taken from, or a method.

    ``rule`` names the method and the ``[[set]]`` that decided, if one did.
    """

    method: type[Method]
    take: str
    rule: str
    fits: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]  # the settings that fit, with the numbers of captures


_MOST_DIGITS = 18
_SEED = "seed"  # of random masks, which is one for all keys
_Found: TypeAlias = tuple[Value | None, TomlPath]


def index_of(match: re.Match[str] | KeyMatch, name: str) -> int:
    """Return the number that a capture has; raise ``RuleError`` for one of too many digits, which a key can have."""
    digits = match[name]
    if len(digits) > _MOST_DIGITS:
        raise RuleError(f"{quoted(match.string)}: index {{{name}}} has {len(digits)} digits, which is too many")
    return int(digits)


@dataclass(slots=True)
class KeySettings:
    """The settings of a recipe on the keys of its output.

    ``keys`` are all keys that the settings may decide about.
    """

    recipe: MergeRecipe
    keys: Sequence[str]
    _patterns: list[list[Pattern]] = field(init=False)
    _largest: dict[tuple[int, str], int] = field(init=False, default_factory=dict)
    _matches: dict[str, list[tuple[int, tuple[tuple[str, int], ...]]]] = field(init=False, default_factory=dict)
    _used: set[int] = field(init=False, default_factory=set)
    _methods: dict[object, Method] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Find the settings that fit each key; raise ``RecipeError`` for one that fits none."""
        self._patterns = [[parse_pattern(text) for text in each.keys] for each in self.recipe.settings]
        self._matches = {key: [] for key in self.keys}
        for number, patterns in enumerate(self._patterns):
            fits = False
            for key in self.keys:
                found = next(((one, match) for one in patterns if (match := one.match(key)) is not None), None)
                if found is None:
                    continue
                fits = True
                pattern, match = found
                counted = [name for name, is_int in pattern.captures.items() if is_int]
                captured = tuple((name, index_of(match, name)) for name in counted)
                self._matches[key].append((number, captured))
                for name, index in captured:
                    self._largest[number, name] = max(self._largest.get((number, name), 0), index)
            if not fits:
                raise self._unused(number)

    def chosen(self, key: str) -> Chosen:
        """Return what the recipe says about a key."""
        name, take, rule = self.recipe.method, "", self.recipe.method
        for number, _ in self._matches[key]:
            setting = self.recipe.settings[number]
            if setting.take or setting.method:
                self._used.add(number)
                name, take = setting.method or name, setting.take
                rule = f"take = {quoted(take)} ({self._place(number)})" if take else f"{name} ({self._place(number)})"
                break
        return Chosen(method_named(name), take, rule, tuple(self._matches[key]))

    def method(
        self, key: str, chosen: Chosen, inputs: Sequence[str], *, has_base: bool, own: Parameters | None = None
    ) -> Method:
        """Return the method with its numbers for a key that these inputs have, without its base.

        ``own`` has values that count where no ``[[set]]`` has them. Raises ``RecipeError`` where the method does not
        take the values or the inputs.
        """
        identity = (chosen.method, chosen.fits, tuple(inputs), has_base, tuple((own or {}).items()))
        if identity in self._methods:
            return self._methods[identity]
        values: dict[str, object] = {}
        places: dict[str, TomlPath] = {}
        for name, parameter in chosen.method.parameters().items():
            if name == _SEED:
                values[name], places[name] = self.recipe.seed, (_SEED,)
            elif parameter.is_per_input:
                found = [self._value(chosen, name, each, own or {}) for each in inputs]
                values[name] = [value for value, _ in found]
                places[name] = next((path for value, path in found if value is not None), ())
            else:
                values[name], places[name] = self._value(chosen, name, "", own or {})
        try:
            made = chosen.method.of(len(inputs), values, has_base=has_base)
        except ArgumentError as error:
            named = next((name for name in places if error.reason.startswith((name, f"the {name}"))), "")
            path = places.get(named) or ("method",)
            raise self.recipe.places.error(f"{quoted(key)}: {error.reason}", *path, hint=error.hint) from None
        self._methods[identity] = made
        return made

    def refuse_hidden(self) -> None:
        """Raise ``RecipeError`` for a ``[[set]]`` that decides about no key, once all methods were asked for."""
        for number in range(len(self.recipe.settings)):
            if number not in self._used:
                raise self._unused(number)

    def _value(self, chosen: Chosen, name: str, of_input: str, own_values: Parameters) -> _Found:
        """Return the value of a parameter, of one input if it has a name, and the place in the recipe that has it."""
        recipe = self.recipe
        for number, captured in chosen.fits:
            setting = recipe.settings[number]
            if setting.take or (setting.method and setting.method != chosen.method.name):
                continue
            own = setting.inputs.get(of_input, {})
            if name in own or name in setting.parameters:
                self._used.add(number)
                path: TomlPath = ("set", number, "inputs", of_input, name) if name in own else ("set", number, name)
                value = own[name] if name in own else setting.parameters[name]
                return self._number(value, number, dict(captured)), path
        if name in own_values:
            return own_values[name], ("slice",)
        if of_input:
            each = recipe.input(of_input)
            if name in each.parameters:
                return each.parameters[name], ("input", each.number, name)
        if name in recipe.parameters:
            return recipe.parameters[name], (name,)
        return None, ()

    def _number(self, value: Value, number: int, captured: Mapping[str, int]) -> Value:
        if not isinstance(value, Gradient):
            return value
        return value.at(captured[value.over], self._largest[number, value.over])

    def _place(self, number: int) -> str:
        return self.recipe.places.of("set", number) or f"[[set]] {number + 1}"

    def _unused(self, number: int) -> RecipeError:
        """Return the error about a ``[[set]]`` that decides nothing."""
        patterns = self._patterns[number]
        text = " or ".join(quoted(pattern.text) for pattern in patterns)
        matching = [key for key in self.keys if any(pattern.match(key) for pattern in patterns)]
        if not matching:
            reason = f"{text} fits none of {plural(len(self.keys), 'merged key')}"
            hint = suggest_pattern(patterns[0], self.keys, "the output") if self.keys else None
            return self.recipe.places.error(reason, "set", number, hint=hint)
        earlier = next((other for other, _ in self._matches[matching[0]] if other < number), None)
        by = "" if earlier is None else f": {self._place(earlier)} decides about {quoted(matching[0])}"
        reason = f"this [[set]] decides about no key{by}"
        return self.recipe.places.error(reason, "set", number, hint="write the narrower [[set]] first, or leave it out")
