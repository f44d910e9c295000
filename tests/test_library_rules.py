"""Steps of a conversion become few rules that do exactly these steps; the library itself is in the oracles."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit import execute, load_rules, plan_remap
from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.transformers.operations import Conversion, Lookup, follow
from ckptkit.rules.transformers.patterns import stage_of
from ckptkit.rules.transformers.steps import Step, Trace, in_levels
from ckptkit.tensor_ops.joining import Concat, Split, Stack, Unstack


def rules_of(steps: list[Step], names: list[str]) -> Rules:
    stages = []
    for level in in_levels(steps):
        stages.append(stage_of(level, names, "made"))
        taken = {name for step in level for name in step.inputs}
        names = [name for name in names if name not in taken] + [name for step in level for name in step.outputs]
    return Rules(tuple(stages))


def texts(rules: Rules) -> list[str]:
    return [
        f"{', '.join(source.text for source in rule.sources)} = {', '.join(name.text for name in rule.templates[0])}"
        for stage in rules.stages
        for rule in stage.rules
    ]


def test_layers_become_one_rule() -> None:
    """Steps that differ only in numbers are one rule; a number that decides is written out."""
    names = [f"h.{i}.mlp.{j}.{leaf}" for i in range(12) for j in (0, 2) for leaf in ("weight", "bias")]
    steps = [Step((name,), (f"layers.{i}.{'fc1' if '.mlp.0.' in name else 'fc2'}.{name.rpartition('.')[2]}",))
             for name in names for i in [name.split(".")[1]]]  # fmt: skip
    assert texts(rules_of(steps, names)) == [
        "h.{i:int}.mlp.0.weight = layers.{i}.fc1.weight",
        "h.{i:int}.mlp.0.bias = layers.{i}.fc1.bias",
        "h.{i:int}.mlp.2.weight = layers.{i}.fc2.weight",
        "h.{i:int}.mlp.2.bias = layers.{i}.fc2.bias",
    ]


def test_a_rule_changes_no_key_that_has_no_step() -> None:
    """One of several keys that look alike is renamed; the others stay, and an index can move by a constant."""
    names = ["m.0.w", "m.1.w", "m.2.w", "q.3.w", "q.4.w"]
    rules = rules_of([Step(("m.1.w",), ("m.x.w",)), *(Step((f"q.{i}.w",), (f"p.{i + 1}.w",)) for i in (3, 4))], names)
    assert apply_rules(rules, names).renamed == {
        "m.0.w": "m.0.w", "m.1.w": "m.x.w", "m.2.w": "m.2.w", "q.3.w": "p.4.w", "q.4.w": "p.5.w"
    }  # fmt: skip
    assert "q.{i:int}.w = p.{i+1}.w" in texts(rules)


def test_keys_with_the_signs_of_patterns() -> None:
    """Stars, braces and backslashes in keys are nothing but text."""
    names = ["a*b", "c.{i}.d", "re:x", "e\\1", "plain"]
    new = ["{j}", "c*d", "y\\g<0>", "re:z", "a*b"]
    rules = rules_of([Step((old,), (name,)) for old, name in zip(names, new, strict=True)], names)
    assert apply_rules(rules, names).renamed == dict(zip(names, new, strict=True))


NAMES = st.lists(st.sampled_from(["a", "b", "0", "1", "2", "10", "w1"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_renames_are_done_as_they_are(data: st.DataObject) -> None:
    """Whatever renames are asked for, the rules do these and no others."""
    names = data.draw(st.lists(NAMES, min_size=1, max_size=12, unique=True))
    new = data.draw(st.lists(NAMES, min_size=len(names), max_size=len(names), unique=True))
    wanted = dict(zip(names, new, strict=True))
    chosen = [Step((old,), (name,)) for old, name in wanted.items() if old != name]
    assert apply_rules(rules_of(chosen, names), names).renamed == wanted


def test_experts_are_stacked_and_joined_and_taken_apart() -> None:
    """Twelve experts in each of eleven layers become one tensor a layer, in the order of their numbers, and back."""
    state = {f"l.{i}.e.{e}.{w}": torch.randn(2, 3) for i in range(11) for e in range(12) for w in ("w1", "w3")}
    steps, back = [], []
    for i in range(11):
        trace = Trace(f"m.{i}.e.up", dict.fromkeys(state, (2, 3)))
        stacked = [trace.apply([Stack()], [f"l.{i}.e.{e}.{w}" for e in range(12)])[0] for w in ("w1", "w3")]
        (joined,) = trace.apply([Concat(1)], stacked)
        assert trace.shapes[joined] == (12, 4, 3)
        steps += trace.finish({joined: f"m.{i}.e.up"})
        trace = Trace(f"l.{i}", {f"m.{i}.e.up": (12, 4, 3)})
        halves = trace.apply([Split(1, parts=2)], [f"m.{i}.e.up"])
        parts = {w: trace.apply([Unstack(12)], [half]) for w, half in zip(("w1", "w3"), halves, strict=True)}
        back += trace.finish({name: f"l.{i}.e.{e}.{w}" for w, names in parts.items() for e, name in enumerate(names)})
    rules = rules_of(steps, list(state))
    assert len(texts(rules)) == 3
    plan = plan_remap(state, rules)
    assert [step.out.key for step in plan.steps] == [f"m.{i}.e.up" for i in range(11)]
    made: dict[str, torch.Tensor] = {}
    assert plan.steps[3].recipe is not None
    for i in range(11):
        halves_of = (torch.stack([state[f"l.{i}.e.{e}.{w}"] for e in range(12)]) for w in ("w1", "w3"))
        made[f"m.{i}.e.up"] = torch.cat(list(halves_of), 1)
    inverse = rules_of(back, list(made))
    assert len(texts(inverse)) == 3
    assert {step.out.key for step in plan_remap(made, inverse).steps} == set(state)


def test_the_bytes_are_those_of_torch(tmp_path: object) -> None:
    """A stack of stacks keeps every bit."""
    state = {f"l.{e}.{w}": torch.randn(2, 3) for e in range(3) for w in ("w1", "w3")}
    trace = Trace("up", {})
    stacked = [trace.apply([Stack()], [f"l.{e}.{w}" for e in range(3)])[0] for w in ("w1", "w3")]
    (joined,) = trace.apply([Concat(1)], stacked)
    rules = rules_of(trace.finish({joined: "up"}), list(state))
    path = f"{tmp_path}/out.pt"
    execute(plan_remap(state, rules), state, path)
    wanted = torch.cat([torch.stack([state[f"l.{e}.{w}"] for e in range(3)]) for w in ("w1", "w3")], 1)
    assert torch.equal(torch.load(path)["up"], wanted)


def test_tensors_between_steps_get_names_of_their_own() -> None:
    """A key that is joined with an output of another step is renamed first, so no other key can take its name."""
    trace = Trace("new", {})
    stacked = trace.apply([Stack()], ["a.0", "a.1"])
    joined = trace.apply([Concat()], [*stacked, "b"])
    rules = rules_of(trace.finish({joined[0]: "new"}), ["a.0", "a.1", "b", "c"])
    outputs = apply_rules(rules, ["a.0", "a.1", "b", "c"]).outputs()
    assert outputs["new"].sources == ("a.0", "a.1", "b")
    assert set(outputs) == {"new", "c"}


def test_an_unknown_operation_is_named() -> None:
    """The error has the class of the operation, and a way out."""

    class Fold:
        dim = 0

    conversion = Conversion(["a"], ["b"], "b", Trace("b", {}), Lookup(None, lambda _: None))
    with pytest.raises(RuleError, match="Fold") as caught:
        follow(Fold(), {"a": ["a"]}, conversion)
    assert "from_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["transformers:", "transformers:mixtral:back", "transformers:auto:"])
def test_spellings(text: str) -> None:
    """Only the model type and the direction can be given."""
    with pytest.raises(RuleError, match="not valid"):
        load_rules(text)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuleError, match="not installed") as caught:
        load_rules("transformers:mixtral")
    assert caught.value.hint == "pip install 'ckptkit[transformers]'"
