"""Integers written as arithmetic, such as ``heads*hd`` or ``n//2``; the text is never evaluated as code."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError

__all__ = ["evaluate_expression"]

_MAX_LENGTH = 200
_LIMIT = 2**63
# Python's parser only warns of some digits that are followed by a letter, so they are refused here.
_WORDS = re.compile(r"(?:[0-9]+(?![A-Za-z_])|[A-Za-z_][A-Za-z0-9_]*|//|[-+*() ])+")
_BINARY: Mapping[type[ast.operator], Callable[[int, int], int]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
)
_UNARY: Mapping[type[ast.unaryop], Callable[[int], int]] = MappingProxyType(
    {ast.UAdd: operator.pos, ast.USub: operator.neg}
)


def evaluate_expression(text: str, variables: Mapping[str, int]) -> int:
    """Return the value of ``text``, which may have ``+ - * //``, parentheses, integers and variables.

    Raises ``RuleError`` for any other text, an unknown variable, a division by zero, and a number of more than 64 bits.
    """
    if len(text) > _MAX_LENGTH:
        raise RuleError(f"{quoted(text[:20])}... is longer than {_MAX_LENGTH} characters")
    wrong = RuleError(f"{quoted(text)} is not arithmetic with integers", hint="+ - * // ( ), integers and variables")
    if not _WORDS.fullmatch(text):
        raise wrong
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise wrong from None
    return _value(tree, text, variables, wrong)


def _value(node: ast.expr, text: str, variables: Mapping[str, int], wrong: RuleError) -> int:
    result: int
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            result = number
        case ast.Name(id=name):
            if name not in variables:
                known = ", ".join(sorted(variables))
                raise RuleError(
                    f"{quoted(text)} uses the unknown variable {quoted(name)}",
                    hint=f"known: {known}" if known else "no variables are defined",
                )
            result = variables[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            result = _UNARY[type(sign)](_value(operand, text, variables, wrong))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            first, second = (_value(side, text, variables, wrong) for side in (left, right))
            if isinstance(sign, ast.FloorDiv) and second == 0:
                raise RuleError(f"{quoted(text)} divides by zero")
            result = _BINARY[type(sign)](first, second)
        case _:
            raise wrong
    if not -_LIMIT <= result < _LIMIT:
        raise RuleError(f"the value of {quoted(text)} has more than 64 bits")
    return result
