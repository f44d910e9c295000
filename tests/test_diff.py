"""``diff`` of two state_dicts: every word has torch's meaning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import TensorInfo, diff, load_into, parse_rules, plan_merge, run_checks
from ckptkit.errors import CkptkitError, ModelError, RuleError
from tests.helpers_outputs import described

NET = described(fc1__weight=(5, 4), fc1__bias=(5,), fc2__weight=(3, 5), fc2__bias=(3,))


def renamed(infos: Mapping[str, TensorInfo], before: str, after: str) -> dict[str, TensorInfo]:
    """Return the same tensors with the prefix ``before`` of their names replaced by ``after``."""
    names = [after + key.removeprefix(before) if key.startswith(before) else key for key in infos]
    return {name: TensorInfo(name, info.dtype, info.shape) for name, info in zip(names, infos.values(), strict=True)}


def without(infos: Mapping[str, TensorInfo], *keys: str) -> dict[str, TensorInfo]:
    return {key: info for key, info in infos.items() if key not in keys}


def test_a_checkpoint_that_fits_has_nothing_to_report() -> None:
    """With the same keys, shapes and dtypes, everything is matched and load_state_dict accepts it."""
    result = diff(NET, NET)
    assert [pair.key for pair in result.matched] == list(NET)
    assert (result.different, result.loads, result.loads_strict, result.coverage) == (False, True, True, 1.0)
    assert result.hints == ()


def test_a_shape_may_be_a_list_as_json_has_it() -> None:
    info = TensorInfo("fc1.weight", "F32", [5, 4])
    assert info == NET["fc1.weight"]
    assert not diff({**NET, "fc1.weight": info}, NET).different


def test_each_difference_is_listed_under_its_own_word() -> None:
    """Missing keys are only expected, unexpected keys only found; mismatches have both descriptions."""
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
    """Coverage is the share of the expected elements that were found, not the share of keys."""
    assert diff(expected, found).coverage == coverage


def test_repr_has_the_counts() -> None:
    """The repr is one line, even for a thousand tensors."""
    shown = repr(
        diff({"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(4), "c": torch.ones(1)})
    )
    assert shown == "<StateDictDiff: 1 matched, 0 missing, 1 unexpected, 1 shape-mismatched, 0 dtype-mismatched>"


def test_another_dtype_is_a_difference_that_loads() -> None:
    """torch casts while loading, so another dtype is reported but loads strictly."""
    result = diff({"w": TensorInfo("w", "F32", (2,))}, {"w": TensorInfo("w", "F16", (2,))})
    assert (result.different, result.loads, result.loads_strict) == (True, True, True)


def test_descriptions_need_no_values() -> None:
    """Either side may be a mapping of TensorInfo, a model or a dict of tensors."""
    model = nn.Linear(4, 5)
    wanted = described(weight=(5, 4), bias=(5,))
    assert not diff(wanted, model).different
    assert not diff(model, wanted).different
    assert not diff(model, dict(model.state_dict())).different


@pytest.mark.parametrize(
    ("thing", "shown"),
    [
        (b"model.pt", "a bytes"),
        (3, "3"),
        (None, "None"),
        ([], "a list"),
        (nn.Linear, "the class Linear"),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))]), "a SGD"),
    ],
    ids=["bytes", "int", "None", "list", "class", "optimizer"],
)
def test_other_values_than_state_dicts_are_refused(thing: Any, shown: str) -> None:
    """Only state_dicts and paths of them are accepted, and a hint says so."""
    with pytest.raises(ModelError) as caught:
        diff(thing, {})
    assert caught.value.reason == f"expected is {shown}"
    assert caught.value.hint


def test_rules_rename_what_was_found() -> None:
    """A pair has both names; dropped keys are neither matched nor unexpected."""
    found = {**renamed(NET, "", "module."), "optimizer.step": TensorInfo("optimizer.step", "I64", ())}
    result = diff(NET, found, parse_rules(rename=["module.*=*"], drop=["optimizer.*"]))
    assert [(pair.key, pair.found.key) for pair in result.matched] == [(key, f"module.{key}") for key in NET]
    assert (result.loads_strict, result.unexpected) == (True, ())


@pytest.mark.parametrize(
    ("rules", "message"),
    [(["modul.*=*"], "matches none"), (["module.{a}.weight=w"], "would both be called")],
    ids=["matches nothing", "collision"],
)
def test_rules_that_cannot_be_applied_are_refused(rules: list[str], message: str) -> None:
    """A rule that matches nothing is an error, so that a typo does not look like a difference."""
    with pytest.raises(RuleError, match=message):
        diff(NET, renamed(NET, "", "module."), rules)


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
    """The first hint says how many keys would match; its rename makes the checkpoint load strictly."""
    hint = diff(expected, found).hints[0]
    assert hint.rename == rename
    assert hint.message == f"all 4 keys match after --rename '{rename}'"
    assert diff(expected, found, [hint.rename]).loads_strict


def test_an_adapter_is_folded_and_not_renamed() -> None:
    """A saved embedding would match after a rename, but the factors would not; a live model of PEFT folds nothing."""
    factors = {"q.lora_A": torch.ones(1, 2), "q.lora_B": torch.ones(2, 1)}
    saved = {f"base_model.model.{name}.weight": value for name, value in factors.items()}
    found = saved | {"base_model.model.embed.weight": torch.ones(3, 2)}
    base = {"q.weight": torch.ones(2, 2), "embed.weight": torch.ones(3, 2)}
    (hint,) = diff(base, found).hints
    assert str(hint) == "the tensors are an adapter; merge_lora(expected, found, out) adds it to its base"
    live = {f"base_model.model.{name}.default.weight": value for name, value in factors.items()}
    (hint,) = diff(live | {"base_model.model.q.base_layer.weight": torch.ones(2, 2)}, found).hints
    assert "; suggest_rules(expected, found) looks" in str(hint)


def test_a_hint_counts_what_it_would_match() -> None:
    """If some keys still do not match, the hint gives the number that will match."""
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
def test_no_rename_if_none_helps(expected: dict[str, TensorInfo], found: dict[str, TensorInfo]) -> None:
    """A rename is not suggested if it matches no more keys or gives two keys the same name.

    Where no key matches at all, the hint is to look for rules.
    """
    result = diff(expected, found)
    messages = [hint.message.partition(";")[0] for hint in result.hints]
    assert messages == ([] if result.matched or not result.missing else ["no key matches"])
    assert not any(hint.rename for hint in result.hints)


def _blocks(name: str, *, other: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layers = {f"{name.format(at)}.{leaf}": torch.ones(4, at + 1) for at in range(3) for leaf in "ab"}
    return {"embed": torch.ones(3, 4), "norm": torch.ones(4), **layers, **other}


@pytest.mark.parametrize(
    ("name", "part"),
    [("layers.{}", "all 8 keys match after --rename 'layers.*=blocks.*'"), ("l{}.x.y", "; ckpt align EXPECTED FOUND")],
)
def test_shared_keys_hide_no_hint(name: str, part: str) -> None:
    """Where some keys match, and many others have the shapes of unexpected ones, a rename or ``align`` is named.

    ``merge`` and ``load_into`` name it too.
    """
    expected, found = _blocks("blocks.{}", other={}), _blocks(name, other={})
    (hint,) = diff(expected, found).hints
    assert part in hint.message
    (note,) = plan_merge(expected, found).notes
    assert note.endswith(f"; {hint.message}".replace("EXPECTED FOUND", "BASE DONOR"))


def test_a_load_that_leaves_most_tensors_says_how_to_rename() -> None:
    """``load_into`` says once which rules give the other tensors their names."""
    model = nn.Sequential(*(nn.Linear(2, at + 2) for at in range(3)))
    first = {key: value for key, value in model.state_dict().items() if key.startswith("0.")}
    others = {f"layer.{key}": value for key, value in model.state_dict().items() if key not in first}
    report = load_into(model, first | others, on_missing="keep")
    assert str(report).count("rules=['layer.*=*']") == 1


@pytest.mark.parametrize("shared", [(), ("embed.weight", "norm.weight")], ids=["nothing", "nearly nothing"])
def test_where_one_rename_explains_all_the_answer_is_first(shared: tuple[str, ...]) -> None:
    """A page for 24 lines has the verdict, the rename, ten rows of both sides, and a count of the rest."""
    names = [f"{layer}.{leaf}" for layer in "abcdefghijklmnop" for leaf in ("weight", "bias")]
    expected = {name: TensorInfo(name, "F32", (3,)) for name in (*shared, *names)}
    found = {name: TensorInfo(name, "F32", (3,)) for name in (*shared, *(f"net.{name}" for name in names))}
    lines = str(diff(expected, found)).splitlines()
    assert len(lines) < 24
    assert [line[0] for line in lines if line[:4] in ("-   ", "+   ")] == ["-"] * 5 + ["+"] * 5
    assert lines.index(f"hint: all {len(expected)} keys match after rules=['net.*=*']") < 7
    assert lines[-1] == "and 54 more rows"


def test_a_new_head_gives_no_hint() -> None:
    """A few tensors of one shape on both sides are a new head, which needs no other name."""
    head = {name: {f"{name}.weight": torch.ones(5, 4)} for name in ("head", "fc")}
    result = diff(*(_blocks("blocks.{}", other=head[name]) for name in head))
    assert (len(result.missing), len(result.unexpected), result.hints) == (1, 1, ())
    plan = plan_merge(*(_blocks("blocks.{}", other=head[name]) for name in head))
    assert plan.notes == ()


@pytest.mark.parametrize("prefix", ["mo\x1b[31mdule.", "m\ndule.", "a*b.", "{x}.", "re:a.", "a=b."])
def test_hostile_prefixes_make_no_hostile_hint(prefix: str) -> None:
    """Hints are printable; a prefix with special characters of the pattern language is not suggested."""
    found = renamed(NET, "", prefix)
    result = diff(NET, found)
    for hint in result.hints:
        assert hint.message.isprintable()
        assert not hint.rename or diff(NET, found, [hint.rename]).loads_strict


class Counter(nn.Module):
    """Has the buffers of batch norm, but is another class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


