"""What is said about two sets of tensors: every word has torch's meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import TensorInfo, diff, load_into, parse_rules
from ckptkit.errors import CkptkitError, ModelError, RuleError
from tests.helpers_outputs import described

NET = described(fc1__weight=(5, 4), fc1__bias=(5,), fc2__weight=(3, 5), fc2__bias=(3,))


def renamed(infos: Mapping[str, TensorInfo], before: str, after: str) -> dict[str, TensorInfo]:
    """The same tensors under names with the prefix ``before`` put in place of ``after``."""
    names = [after + key.removeprefix(before) if key.startswith(before) else key for key in infos]
    return {name: TensorInfo(name, info.dtype, info.shape) for name, info in zip(names, infos.values(), strict=True)}


def without(infos: Mapping[str, TensorInfo], *keys: str) -> dict[str, TensorInfo]:
    return {key: info for key, info in infos.items() if key not in keys}


# --- the words -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_fits_has_nothing_to_report() -> None:
    """Same keys, shapes and dtypes: everything is matched, and load_state_dict takes it."""
    result = diff(NET, NET)
    assert [pair.key for pair in result.matched] == list(NET)
    assert (result.different, result.loads, result.loads_strict, result.coverage) == (False, True, True, 1.0)
    assert result.hints == ()


def test_each_difference_is_listed_under_its_own_word() -> None:
    """Missing: expected only. Unexpected: found only. Mismatches: on both sides, with both descriptions."""
    found = {
        **without(NET, "fc2.bias"),
        "fc1.weight": TensorInfo("fc1.weight", "F32", (5, 3)),
        "fc1.bias": TensorInfo("fc1.bias", "BF16", (5,)),
        "head": TensorInfo("head", "F32", (1,)),
    }
    result = diff(NET, found)
    assert [info.key for info in result.missing] == ["fc2.bias"]
    assert [info.key for info in result.unexpected] == ["head"]
    assert [(str(pair.expected), str(pair.found)) for pair in result.shape_mismatched] == [("F32 [5, 4]", "F32 [5, 3]")]
    assert [(pair.key, pair.found.dtype) for pair in result.dtype_mismatched] == [("fc1.bias", "BF16")]
    assert [pair.key for pair in result.matched] == ["fc1.bias", "fc2.weight"]
    assert result.coverage == (5 + 15) / (20 + 5 + 15 + 3)
    assert (result.loads, result.loads_strict, result.different) == (False, False, True)


@pytest.mark.parametrize(
    ("expected", "found", "coverage"),
    [
        ({}, {}, 1.0),
        ({}, NET, 1.0),
        (NET, {}, 0.0),
        (described(a=(0,)), {}, 1.0),
        (described(a=(3,), b=(1,)), described(a=(3,)), 0.75),
        (described(a=(3,), b=(1,)), described(a=(2,), b=(1,)), 0.25),
    ],
    ids=["nothing wanted", "nothing wanted, much there", "nothing there", "no elements", "most", "mismatch"],
)
def test_coverage_counts_elements(
    expected: dict[str, TensorInfo], found: dict[str, TensorInfo], coverage: float
) -> None:
    """The share of the expected elements that found fills, never the share of keys."""
    assert diff(expected, found).coverage == coverage


def test_a_result_is_shown_in_numbers() -> None:
    """At a prompt the result of a model of a thousand tensors is one line."""
    shown = repr(
        diff({"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(4), "c": torch.ones(1)})
    )
    assert shown == "<StateDictDiff: 1 matched, 0 missing, 1 unexpected, 1 shape-mismatched, 0 dtype-mismatched>"


def test_another_dtype_is_a_difference_that_loads() -> None:
    """torch casts while loading, so it is reported and loads strictly."""
    result = diff({"w": TensorInfo("w", "F32", (2,))}, {"w": TensorInfo("w", "F16", (2,))})
    assert (result.different, result.loads, result.loads_strict) == (True, True, True)


def test_descriptions_need_no_values() -> None:
    """Two mappings of TensorInfo are enough, and a model or a dict of tensors stands for its description."""
    model = nn.Linear(4, 5)
    wanted = described(weight=(5, 4), bias=(5,))
    assert not diff(wanted, model).different
    assert not diff(model, wanted).different
    assert not diff(model, dict(model.state_dict())).different


@pytest.mark.parametrize(
    "thing",
    ["model.pt", b"model.pt", 3, None, [], nn.Linear, torch.optim.SGD([nn.Parameter(torch.ones(1))])],
    ids=["path", "bytes", "int", "None", "list", "class", "optimizer"],
)
def test_what_is_no_state_dict_is_refused(thing: Any) -> None:
    """A path too: it becomes a checkpoint at one door, and the message says which."""
    with pytest.raises(ModelError, match="expected is a ") as caught:
        diff(thing, {})
    assert caught.value.hint


# --- rules -----------------------------------------------------------------------------------------------------------


def test_rules_rename_what_was_found() -> None:
    """The pair keeps both names; dropped keys are neither matched nor unexpected."""
    found = {**renamed(NET, "", "module."), "optimizer.step": TensorInfo("optimizer.step", "I64", ())}
    result = diff(NET, found, parse_rules(rename=["module.*=*"], drop=["optimizer.*"]))
    assert [(pair.key, pair.found.key) for pair in result.matched] == [(key, f"module.{key}") for key in NET]
    assert (result.loads_strict, result.unexpected) == (True, ())


@pytest.mark.parametrize(
    ("rules", "message"),
    [(["modul.*=*"], "matches none"), (["module.{a}.weight=w"], "would both be called")],
    ids=["matches nothing", "collision"],
)
def test_rules_that_go_wrong_are_refused(rules: list[str], message: str) -> None:
    """A typing slip never looks like a difference."""
    with pytest.raises(RuleError, match=message):
        diff(NET, renamed(NET, "", "module."), rules)


# --- hints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "found", "rename"),
    [
        (NET, renamed(NET, "", "module."), "module.*=*"),
        (NET, renamed(NET, "", "_orig_mod."), "_orig_mod.*=*"),
        (NET, renamed(NET, "", "module._orig_mod."), "module._orig_mod.*=*"),
        (NET, renamed(NET, "", "backbone.encoder."), "backbone.encoder.*=*"),
        (renamed(NET, "", "module."), NET, "*=module.*"),
        (renamed(NET, "", "backbone."), NET, "*=backbone.*"),
    ],
    ids=["DDP", "compile", "both", "backbone", "add module", "add backbone"],
)
def test_the_prefix_that_explains_everything_is_named(
    expected: dict[str, TensorInfo], found: dict[str, TensorInfo], rename: str
) -> None:
    """The first hint says how many keys it would match; following it makes the checkpoint load strictly."""
    hint = diff(expected, found).hints[0]
    assert hint.rename == rename
    assert hint.message == f"all 4 keys match after --rename '{rename}'"
    assert diff(expected, found, [hint.rename]).loads_strict


def test_a_hint_counts_what_it_would_match() -> None:
    """Where some keys stay apart, the number says so, and it is the number that comes true."""
    found = {**renamed(without(NET, "fc2.bias"), "", "module."), "extra": TensorInfo("extra", "F32", (9,))}
    hint = diff(NET, found).hints[0]
    assert hint.message == "3 of 4 keys match after --rename 'module.*=*'"
    assert len(diff(NET, found, [hint.rename]).matched) == 3


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (NET, NET),
        (NET, described(other=(7,))),
        (NET, without(NET, "fc1.bias")),
        (NET, {f"module.{key}": TensorInfo(f"module.{key}", "F32", (9, 9)) for key in NET}),
        (described(w=(1,), b=(2,)), described(x__w=(1,), x__x__w=(3,), y__b=(2,), b=(2,), w=(1,))),
        (NET, {**without(NET, "fc1.bias"), **described(x__fc1__bias=(5,), x__fc1__weight=(5, 4))}),
    ],
    ids=["equal", "nothing in common", "only missing", "other shapes", "nothing missing", "would collide"],
)
def test_no_hint_where_none_helps(expected: dict[str, TensorInfo], found: dict[str, TensorInfo]) -> None:
    """A rename that would match no more keys, or give two keys one name, is not offered."""
    assert diff(expected, found).hints == ()


@pytest.mark.parametrize("prefix", ["mo\x1b[31mdule.", "m\ndule.", "a*b.", "{x}.", "re:a.", "a=b."])
def test_hostile_prefixes_make_no_hostile_hint(prefix: str) -> None:
    """What is shown is printable; a prefix that a pattern would not take literally is not offered."""
    found = renamed(NET, "", prefix)
    result = diff(NET, found)
    for hint in result.hints:
        assert hint.message.isprintable()
        assert diff(NET, found, [hint.rename]).loads_strict


# --- what torch does in odd cases: each line was seen to be so, and the property test compares with torch itself ------


class Counter(nn.Module):
    """Looks like batch norm by its names, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


