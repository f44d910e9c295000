"""A plan gives its tensors, may be edited and pickled, and is checked again before it is used."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit import Plan, PlanError, execute, open_checkpoint, plan_merge, plan_remap
from ckptkit.core.frozen import FrozenDict
from ckptkit.plans.plan import Source, Step
from ckptkit.plans.saved import apply_plan, plan_from_json, plan_to_json
from tests.test_wrong_arguments import WRONG

LENET = "fixtures/lenet_10class.pth"


def tied_state() -> dict[str, torch.Tensor]:
    """Return a state_dict with a tie, a transposed view, two views that overlap, and integers."""
    base = torch.randn(6, 4)
    state = {"emb.weight": base, "head.weight": base, "t": base.T, "a": base[:3], "b": base[2:], "n": torch.arange(3)}
    return {**state, "qkv": torch.randn(6, 2)}


PLANS: dict[str, Callable[[Any], Plan]] = {
    "renamed": lambda source: plan_remap(source, ["emb.*=x.emb.*"]),
    "cast": lambda source: plan_remap(source, dtype="BF16"),
    "copied": lambda source: plan_remap(source, {"rule": [{"from": "qkv", "to": ["q", "again"]}]}),
    "computed": lambda source: plan_remap(
        source, {"rule": [{"from": "qkv", "to": ["q", "k", "v"], "op": {"split": {"parts": 3}}}]}
    ),
    "computed and cast": lambda source: plan_remap(
        source, {"rule": [{"from": "t", "to": "t", "op": ["transpose"]}]}, dtype="float16"
    ),
}


@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS.keys())
def test_the_tensors_are_those_that_execute_writes(make: Callable[[Any], Plan], tmp_path: Path) -> None:
    """Torch's own loader reads the same keys, values, dtypes and ties from the output of ``execute``."""
    torch.save(tied_state(), tmp_path / "in.pt")
    with open_checkpoint(tmp_path / "in.pt") as source:
        plan = make(source)
        execute(plan, source, tmp_path / "out.pt")
        found, streamed = plan.materialize(source), dict(plan.tensors(source))
    expected = torch.load(tmp_path / "out.pt")
    for state in (found, streamed):
        assert list(state) == list(expected)
        for key, tensor in expected.items():
            assert state[key].dtype == tensor.dtype
            assert torch.equal(state[key], tensor), key
    for key, tensor in expected.items():  # a write shows in the same other tensors
        tensor.fill_(3)
        found[key].fill_(3)
        assert all(torch.equal(found[other], value) for other, value in expected.items()), key
        streamed[key].fill_(0)
        assert all(bool(streamed[other].count_nonzero()) for other in list(expected)[list(expected).index(key) + 1 :])


def test_sources_are_taken_as_execute_takes_them(tmp_path: Path) -> None:
    """A path, a Checkpoint, a model and a dict by role give the same tensors; paths are closed."""
    model = torch.nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    path = tmp_path / "m.safetensors"
    plan = plan_merge(model, path)
    with open_checkpoint(path) as opened:
        given: list[Any] = [{"base": model, "donor": path}, {"base": str(path), "donor": opened}]
        for sources in given:
            assert torch.equal(plan.materialize(sources)["weight"], model.weight)
            assert torch.equal(dict(plan.tensors(sources))["bias"], model.bias)
    both = plan_merge({**model.state_dict(), "more": torch.ones(1)}, path)
    with pytest.raises(PlanError, match="the plan reads donor, base"):
        both.materialize(path)
    assert torch.equal(plan_remap(path, ["*=fc.*"]).materialize(path)["fc.bias"], model.bias)


def test_wrong_roles_and_a_plan_without_steps_are_named() -> None:
    """A dict by role is not taken for a state_dict, and an empty plan does not ask for an input."""
    plan = plan_remap(STATE)
    with pytest.raises(PlanError, match=r"the plan reads source, and sources has donor \(pass sources={role"):
        plan.materialize({"donor": STATE})
    with pytest.raises(PlanError, match="the plan writes no tensor"):
        replace(plan, steps=()).materialize(STATE)


