"""Assertions for the tests of a project that trains or publishes models, like those of ``torch.testing``.

Each raises where something is not as promised, and the text of the failure is a page as the command line prints it.
``docs/testing.md`` has recipes for continuous integration.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NoReturn

from ckptkit.comparison import StateDictDiff, diff_checkpoints
from ckptkit.comparison.values import compare_named
from ckptkit.core.arguments import require_flags, require_number, require_strings
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.patterns import Pattern, matches_any, parse_pattern, suggest_pattern
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.param_groups.validate import assert_param_groups
from ckptkit.readiness.init import fresh_patterns
from ckptkit.render.diff import diff_page
from ckptkit.render.page import Page, as_text
from ckptkit.render.values import value_page
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules, RulesLike, Stage

__all__ = ["assert_loads", "assert_param_groups", "assert_same_weights"]

_MOST_NAMED = 3  # tensors in a message


def __dir__() -> list[str]:
    """List the assertions."""
    return __all__


def assert_loads(
    model: CheckpointLike,
    checkpoint: CheckpointLike,
    *,
    fresh: str | Sequence[str] = (),
    rules: RulesLike | None = None,
) -> None:
    """Assert that every tensor of ``model`` is in ``checkpoint`` with its shape, but for those that stay fresh.

    Only names, shapes and dtypes are compared; no value is read, and ``model`` does not change. Another dtype is no
    failure where torch casts it. The checkpoint may have more tensors than the model.

    Args:
        model: The model: a ``torch.nn.Module``, also on the meta device, or anything that ``diff`` takes.
        checkpoint: A path, a Checkpoint, a Module or a mapping of tensors.
        fresh: A pattern, or several, of the keys of the model that must *not* load, such as ``"fc.*"`` for a new head.
        rules: Renames for the keys of the checkpoint, as in ``diff``.

    Raises:
        AssertionError: A key outside of ``fresh`` does not load, or a key of ``fresh`` does. The text is the page of
            ``diff``.
        RuleError: A pattern of ``fresh`` matches no key of the model, or a rule is not valid.
        CkptkitError: One side cannot be read.

    Example:
        >>> from ckptkit.testing import assert_loads
        >>> assert_loads("py:fixtures.lenet:build", "fixtures/lenet_10class.pth", fresh="fc3.*")
        >>> assert_loads("py:fixtures.lenet:build", "fixtures/lenet_10class.pth")
        Traceback (most recent call last):
        AssertionError: 2 of 10 keys of the model are not loaded: 'fc3.weight', 'fc3.bias'
        ...
    """
    __tracebackhide__ = True
    with opened(model, "model") as expected, opened(checkpoint, "checkpoint") as found:
        result = diff_checkpoints(expected, found, apply_rules(rules_for(rules, found, expected), found, expected))
        patterns = fresh_patterns(fresh, expected)
        loaded = _loaded(result)
        keys = [*expected, *(key for key in result.extra_state if key not in expected)]
        wrong = [key for key in keys if key not in loaded and not matches_any(patterns, key)]
        filled = [key for key in loaded if matches_any(patterns, key)]
        if wrong or filled:
            said = [
                *([f"{_count(wrong, keys)} not loaded: {listed(wrong)}"] if wrong else []),
                *([f"{_count(filled, keys)} loaded, and must stay fresh: {listed(filled)}"] if filled else []),
            ]
            _fail("; ".join(said), diff_page(result))


def assert_same_weights(
    a: CheckpointLike,
    b: CheckpointLike,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    check_dtype: bool = True,
    rules: RulesLike | None = None,
    keep: str | Sequence[str] = (),
) -> None:
    """Assert that two checkpoints, or the same part of both, have the same keys, shapes, dtypes and values.

    ``a`` is the expected side. Tensors are read one at a time, in pieces. What is beside the tensors, such as extra
    state and metadata, is not compared.

    By default values must be equal bit by bit: a NaN equals a NaN of the same bits, and -0.0 differs from 0.0. With a
    tolerance, elements with other bits are equal where ``torch.isclose(b, a, rtol, atol)`` is true:
    ``abs(b - a) <= atol + rtol * abs(a)``.

    Args:
        a: A path, a Checkpoint, a ``torch.nn.Module``, or a mapping of tensors.
        b: The same.
        rtol: The relative tolerance.
        atol: The absolute tolerance.
        check_dtype: Whether dtypes must be equal too. If not, a tensor of ``b`` is cast to the dtype in ``a`` first.
        rules: Renames for the keys of ``b``, as in ``diff``.
        keep: A pattern, or several, of the keys to compare, such as ``"backbone.*"`` for a part that must not train.
            Other keys may differ, and be on one side only. The names are those of ``a``.

    Raises:
        RuleError: A pattern of ``keep`` matches no key of ``a``, or a rule is not valid.
        AssertionError: The sides differ. The text is the page of ``diff``, or a page of the ten tensors that differ
            most, each with its largest absolute difference.
        CkptkitError: One side cannot be read.

    Example:
        >>> from ckptkit.testing import assert_same_weights
        >>> assert_same_weights("fixtures/lenet_10class.pth", "fixtures/lenet_10class.safetensors")
        >>> assert_same_weights({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 2.5])}, rtol=0.1)
        Traceback (most recent call last):
        AssertionError: 1 of 1 tensor differs by more than rtol=0.1, atol=0.0: 'w'
        ...
    """
    require_flags(check_dtype=check_dtype)
    __tracebackhide__ = True
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        require_number(tolerance, name, "a number of at least 0", at_least=0)
    with opened(a, "a") as expected, opened(b, "b") as found:
        renames = rules_for(rules, found, expected)
        if patterns := _kept(keep, expected):
            renames = _with_filter(renames, patterns, found, expected)
            expected = expected.without([key for key in expected if not matches_any(patterns, key)])  # noqa: PLW2901
        key_map = apply_rules(renames, found, expected)
        _same_description(diff_checkpoints(expected, found, key_map), check_dtype=check_dtype)
        sizes = (rtol, atol) if rtol or atol else (None, None)  # 0 would take -0.0 for 0.0
        names = {key: key for key in expected}
        compared = compare_named(expected, found, key_map, names, rtol=sizes[0], atol=sizes[1])
        if compared.skipped:
            reasons = [f"{quoted(one.key)} ({one.reason})" for one in compared.skipped[:_MOST_NAMED]]
            tensors = plural(len(compared.skipped), "tensor")
            _fail(f"the values of {tensors} cannot be compared, such as {', '.join(reasons)}", [])
        differences = compared.different
        if differences:
            verb = "differs" if len(differences) == 1 else "differ"
            beyond = f" by more than rtol={rtol}, atol={atol}" if rtol or atol else ""
            keys = [difference.expected.key for difference in differences]
            _fail(
                f"{len(keys):,} of {plural(len(expected), 'tensor')} {verb}{beyond}: {listed(keys)}",
                value_page(differences, expected, found),
            )


def _kept(keep: str | Sequence[str], expected: Checkpoint) -> list[Pattern]:
    """Return the patterns of the keys to compare. Raises ``RuleError`` for one that matches no expected key."""
    patterns = list(map(parse_pattern, require_strings(keep, "keep", "a pattern or a list of patterns")))
    for pattern in patterns:
        if not any(map(pattern.match, expected)):
            raise RuleError(
                f"--keep {shell_word(pattern.text)} matches none of {plural(len(expected), 'key')} of a",
                hint=suggest_pattern(pattern, expected, "a"),
            )
    return patterns


def _with_filter(rules: Rules, patterns: Sequence[Pattern], found: Checkpoint, expected: Checkpoint) -> Rules:
    """Return the rules with a filter of the names that they give; the rest of ``found`` has no name that matches."""
    names = apply_rules(rules, found, expected).outputs()
    used = tuple(pattern for pattern in patterns if any(map(pattern.match, names)))
    return replace(rules, stages=(*rules.stages, Stage(used))) if used else rules


def _loaded(result: StateDictDiff) -> dict[str, None]:
    """Return the keys of the model that ``load_state_dict`` would fill, in order."""
    refused = {pair.key for pair in result.uncopyable}
    pairs = (*result.matched, *(pair for pair in result.shape_mismatched if pair.loads))
    loaded = {pair.key for pair in pairs if pair.key not in refused} | result.filled | result.computed.keys()
    return dict.fromkeys(key for key in result.expected if key in loaded)


def _same_description(result: StateDictDiff, *, check_dtype: bool) -> None:
    __tracebackhide__ = True
    kinds = {
        "missing": result.missing,
        "unexpected": result.unexpected,
        "of another shape": result.shape_mismatched,
        "of another dtype": result.dtype_mismatched if check_dtype else (),
        "quantised in another way": result.quantized,
    }
    said = [f"{plural(len(found_keys), 'key')} {kind}" for kind, found_keys in kinds.items() if found_keys]
    if said:
        _fail(
            f"the tensors are not the same: {', '.join(said)}",
            diff_page(result),
        )


def _count(some: Collection[str], keys: Collection[str]) -> str:
    return f"{len(some):,} of {plural(len(keys), 'key')} of the model {'is' if len(some) == 1 else 'are'}"


def _fail(sentence: str, page: Page) -> NoReturn:
    __tracebackhide__ = True
    raise AssertionError("\n".join((sentence, "", *as_text(page))))
