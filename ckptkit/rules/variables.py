"""The variables of a rule file: written in it, set from outside, or taken from the model's own configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError

__all__ = ["NO_VARIABLES", "Settings", "parse_setting"]

_FROM_CONFIG = "config:"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is known outside of a rule file: variables that are set, and how to get a configuration."""

    given: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[], Mapping[str, Any]] | None = None

    def resolve(self, table: object) -> dict[str, int]:
        """Return the variables of a file's ``[vars]``, those that are given in place of the file's own.

        A value is an integer, arithmetic with variables before it, or ``"config:a.b"``, a value of the configuration.
        Raises ``RuleError`` for anything else, and for a given variable that the file does not have.
        """
        if not isinstance(table, Mapping):
            raise RuleError("vars must be a table, written [vars]")
        unknown = [name for name in self.given if name not in table]
        if unknown:
            known = ", ".join(sorted(table)) or "none"
            raise RuleError(f"the rules have no variable {quoted(unknown[0])}", hint=f"in [vars] there is: {known}")
        made: dict[str, int] = {}
        for name, value in table.items():
            if not _NAME.fullmatch(name):
                raise RuleError(f"{quoted(name)} is no name for a variable", hint="letters, digits and underscores")
            try:
                made[name] = self._value(self.given.get(name, value), made)
            except RuleError as error:
                raise RuleError(f"variable {name}: {error.reason}", hint=error.hint) from None
        return made

    def _value(self, value: object, known: Mapping[str, int]) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if not isinstance(value, str):
            raise RuleError("it is no integer", hint='write a number, arithmetic, or "config:NAME"')
        if value.startswith(_FROM_CONFIG):
            return self._from_config(value.removeprefix(_FROM_CONFIG))
        from ckptkit.tensor_ops.expressions import evaluate_expression

        return evaluate_expression(value, known)

    def _from_config(self, path: str) -> int:
        if self.config is None:
            raise RuleError("it is taken from a config.json, and there is none here", hint="give it: --set NAME=VALUE")
        found: object = self.config()
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if not isinstance(found, int) or isinstance(found, bool):
            what = "has no" if found is None else "holds no integer at"
            raise RuleError(f"config.json {what} {quoted(path)}", hint="give it: --set NAME=VALUE")
        return found


NO_VARIABLES: Final = Settings()


def parse_setting(text: str) -> tuple[str, str]:
    """Return name and value of ``NAME=VALUE``; raises ``RuleError`` for anything else."""
    name, equals, value = text.partition("=")
    if not equals or not _NAME.fullmatch(name) or not value:
        raise RuleError(f"{quoted(text)} is not of the form NAME=VALUE", hint="for example heads=32")
    return name, value