def test_only_batch_norm_fills_in_its_counter() -> None:
    """Batch norm loads strictly without its counter, as saved before 0.4.1; a similar class does not."""
    found = described(running_mean=(2,), running_var=(2,))
    model = nn.BatchNorm1d(2, affine=False)
    norm = diff(model, found)
    assert ([info.key for info in norm.missing], norm.loads_strict) == (["num_batches_tracked"], True)
    state = model.state_dict()  # it carries its version, so torch knows that the counter should be there
    del state["num_batches_tracked"]
    assert not diff(model, state).loads_strict
    assert not diff(Counter(), described(running_mean=(2,))).loads_strict


def test_a_submodule_set_to_none_hides_its_keys() -> None:
    """After ``model.fc = None`` torch ignores ``fc.weight``: the key is unexpected but loads strictly."""
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
    """torch raises in both modes for a value that it cannot copy."""
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


def test_an_unexpected_value_that_is_not_a_tensor_is_unexpected_too() -> None:
    """In strict mode torch raises for every unexpected key, even if its value is not a tensor."""
    model = nn.Linear(1, 1)
    result = diff(model, {**model.state_dict(), "epoch": 3})
    assert (result.foreign, result.loads, result.loads_strict, result.different) == (("epoch",), True, False, True)


def test_an_optimizer_state_fits_itself_and_its_options_are_not_compared(tmp_path: Path) -> None:
    """Options such as lr are values of both sides, so they are not unexpected; a note says who compares them."""
    model = nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    result = diff(tmp_path / "optimizer.pt", tmp_path / "optimizer.pt", values=True)
    assert (len(result.matched), result.foreign, result.different) == (6, (), False)
    assert "were not compared: ckpt optim diff compares the options of an optimizer" in result.notes[0]