def test_module_versions_go_along() -> None:
    """The result loads into a BatchNorm as torch's own state_dict does: with the version of the module."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    state = plan_remap(model).materialize(model, device="cpu")
    assert state._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert plan_remap(model).materialize(model, device="meta")["0.weight"].is_meta


def test_an_overflow_is_refused_as_in_execute(tmp_path: Path) -> None:
    """Without ``allow_overflow`` no inf is given out; tensors before it are."""
    state = {"fine": torch.ones(2), "big": torch.tensor([1e30])}
    plan = plan_remap(state, dtype="F16")
    reasons = []
    for use in (plan.materialize, lambda sources: execute(plan, sources, tmp_path / "a.pt")):
        with pytest.raises(PlanError) as caught:
            use(state)
        reasons.append(caught.value.reason)
    stream = plan.tensors(state)
    assert next(stream)[0] == "fine"
    with pytest.raises(PlanError) as caught:
        next(stream)
    assert reasons == [caught.value.reason] * 2
    assert plan.materialize(state, allow_overflow=True)["big"].isinf().all()
    assert dict(plan.tensors(state, allow_overflow=True))["big"].isinf().all()


def test_two_names_for_different_bytes_are_refused() -> None:
    """Where rules give two tensors one key, their bytes are compared, as in ``execute``."""
    same, other = ({"a.w": torch.ones(2), "b.w": torch.full((2,), value)} for value in (1.0, 0.0))
    plan = plan_remap(same, {"rule": [{"from": "{x}.w", "to": "w", "on_collision": "equal"}]})
    assert torch.equal(plan.materialize(same)["w"], torch.ones(2))
    with pytest.raises(PlanError, match="their bytes differ"):
        plan.materialize(other)
    with pytest.raises(PlanError, match="their bytes differ"):
        list(plan.tensors(other))


STATE = {"w": torch.arange(6.0).view(2, 3), "v": torch.ones(2), "n": torch.arange(2)}


def edited(plan: Plan, number: int, **changes: Any) -> Plan:
    """Return the plan with fields of one step changed; ``dtype`` and ``shape`` are those of the output."""
    step = plan.steps[number]
    out = replace(step.out, **{name: changes.pop(name) for name in ("dtype", "shape", "key") if name in changes})
    steps = list(plan.steps)
    steps[number] = replace(step, out=out, **changes)
    return replace(plan, steps=tuple(steps))


SPLIT = {"rule": [{"from": "w", "to": ["a", "b"], "op": {"split": {"parts": 2}}}]}
EDITS: dict[str, tuple[Callable[[], Plan], str]] = {
    "an unknown key": (
        lambda: edited(plan_remap(STATE), 0, sources=(Source("source", "x"),)), "'x' is not in the source",
    ),
    "an unknown role": (
        lambda: edited(plan_remap(STATE), 0, sources=(Source("donor", "w"),)), "the plan reads donor, source",
    ),
    "another shape": (lambda: edited(plan_remap(STATE), 0, shape=(3, 2)), "'w' would be [2, 3], and is [3, 2]"),
    "a cast without a name": (lambda: edited(plan_remap(STATE), 0, dtype="F16"), "'w' would be F32, and is F16"),
    "a cast that says copy": (
        lambda: edited(plan_remap(STATE), 0, dtype="F16", is_cast=True), "the operation of 'w' is 'cast', and the plan",
    ),
    "a cast that is none": (
        lambda: edited(plan_remap(STATE), 0, operation="cast", is_cast=True), "the operation of 'w' is 'copy', and",
    ),
    "two steps with one key": (
        lambda: edited(plan_remap(STATE), 1, key="w"), "the plan writes two tensors with the same key, 'w'",
    ),
    "the shape of another recipe": (
        lambda: edited(plan_remap(STATE, SPLIT), 0, shape=(2, 3)), "'a' would be [1, 3], and is [2, 3] in the plan",
    ),
    "a recipe for another source": (
        lambda: edited(plan_remap(STATE, SPLIT), 0, sources=(Source("source", "v"),)),
        "'a' would be [1], and is [1, 3] in the plan",
    ),
    "a recipe that refuses the source": (
        lambda: edited(plan_remap({**STATE, "s": torch.ones(3, 3)}, SPLIT), 0, sources=(Source("source", "s"),)),
        "the plan cannot make 'a'",
    ),
    "equals of another shape": (
        lambda: edited(plan_remap(STATE), 0, equals=(Source("source", "v"),)), "'v' is F32 [2] and cannot equal 'w'",
    ),
    "a cast that torch does not have": (
        lambda: edited(plan_remap(STATE), 0, dtype="F4", operation="cast", is_cast=True), "cannot be cast to F4",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), EDITS.values(), ids=EDITS.keys())
def test_an_edited_plan_is_checked(make: Callable[[], Plan], reason: str, tmp_path: Path) -> None:
    """What an edit broke is named in one sentence, before anything is read or written, wherever the plan is used."""
    plan = make()
    sources = {**STATE, "s": torch.ones(3, 3)}
    uses: list[Callable[[], object]] = [
        lambda: execute(plan, sources, tmp_path / "out.safetensors"),
        lambda: plan.materialize(sources),
        lambda: plan.tensors(sources),
    ]
    for use in uses:
        with pytest.raises(PlanError, match=re.escape(reason)):
            use()
    assert list(tmp_path.iterdir()) == []


FIRST = plan_remap(STATE, SPLIT).steps[0]
IMPOSSIBLE: dict[str, Callable[[], object]] = {
    "steps=[None]": lambda: replace(plan_remap(STATE), steps=(None,)),  # type: ignore[arg-type]
    "steps=Step": lambda: replace(plan_remap(STATE), steps=FIRST),  # type: ignore[arg-type]
    "dropped": lambda: replace(plan_remap(STATE), dropped=("w",)),  # type: ignore[arg-type]
    "notes": lambda: replace(plan_remap(STATE), notes="a note"),  # type: ignore[arg-type]
    "metadata": lambda: replace(plan_remap(STATE), metadata={"epoch": 3}),  # type: ignore[dict-item]
    "versions": lambda: replace(plan_remap(STATE), versions=None),  # type: ignore[arg-type]
    "edited_role": lambda: replace(plan_remap(STATE), edited_role=None),  # type: ignore[arg-type]
    "out": lambda: replace(FIRST, out="w"),  # type: ignore[arg-type]
    "key": lambda: replace(FIRST, out=replace(FIRST.out, key=None)),  # type: ignore[arg-type]
    "sources": lambda: replace(FIRST, sources="w"),  # type: ignore[arg-type]
    "no source": lambda: replace(FIRST, sources=()),
    "a copy of two sources": lambda: replace(FIRST, recipe=None, sources=FIRST.sources * 2),
    "a source": lambda: replace(FIRST, sources=(Source("source", 3),)),  # type: ignore[arg-type]
    "equals": lambda: replace(FIRST, equals=("w",)),  # type: ignore[arg-type]
    "rule": lambda: replace(FIRST, rule=None),  # type: ignore[arg-type]
    "recipe": lambda: replace(FIRST, recipe="split"),  # type: ignore[arg-type]
    "a source that is not there": lambda: replace(FIRST, recipe=replace(FIRST.recipe, inputs=(1,))),  # type: ignore[type-var]
    "a source counted from the end": lambda: replace(FIRST.recipe, inputs=(-1,)),  # type: ignore[type-var]
    "an output that is not there": lambda: replace(FIRST.recipe, part=2),  # type: ignore[type-var]
    "an output counted from the end": lambda: replace(FIRST.recipe, part=-1),  # type: ignore[type-var]
    "no operation": lambda: replace(FIRST.recipe, operations=()),  # type: ignore[type-var]
}


@pytest.mark.parametrize("edit", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_an_edit_that_no_input_could_fit_is_refused_at_once(edit: Callable[[], object]) -> None:
    """A field of a wrong type or number is an ``ArgumentError`` of the edit itself, not of a later use."""
    with pytest.raises(ckptkit.ArgumentError):
        edit()


def test_a_plan_without_steps_is_refused() -> None:
    """There is nothing to read or to write."""
    plan = replace(plan_remap(STATE), steps=[])  # type: ignore[arg-type]
    assert plan.steps == ()
    with pytest.raises(PlanError, match="the plan writes no tensor"):
        plan.materialize(STATE)


def test_an_edit_that_fits_is_executed(tmp_path: Path) -> None:
    """Steps may be left out, put in another order, renamed, added and cast."""
    plan = plan_remap(STATE)
    first, second, third = plan.steps
    more = Step(replace(first.out, key="half", dtype="F16"), first.sources, "cast", "by hand", is_cast=True)
    plan = replace(plan, steps=(third, replace(first, out=replace(first.out, key="x")), more))
    execute(plan, STATE, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        "n": torch.int64, "x": torch.float32, "half": torch.float16,
    }  # fmt: skip
    assert torch.equal(found["half"], STATE["w"].half())
    assert second.out.key not in found


def test_a_plan_takes_views_from_the_inputs_that_it_gets(tmp_path: Path) -> None:
    """An edited source, and an input with the same tensors at other places, give the bytes of that tensor."""
    base = torch.arange(24.0)
    views = {"a": base[:6].view(2, 3), "b": base[4:10].view(3, 2).T, "c": torch.arange(100.0, 106).view(3, 2).T}
    torch.save(views, tmp_path / "views.pt")
    save_file({key: tensor.contiguous() for key, tensor in views.items()}, tmp_path / "plain.safetensors")
    plan = plan_remap(tmp_path / "views.pt")
    for name in ("views.pt", "plain.safetensors"):
        for key, wanted in views.items():
            taken = tuple(replace(step, sources=(Source("source", key),)) for step in plan.steps)
            found = replace(plan, steps=taken).materialize(tmp_path / name)
            assert all(torch.equal(tensor, wanted) for tensor in found.values()), (name, key)
            execute(replace(plan, steps=taken), tmp_path / name, ckptkit.choose_output(tmp_path / "out.pt", force=True))
            assert all(torch.equal(tensor, wanted) for tensor in torch.load(tmp_path / "out.pt").values()), key
        found = pickle.loads(pickle.dumps(plan)).materialize(tmp_path / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in views.items()), name


def test_a_plan_file_is_checked_alike() -> None:
    """A contradiction in a plan file is refused with the same words as one in an edited plan."""
    with ckptkit.open_checkpoint(LENET) as source:
        document = plan_to_json(plan_remap(source), {"source": source})
        document["plan"][0]["shape"] = [1]
        with pytest.raises(PlanError, match=re.escape("'conv1.weight' would be [6, 3, 5, 5], and is [1] in the plan")):
            apply_plan(plan_from_json(document), {"source": source})


VALUES: dict[str, Callable[[], object]] = {
    "plan": lambda: plan_remap(LENET, ["*=x.*"], dtype="F16"),
    "plan of a model": lambda: plan_remap(torch.nn.BatchNorm1d(2)),
    "plan with a recipe": lambda: plan_remap(STATE, SPLIT),
    "merge": lambda: plan_merge(LENET, "fixtures/lenet_ddp.pt", ["module.*=*"]),
    "diff": lambda: ckptkit.diff(LENET, "fixtures/lenet_ddp.pt"),
    "report": lambda: ckptkit.run_checks(LENET),
    "stats": lambda: ckptkit.stats(LENET),
    "rules": lambda: ckptkit.preset_rules(ckptkit.preset_names()[0]),
    "spec": lambda: ckptkit.param_group_preset("no-decay", torch.nn.Linear(2, 2), lr=1e-3),
    "output": lambda: ckptkit.choose_output("a.pt"),
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())
def test_values_can_be_pickled_and_copied(make: Callable[[], object]) -> None:
    """What comes back from a pickle or a deep copy equals the value."""
    value = make()
    assert pickle.loads(pickle.dumps(value, protocol=5)) == value
    assert copy.deepcopy(value) == value


def test_a_pickled_plan_is_executed(tmp_path: Path) -> None:
    """The plan that comes back writes the same bytes."""
    plan = plan_remap(LENET, ["*=x.*"], dtype="F16")
    execute(plan, LENET, tmp_path / "a.safetensors")
    execute(pickle.loads(pickle.dumps(plan)), LENET, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_frozen_dict_is_a_copy_that_cannot_be_changed() -> None:
    """It equals the dict that it was made from, and does not follow it."""
    items = {"a": 1}
    frozen: Mapping[str, int] = FrozenDict(items)
    items["b"] = 2
    assert (frozen, dict(frozen), len(frozen), repr(frozen)) == ({"a": 1}, {"a": 1}, 1, "{'a': 1}")
    with pytest.raises(TypeError):
        frozen["a"] = 2  # type: ignore[index]


METHODS: dict[str, dict[str, Any]] = {
    "state_dict": {"device": None, "dtype": None, "keys": None},
    "read": {"key": "fc3.bias", "rows": None},
    "numpy": {"key": "fc3.bias", "rows": None},
    "tensors": {"sources": LENET, "allow_overflow": False},
    "materialize": {"sources": LENET, "device": "cpu", "allow_overflow": False},
}


@pytest.mark.parametrize(("method", "good"), METHODS.items(), ids=METHODS.keys())
def test_wrong_arguments_of_methods_are_refused(method: str, good: dict[str, Any]) -> None:
    """With one wrong argument a method works, or raises an error of ckptkit; an unknown key is a ``KeyError``."""
    raw = []
    with open_checkpoint(LENET) as checkpoint:
        call = getattr(plan_remap(LENET) if "sources" in good else checkpoint, method)
        for name in good.keys() - {"key"}:
            for kind, wrong in WRONG.items():
                try:
                    call(**{**good, name: wrong()})
                except (ckptkit.CkptkitError, KeyError):
                    pass
                except Exception as error:  # noqa: BLE001 - every other error is what this test looks for
                    raw.append(f"{name}={kind}: {error!r}")
    assert raw == []
