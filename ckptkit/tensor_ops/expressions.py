"""Integers written as arithmetic: ``heads*hd``, ``n//2``, ``3*(d+1)``; nothing is ever evaluated as code."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError

__all__ = ["evaluate_expression"]

_LONGEST = 200
_LARGEST = 2**63
# A digit that runs into a letter is refused here: Python's own parser only warns of some of them.
_WORDS = re.compile(r"(?:[0-9]+(?![A-Za-z_])|[A-Za-z_][A-Za-z0-9_]*|//|[-+*() ])+")
_BINARY: Mapping[type[ast.operator], Callable[[int, int], int]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
)
_UNARY: Mapping[type[ast.unaryop], Callable[[int], int]] = MappingProxyType(
    {ast.UAdd: operator.pos, ast.USub: operator.neg}
)


def evaluate_expression(text: str, variables: Mapping[str, int]) -> int:
    """Return the integer that ``text`` amounts to: ``+ - * //``, parentheses, integers and variables.

    Raises ``RuleError`` for anything else, an unknown variable, a division by zero, and numbers beyond 64 bits.
    """
    if len(text) > _LONGEST:
        raise RuleError(f"{quoted(text[:20])}... is longer than {_LONGEST} characters")
    wrong = RuleError(f"{quoted(text)} is not arithmetic with integers", hint="+ - * // ( ), integers and variables")
    if not _WORDS.fullmatch(text):
        raise wrong
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise wrong from None
    return _value(tree, text, variables, wrong)


def _value(node: ast.expr, text: str, variables: Mapping[str, int], wrong: RuleError) -> int:
    made: int
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            made = number
        case ast.Name(id=name):
            if name not in variables:
                known = ", ".join(sorted(variables))
                raise RuleError(
                    f"{quoted(text)} uses the unknown variable {quoted(name)}",
                    hint=f"known: {known}" if known else "no variables are defined",
                )
            made = variables[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            made = _UNARY[type(sign)](_value(operand, text, variables, wrong))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            one, other = (_value(side, text, variables, wrong) for side in (left, right))
            if isinstance(sign, ast.FloorDiv) and other == 0:
                raise RuleError(f"{quoted(text)} divides by zero")
            made = _BINARY[type(sign)](one, other)
        case _:
            raise wrong
    if not -_LARGEST <= made < _LARGEST:
        raise RuleError(f"{quoted(text)} amounts to more than 64 bits hold")
    return made