def test_a_key_that_is_not_a_string_is_refused() -> None:
    """load_state_dict fails for such a key too."""
    with pytest.raises(CkptkitError, match="1 is not a string"):
        diff(nn.Linear(1, 1), {1: torch.ones(1)})  # type: ignore[arg-type]


def test_a_model_and_a_mapping_in_memory_are_named_once() -> None:
    """A header line has no role twice, a dict of tensors is not called a model, and found names stand in a column."""
    model = nn.Linear(3, 2)
    page = str(diff(model, {"m.weight": torch.ones(2, 30), "m.bias": torch.ones(1)}, ["m.*=*"])).splitlines()
    assert page[0].startswith("expected  live model, 2 tensors")
    assert page[1].startswith("found     state_dict, 2 tensors")
    assert len({line.index("  as m.") for line in page if "  as m." in line}) == 1
    assert str(run_checks({"w": torch.ones(2)})).startswith("checkpoint: no findings; held in memory")


def test_strip_auto_names_the_whole_prefix_that_the_model_lacks() -> None:
    """Its note agrees with the hint, and says nothing where all keys of the model begin with the same module."""
    state = {"a.weight": torch.ones(2), "b.weight": torch.ones(3)}
    rules = ckptkit.parse_rules(strip=["auto"])
    wrapped = {f"student.net.{key}": tensor for key, tensor in state.items()}
    (_, note) = ckptkit.diff(state, wrapped, rules).notes
    assert note.endswith("--strip 'student.net.' removes it")
    assert ckptkit.diff(state, wrapped, ckptkit.parse_rules(strip=["student.net."])).loads_strict
    assert len(ckptkit.diff(wrapped, wrapped, rules).notes) == 1
