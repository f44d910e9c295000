"""Integer arithmetic has the values of Python, and any other text is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.errors import RuleError
from ckptkit.tensor_ops.expressions import evaluate_expression

VARIABLES = {"heads": 32, "kv": 8, "hd": 128, "n": 7, "_x1": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("heads*hd", 4096),
        ("n//2", 3),
        ("-n//2", -4),
        ("3*(n+1)", 24),
        ("n - -1", 8),
        ("+n", 7),
        (" 12 ", 12),
        ("_x1", 1),
        ("(" * 90 + "n" + ")" * 90, 7),
    ],
)
def test_arithmetic_is_computed(text: str, value: int) -> None:
    assert evaluate_expression(text, VARIABLES) == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "n n", "1if n else 2", "n**2", "n/2", "n%2", "n<2", "n.real", "n[0]", "f(n)", "__import__('os')",
        "1.5", "1e3", "0x10", "1_000", "007", "lambda", "True", "None", "n if n else n", "(", "n;n", "n\n", "\0", "ñ",
        "'n'", "(n,)", "n:=1", "~n", "not n", "n and n",
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    """The text is refused even where Python could evaluate it."""
    with pytest.raises(RuleError, match="is not arithmetic"):
        evaluate_expression(text, VARIABLES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("n//0", "'n//0' divides by zero"),
        ("9223372036854775808", "has more than 64 bits"),
        ("9999999999*9999999999", "has more than 64 bits"),
        ("1" * 201, "is longer than 200 characters"),
        ("heds*hd", "'heds*hd' uses the unknown variable 'heds'"),
    ],
)
def test_what_has_no_value_is_refused(text: str, reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        evaluate_expression(text, VARIABLES)
    assert reason in caught.value.reason


def test_an_unknown_variable_comes_with_those_known() -> None:
    with pytest.raises(RuleError) as caught:
        evaluate_expression("m", VARIABLES)
    assert caught.value.hint == "known: _x1, hd, heads, kv, n"
    with pytest.raises(RuleError) as caught:
        evaluate_expression("m", {})
    assert caught.value.hint == "no variables are defined"


@given(st.text(alphabet="n0123456789+-*/() ", max_size=30))
def test_agrees_with_python_on_any_such_text(text: str) -> None:
    """The value equals the integer of Python, and is refused where Python has none."""
    try:
        made = evaluate_expression(text, {"n": 7})
    except RuleError:
        return
    assert made == eval(text.strip(), {"__builtins__": {}}, {"n": 7})  # noqa: S307 - digits and signs only