def test_only_batch_norm_fills_in_its_counter() -> None:
    """Checkpoints of before 0.4.1 have no counter: missing, and still loaded strictly; a look-alike's does not."""
    found = described(running_mean=(2,), running_var=(2,))
    model = nn.BatchNorm1d(2, affine=False)
    norm = diff(model, found)
    assert ([info.key for info in norm.missing], norm.loads_strict) == (["num_batches_tracked"], True)
    state = model.state_dict()  # it carries its version, so torch knows that the counter should be there
    del state["num_batches_tracked"]
    assert not diff(model, state).loads_strict
    assert not diff(Counter(), described(running_mean=(2,))).loads_strict


def test_a_submodule_set_to_none_hides_its_keys() -> None:
    """After ``model.fc = None`` torch takes ``fc.weight`` without a word: unexpected, and loaded strictly."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = model.state_dict()
    model[1] = None  # type: ignore[assignment]
    assert not model.load_state_dict(state).unexpected_keys
    result = diff(model, state)
    assert [info.key for info in result.unexpected] == ["1.weight", "1.bias"]
    assert (result.loads_strict, result.different) == (True, True)
    assert load_into(model, state).ok


@pytest.mark.parametrize(
    ("value", "loads", "field"),
    [
        (torch.ones(2).to_sparse(), False, "uncopyable"),
        (3, False, "blocked"),
        (None, False, "blocked"),
        ([1.0, 2.0], False, "blocked"),
        (torch.ones(2, dtype=torch.bool), True, "dtype_mismatched"),
    ],
    ids=["sparse", "int", "None", "list", "bool"],
)
def test_values_that_cannot_be_copied_do_not_load(value: Any, *, loads: bool, field: str) -> None:
    """A key that is there with something torch cannot copy makes it raise in both modes."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2))})
    result = diff(model, {"w": value})
    assert result.loads is loads
    assert len(getattr(result, field)) == 1
    try:
        model.load_state_dict({"w": value}, strict=False)
    except RuntimeError:
        assert not loads
    else:
        assert loads


def test_an_unexpected_value_that_is_no_tensor_is_unexpected_too() -> None:
    """torch's strict mode counts every key, whatever is under it; an entry beside the envelope is not in the way."""
    model = nn.Linear(1, 1)
    result = diff(model, {**model.state_dict(), "epoch": 3})
    assert (result.foreign, result.loads, result.loads_strict, result.different) == (("epoch",), True, False, True)


def test_a_key_that_is_no_string_is_refused() -> None:
    """load_state_dict would fail on it too."""
    with pytest.raises(CkptkitError, match="1 is not a string"):
        diff(nn.Linear(1, 1), {1: torch.ones(1)})  # type: ignore[arg-type]
