"""Read the fields of the tables of a recipe; every error names the place of the field."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.core.arguments import one_of
from ckptkit.core.patterns import parse_pattern
from ckptkit.core.text import did_you_mean, kind_of, quoted, short_number
from ckptkit.errors import RecipeError, RuleError
from ckptkit.plans.recipes.model import Gradient, Places, Value

__all__ = ["RecipeTable"]


@dataclass(frozen=True, slots=True)
class RecipeTable:
    """One table of a recipe, and its path there."""

    content: Mapping[str, object]
    places: Places
    path: tuple[str | int, ...] = ()

    def error(self, reason: str, *names: str | int, hint: str | None = None) -> RecipeError:
        """Return the error about a field of the table, or about the table."""
        return self.places.error(reason, *self.path, *names, hint=hint)

    def refuse_unknown(self, known: Collection[str], what: str, elsewhere: Mapping[str, str] | None = None) -> None:
        """Raise ``RecipeError`` for a key that is not known; ``elsewhere`` has hints for keys that belong elsewhere."""
        for key in self.content:
            if key not in known:
                known_keys = f"{what} has {', '.join(known)}"
                hint = (elsewhere or {}).get(str(key)) or did_you_mean(str(key), known, known_keys)
                raise self.error(f"unknown key {quoted(str(key))}", str(key), hint=hint)

    def text(self, name: str, default: str = "") -> str:
        """Return a field that is a string, which is not empty if it is given."""
        value = self.content.get(name, default)
        if not isinstance(value, str) or (name in self.content and not value):
            raise self.error(f"{name} is {_shown(value)}, and must be a string", name)
        return value

    def flag_or_text(self, name: str) -> bool | str:
        """Return a field that is true, false or a string."""
        value = self.content.get(name, False)
        if not isinstance(value, bool | str) or value == "":
            raise self.error(f"{name} is {_shown(value)}, and must be true, false or a dtype", name)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a field that is a string or a list of strings."""
        value = self.content.get(name, [])
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
            raise self.error(f"{name} is {_shown(value)}, and must be a string or a list of strings", name)
        if name in self.content and not items:
            raise self.error(f"{name} is an empty list", name, hint="leave it out")
        return tuple(items)

    def patterns(self, name: str) -> tuple[str, ...]:
        """Return a field that is a pattern of keys or a list of patterns."""
        texts = self.texts(name)
        for text in texts:
            self.pattern(name, text)
        return texts

    def pattern(self, name: str, text: str) -> None:
        """Raise ``RecipeError`` for a text that is not a valid pattern."""
        try:
            parse_pattern(text)
        except RuleError as error:
            raise self.error(f"{name}: {error.reason}", name, hint=error.hint) from None

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Return a field that is one of ``choices``, of which the first is the default."""
        value = self.content.get(name, choices[0])
        if not isinstance(value, str) or value not in choices:
            raise self.error(
                f"{name} is {_shown(value)}, and must be {one_of(choices)}",
                name,
                hint=did_you_mean(str(value), choices, "") or None,
            )
        return value

    def whole(self, name: str, default: int, least: int) -> int:
        """Return a field that is an integer of at least ``least``."""
        value = self.content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise self.error(f"{name} is {_shown(value)}, and must be an integer from {least}", name)
        return value

    def number(self, name: str, default: float) -> float:
        """Return a field that is a finite number."""
        value = self.content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise self.error(f"{name} is {_shown(value)}, and must be a finite number", name)
        return value

    def tables(self, name: str) -> Iterator[RecipeTable]:
        """Yield the tables of a field that is a list of them."""
        value = self.content.get(name, [])
        if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
            raise self.error(f"{name} is {_shown(value)}, and must be a list of tables", name, hint=f"write [[{name}]]")
        for number, item in enumerate(value):
            yield RecipeTable(item, self.places, (*self.path, name, number))

    def table(self, name: str) -> RecipeTable:
        """Return the table of a field, or an empty one."""
        value = self.content.get(name, {})
        if not isinstance(value, Mapping):
            raise self.error(f"{name} is {_shown(value)}, and must be a table", name)
        return RecipeTable(value, self.places, (*self.path, name))

    def value(self, name: str) -> Value:
        """Return the value of a parameter: a number, a string, true, false, or a gradient."""
        given = self.content[name]
        if isinstance(given, bool | int | float | str):
            return given
        if isinstance(given, Gradient):
            return given
        if not isinstance(given, Mapping):
            example = f'{name} = {{ over = "i", values = [0, 1] }}'
            raise self.error(f"{name} is {_shown(given)}, and must be one value", name, hint=f"a gradient is {example}")
        table = RecipeTable(given, self.places, (*self.path, name))
        table.refuse_unknown(("over", "values"), "a gradient")
        values = given.get("values")
        if not isinstance(values, list | tuple) or not values:
            raise table.error(f"the gradient of {name} has no list of values", hint="values = [0, 1]")
        wrong = next((item for item in values if isinstance(item, bool) or not isinstance(item, int | float)), None)
        if wrong is not None:
            raise table.error(f"the gradient of {name} has the value {_shown(wrong)}, which is not a number")
        over = table.text("over")
        if not over:
            raise table.error(
                f"the gradient of {name} does not say over what",
                hint='over = "i" is the capture {i:int} of the keys',
            )
        return Gradient(over, tuple(values))


def _shown(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return short_number(value) if abs(value) < 1e15 else "a large number"
    return kind_of(value)
