"""Variables of a rule file: set in the file, set by the user, or read from the configuration of the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError

__all__ = ["NO_VARIABLES", "Settings", "parse_setting"]

_FROM_CONFIG = "config:"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Settings:
    """The values that the user set, by variable, and a function that reads the configuration of the model."""

    given: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[], Mapping[str, object]] | None = None

    def resolve(self, table: object) -> dict[str, int]:
        """Return the variables of the table ``[vars]``; a value that the user set replaces the value of the file.

        A value is an integer, arithmetic with the variables before it, or ``"config:a.b"``, which names an integer in
        the configuration. Raises ``RuleError`` for any other value, and where the user set a variable that the file
        does not have.
        """
        if not isinstance(table, Mapping):
            raise RuleError("vars must be a table, written [vars]")
        unknown = [name for name in self.given if name not in table]
        if unknown:
            known = ", ".join(sorted(table)) or "none"
            raise RuleError(f"the rules have no variable {quoted(unknown[0])}", hint=f"variables in [vars]: {known}")
        variables: dict[str, int] = {}
        for name, value in table.items():
            if not _NAME.fullmatch(name):
                raise RuleError(f"{quoted(name)} is not a valid variable name", hint="letters, digits and underscores")
            try:
                variables[name] = self._value(name, self.given.get(name, value), variables)
            except RuleError as error:
                raise RuleError(f"variable {name}: {error.reason}", hint=error.hint) from None
        return variables

    def _value(self, name: str, value: object, known: Mapping[str, int]) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if not isinstance(value, str):
            raise RuleError("the value is not an integer", hint='write a number, arithmetic, or "config:NAME"')
        if value.startswith(_FROM_CONFIG):
            return self._from_config(name, value.removeprefix(_FROM_CONFIG))
        from ckptkit.tensor_ops.expressions import evaluate_expression

        return evaluate_expression(value, known)

    def _from_config(self, name: str, path: str) -> int:
        hint = f"set it: --set {name}=VALUE"
        if self.config is None:
            raise RuleError("the value is in config.json, but there is no config.json", hint=hint)
        found: object = self.config()
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if not isinstance(found, int) or isinstance(found, bool):
            fault = "has no" if found is None else "does not have an integer at"
            raise RuleError(f"config.json {fault} {quoted(path)}", hint=hint)
        return found


NO_VARIABLES: Final = Settings()


def parse_setting(text: str) -> tuple[str, str]:
    """Return the name and the value of ``NAME=VALUE``; raise ``RuleError`` for a text of another form."""
    name, equals, value = text.partition("=")
    if not equals or not _NAME.fullmatch(name) or not value:
        raise RuleError(f"{quoted(text)} is not of the form NAME=VALUE", hint="for example heads=32")
    return name, value
