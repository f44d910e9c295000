"""Rules with operations join and split tensors in one or several stages, or are refused before any tensor is read."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import diff, execute, load_into, plan_merge, plan_remap
from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import parse_rules, rule_lines
from ckptkit.rules.variables import Settings
from tests.helpers_cli import run_ckpt

HEADS, KV, WIDTH = 4, 2, 3
FUSED = """
[vars]
heads = 4
kv = "heads // 2"
hd = 3

[[rule]]
from = "h.{i:int}.qkv.*"
to = ["l.{i+1}.q.*", "l.{i+1}.k.*", "l.{i+1}.v.*"]
op = { split = { dim = 0, sizes = ["heads*hd", "kv*hd", "kv*hd"] } }
"""
EXPERTS = """
[[rule]]
from = "experts.{e:int}.{part}.weight"
to = "experts.{part}"
op = { stack = { dim = 0 } }

[[stage]]
[[stage.rule]]
from = ["experts.w1", "experts.w3"]
to = "experts.gate_up"
op = { concat = { dim = 1 } }
"""


def rules(text: str, **options: Any) -> Rules:
    return parse_rules(file=tomllib.loads(text), lines=rule_lines(text), **options)


def made(state: dict[str, torch.Tensor], text: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return the output of remap, read by safetensors."""
    execute(plan_remap(state, rules(text)), state, tmp_path / "o.safetensors")
    return load_file(tmp_path / "o.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def fused(layers: int = 2) -> dict[str, torch.Tensor]:
    rows = (HEADS + 2 * KV) * WIDTH
    state: dict[str, torch.Tensor] = {"first": torch.zeros(1)}
    for layer in range(layers):
        state[f"h.{layer}.qkv.weight"] = torch.randn(rows, 5)
        state[f"h.{layer}.qkv.bias"] = torch.randn(rows)
    return state | {"last": torch.ones(1)}


def test_one_tensor_becomes_several(tmp_path: Path) -> None:
    """A grouped-query split works with variables in the sizes and arithmetic in the index."""
    state = fused()
    expected = {"first": state["first"], "last": state["last"]}
    for layer in range(2):
        for leaf in ("weight", "bias"):
            parts = state[f"h.{layer}.qkv.{leaf}"].tensor_split([HEADS * WIDTH, (HEADS + KV) * WIDTH])
            expected |= {f"l.{layer + 1}.{name}.{leaf}": part for name, part in zip("qkv", parts, strict=True)}
    assert_equal(made(state, FUSED, tmp_path), expected)


def test_outputs_have_the_position_of_their_first_source() -> None:
    """An output has the position of its first source."""
    plan = plan_remap(fused(1), rules(FUSED))
    assert [step.out.key for step in plan.steps] == [
        "first", "l.1.q.weight", "l.1.k.weight", "l.1.v.weight", "l.1.q.bias", "l.1.k.bias", "l.1.v.bias", "last",
    ]  # fmt: skip
    assert [step.operation for step in plan.steps].count("split") == 6


def test_a_second_pass_works_on_what_the_first_made(tmp_path: Path) -> None:
    """Experts are stacked in numeric order, ten after nine, and then fused."""
    state = {f"experts.{e}.{part}.weight": torch.randn(4, 6) for e in (10, 9, *range(9)) for part in ("w3", "w1")}
    stacks = {part: torch.stack([state[f"experts.{e}.{part}.weight"] for e in range(11)]) for part in ("w1", "w3")}
    assert_equal(made(state, EXPERTS, tmp_path), {"experts.gate_up": torch.cat([stacks["w1"], stacks["w3"]], dim=1)})


def test_a_list_of_names_without_an_operation_copies(tmp_path: Path) -> None:
    """One embedding is copied to two keys."""
    state = {"wte": torch.randn(3, 2), "b": torch.zeros(1)}
    found = made(state, '[[rule]]\nfrom = "wte"\nto = ["embed", "head"]', tmp_path)
    assert_equal(found, {"embed": state["wte"], "head": state["wte"], "b": state["b"]})


def test_a_list_of_patterns_without_an_operation_renames_each() -> None:
    """Two patterns are renamed by one rule."""
    assert dict(apply_rules(rules('[[rule]]\nfrom = ["a.*", "b.*"]\nto = "c.*"'), ["a.x", "b.y"]).renamed) == {
        "a.x": "c.x",
        "b.y": "c.y",
    }


def test_a_chain_of_operations_and_a_cast(tmp_path: Path) -> None:
    """The outputs of an operation are the inputs of the next, and the cast comes last."""
    state = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    text = '[[rule]]\nfrom = ["a", "b"]\nto = "c"\nop = [{ concat = { dim = 0 } }, "transpose"]'
    plan = plan_remap(state, rules(text), dtype="BF16")
    assert [step.operation for step in plan.steps] == ["concat, transpose, cast"]
    execute(plan, state, tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert_equal(found, {"c": torch.cat([state["a"], state["b"]]).T.to(torch.bfloat16)})


def test_a_model_is_compared_merged_and_loaded_through_operations(tmp_path: Path) -> None:
    """diff, merge and load_into use the outputs of the operations."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(5, 4) for name in "qkv"})
    found = {"qkv.weight": torch.randn(12, 5), "qkv.bias": torch.randn(12)}
    text = '[[rule]]\nfrom = "qkv.*"\nto = ["q.*", "k.*", "v.*"]\nop = { split = { dim = 0, parts = 3 } }'
    result = diff(model, found, rules(text))
    assert result.loads_strict
    assert {pair.key for pair in result.matched} == set(model.state_dict())
    plan = plan_merge(model, found, rules(text))
    execute(plan, {"base": model, "donor": found}, tmp_path / "o.safetensors")
    assert load_into(model, found, rules(text)).coverage == 1
    expected = {
        f"{n}.{leaf}": v
        for leaf in ("weight", "bias")
        for n, v in zip("qkv", found[f"qkv.{leaf}"].tensor_split(3), strict=True)
    }
    assert_equal(dict(model.state_dict()), expected)
    assert_equal(load_file(tmp_path / "o.safetensors"), expected)


def test_sources_are_read_once_for_all_their_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bytes of a tensor that is split in three are read once."""
    from ckptkit import open_checkpoint
    from ckptkit.core.checkpoint import Checkpoint

    state = fused(3)
    save_file(state, tmp_path / "in.safetensors")
    read: list[str] = []
    original = Checkpoint.read

    def counted(checkpoint: Checkpoint, key: str) -> torch.Tensor:
        read.append(key)
        return original(checkpoint, key)

    monkeypatch.setattr(Checkpoint, "read", counted)
    with open_checkpoint(tmp_path / "in.safetensors") as source:
        execute(plan_remap(source, rules(FUSED)), source, tmp_path / "o.safetensors")
    assert sorted(read) == sorted(key for key in state if "qkv" in key)


REFUSED: dict[str, tuple[list[str], str, str]] = {
    "a hole": (
        ["e.0.w", "e.2.w"],
        '[[rule]]\nfrom = "e.{e:int}.w"\nto = "e"\nop = "stack"',
        "line 1): 'e' lacks a part: no tensor has e = 1 (2 tensors found)",
    ),
    "a hole of any size": (
        ["e.99999999999999999.w"],
        '[[rule]]\nfrom = "e.{e:int}.w"\nto = "e"\nop = "stack"',
        "no tensor has e = 0 (1 tensor found)",
    ),
    "a hole in two indexes": (
        ["e.0.0", "e.0.1", "e.1.0"],
        '[[rule]]\nfrom = "e.{i:int}.{j:int}"\nto = "e"\nop = "stack"',
        "no tensor has i = 1, j = 1 (3 tensors found)",
    ),
    "the last of one layer": (
        ["h.0.e.0.w", "h.0.e.1.w", "h.1.e.0.w"],
        '[[rule]]\nfrom = "h.{i:int}.e.{e:int}.w"\nto = "h.{i}.e"\nop = "stack"',
        "line 1): 'h.1.e' would be made of 1 {e}, and 'h.0.e' of 2 {e}: a part is missing",
    ),
    "the last of one kind": (
        ["e.0.a", "e.1.a", "e.0.b"],
        '[[rule]]\nfrom = ["e.{e:int}.a", "e.{e:int}.b"]\nto = "e"\nop = "stack"',
        "line 1): 'e' would be made of 2 {e}, and of 1 {e} that match 'e.{e:int}.b': a part is missing",
    ),
    "a part is missing": (
        ["q", "k"],
        '\n[[rule]]\nfrom = ["q", "k", "v"]\nto = "qkv"\nop = { concat = { dim = 0 } }',
        "line 2): 'qkv' would be made of 'q' and of a tensor that matches 'v', but no tensor does",
    ),
    "two for one place": (
        ["a.x", "b.x"],
        '[[rule]]\nfrom = "re:(a|b).x"\nto = "x"\nop = "transpose"',
        "line 1: op cannot have a re: pattern",
    ),
    "gathered over a name": (
        ["e.a.w", "e.b.w"],
        '[[rule]]\nfrom = "e.{e}.w"\nto = "e"\nop = "stack"',
        "gathers over {e}, which is in no new name and is not an index",
    ),
    "an index written twice": (
        ["e.1.w", "e.01.w"],
        '[[rule]]\nfrom = "e.{e:int}.w"\nto = "e"\nop = "stack"',
        "'e.1.w' and 'e.01.w' would have the same place in 'e'",
    ),
    "a collision with an output": (
        ["qkv", "k"],
        '[[rule]]\nfrom = "qkv"\nto = ["q", "k"]\nop = { split = { dim = 0, parts = 2 } }',
        "'qkv' and 'k' would both be called 'k', by rule",
    ),
    "as many names as outputs": (
        ["qkv"],
        '[[rule]]\nfrom = "qkv"\nto = ["q", "k"]\nop = { split = { dim = 0, parts = 3 } }',
        "line 1: split has 3 outputs, and to has 2 names",
    ),
    "an operation on what is dropped": (
        ["a"],
        '[[rule]]\nfrom = "a"\ndrop = true\nop = "transpose"',
        "line 1: op and drop exclude each other",
    ),
    "a policy for collisions": (
        ["a"],
        '[[rule]]\nfrom = "a"\nto = "b"\nop = "transpose"\non_collision = "last"',
        "line 1: op and on_collision exclude each other",
    ),
    "an unknown operation": (["a"], '[[rule]]\nfrom = "a"\nto = "b"\nop = "transpos"', "line 1: there is no operation"),
    "an unbound capture": (
        ["a"],
        '[[rule]]\nfrom = ["a.{i}", "b"]\nto = "c.{i}"\nop = "stack"',
        "line 1: 'c.{i}' uses {i}, which 'b' does not capture",
    ),
    "an unknown variable": (
        ["a"],
        '[vars]\nn = 1\n[[rule]]\nfrom = "a"\nto = "b"\nop = { reshape = { shape = ["m"] } }',
        "line 3: reshape: shape: 'm' uses the unknown variable 'm'",
    ),
}


@pytest.mark.parametrize(("keys", "text", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_rules_are_refused_with_the_line(keys: list[str], text: str, reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        apply_rules(rules(text), keys)
    assert reason in caught.value.reason


def test_shapes_are_checked_before_any_byte_is_read() -> None:
    """The error names the rule, the new key and the shapes."""
    from ckptkit import TensorInfo

    text = '[[rule]]\nfrom = "a"\nto = ["b", "c"]\nop = { split = { dim = 0, sizes = [3, 4] } }'
    with pytest.raises(RuleError) as caught:
        plan_remap({"a": TensorInfo("a", "F32", (6, 2))}, rules(text))
    assert caught.value.reason.startswith("rule 'a=b, c' (line 1): 'b': split: ")
    assert "6" in caught.value.reason


VARIABLES: dict[str, tuple[dict[str, Any], Settings, dict[str, int]]] = {
    "a number": ({"n": 3}, Settings(), {"n": 3}),
    "arithmetic": ({"n": 3, "m": "2*n + 1"}, Settings(), {"n": 3, "m": 7}),
    "set": ({"n": 3, "m": "n*2"}, Settings({"n": "5"}), {"n": 5, "m": 10}),
    "set by arithmetic": ({"n": 3, "m": 1}, Settings({"m": "n*n"}), {"n": 3, "m": 9}),
    "from the configuration": ({"n": "config:a.b"}, Settings(config=lambda: {"a": {"b": 12}}), {"n": 12}),
    "set instead of it": ({"n": "config:a.b"}, Settings({"n": "4"}), {"n": 4}),
}


@pytest.mark.parametrize(("table", "settings", "values"), VARIABLES.values(), ids=VARIABLES.keys())
def test_variables(table: dict[str, Any], settings: Settings, values: dict[str, int]) -> None:
    assert settings.resolve(table) == values


WRONG_VARIABLES: dict[str, tuple[object, Settings, str]] = {
    "no table": (3, Settings(), "vars must be a table"),
    "a float": ({"n": 1.5}, Settings(), "variable n: the value is not an integer"),
    "no configuration": (
        {"n": "config:a"},
        Settings(),
        "variable n: the value is in config.json, but there is no config.json",
    ),
    "not in it": ({"n": "config:a"}, Settings(config=dict), "variable n: config.json has no 'a'"),
    "no integer in it": ({"n": "config:a"}, Settings(config=lambda: {"a": "x"}), "does not have an integer at 'a'"),
    "one that is not there": ({"n": 1}, Settings({"m": "2"}), "the rules have no variable 'm'"),
    "no name": ({"a b": 1}, Settings(), "'a b' is not a valid variable name"),
    "before it is known": ({"n": "m", "m": 1}, Settings(), "uses the unknown variable 'm'"),
}


@pytest.mark.parametrize(("table", "settings", "reason"), WRONG_VARIABLES.values(), ids=WRONG_VARIABLES.keys())
def test_wrong_variables(table: object, settings: Settings, reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        settings.resolve(table)
    assert reason in caught.value.reason


def test_variables_from_the_command_line_and_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``config:`` reads the file beside the checkpoint; ``--set`` replaces its value."""
    text = FUSED.replace("heads = 4", 'heads = "config:text.num_attention_heads"')
    (tmp_path / "rules.toml").write_text(text, encoding="utf-8")
    save_file(fused(1), tmp_path / "in.safetensors")
    arguments: list[str | Path] = [
        "remap",
        tmp_path / "in.safetensors",
        "-o",
        tmp_path / "o.safetensors",
        "--rules",
        tmp_path / "rules.toml",
    ]
    ran = run_ckpt(capsys, *arguments)
    assert (ran.code, "variable heads: the value is in config.json, but there is no config.json" in ran.err) == (
        2,
        True,
    )
    (tmp_path / "config.json").write_text(json.dumps({"text": {"num_attention_heads": 4}}), encoding="utf-8")
    ran = run_ckpt(capsys, *arguments, "--json")
    assert ran.code == 0
    assert {step["operation"] for step in json.loads(ran.out)["plan"]} == {"copy", "split"}
    assert load_file(tmp_path / "o.safetensors")["l.1.q.weight"].shape == (12, 5)
    ran = run_ckpt(capsys, *arguments, "--force", "--set", "heads=5")
    assert ran.code == 2
    assert "(line 7): 'l.1.q.bias': split: dim 0" in ran.err


ACCOUNTED: dict[str, tuple[str, dict[str, str]]] = {
    "a made tensor dropped": (
        '[[rule]]\nfrom = ["a", "b"]\nto = "z"\nop = "stack"\n[[stage]]\n[[stage.rule]]\nfrom = "z"\ndrop = true',
        dict.fromkeys("ab", "made into 'z': drop 'z' (line 6)"),
    ),
    "parts filtered out": (
        '[[rule]]\nfrom = "a"\nto = ["x", "y", "z"]\nop = { split = { parts = 3 } }\n[[stage]]\nkeep = ["b", "c", "y"]',
        {"a": "made into 'x': matches no --keep; made into 'z': matches no --keep"},
    ),
}


@pytest.mark.parametrize(("text", "dropped"), ACCOUNTED.values(), ids=ACCOUNTED.keys())
def test_dropped_outputs_are_listed_by_their_sources(text: str, dropped: dict[str, str]) -> None:
    source = {key: torch.zeros(3) for key in "abc"}
    plan = plan_remap(source, rules(text))
    assert {drop.key: drop.reason for drop in plan.dropped} == dropped


def test_every_source_of_a_dropped_output_is_listed() -> None:
    """Every source of a left-out output is listed, with --like and for each policy of a merge."""
    source = {key: torch.zeros(3) for key in "abc"}
    stack = rules('[[rule]]\nfrom = ["a", "b"]\nto = "z"\nop = "stack"')
    like = plan_remap(source, stack, like={"c": torch.zeros(3)})
    assert [(drop.key, drop.reason) for drop in like.dropped] == [
        (key, "made into 'z': not a key of the checkpoint given as like") for key in "ab"
    ]
    other = plan_merge({"c": torch.zeros(3), "z": torch.zeros(5)}, source, stack, on_mismatch="skip")
    assert [(drop.key, drop.wanted) for drop in other.dropped] == [("a", "z"), ("b", "z")]
    skipped = plan_merge({"c": torch.zeros(3)}, source, stack)
    assert [drop.key for drop in skipped.dropped] == ["a", "b"]
    twice = plan_merge({"z": torch.zeros(2, 3)}, [source, source], stack)
    assert [(drop.role, drop.key) for drop in twice.dropped if "later" in drop.reason] == [
        ("donor1", "a"), ("donor1", "b")
    ]  # fmt: skip


def test_tensors_that_must_be_equal_are_not_inputs_of_operations() -> None:
    """Tensors that must be equal are compared before operations, so they cannot be inputs of one."""
    text = (
        '[[rule]]\nfrom = ["a", "b"]\nto = "x"\non_collision = "equal"\n'
        '[[stage]]\n[[stage.rule]]\nfrom = "x"\nto = "y"\nop = "transpose"'
    )
    with pytest.raises(RuleError, match="but its bytes must be compared first"):
        apply_rules(rules(text), ["a", "b"])


def test_sources_are_read_once_in_any_order_of_their_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sources are read once in plans that alternate between them, and in plans of three stages."""
    from ckptkit.core.checkpoint import Checkpoint

    read: list[str] = []
    original = Checkpoint.read

    def counted(checkpoint: Checkpoint, key: str) -> torch.Tensor:
        read.append(key)
        return original(checkpoint, key)

    state = {"a": torch.randn(4), "b": torch.randn(4), "e": torch.randn(3, 2, 2)}
    monkeypatch.setattr(Checkpoint, "read", counted)
    like = {key: torch.zeros(2) for key in ("a.0", "b.0", "a.1", "b.1")}
    split = {"rule": [{"from": name, "to": [f"{name}.0", f"{name}.1"], "op": {"split": {"parts": 2}}} for name in "ab"]}
    execute(plan_remap(state, parse_rules(file=split), like=like), state, tmp_path / "split.safetensors")
    assert sorted(read) == ["a", "b"]
    read.clear()
    passes = {
        "rule": [{"from": "e", "to": ["e.0", "e.1", "e.2"], "op": {"unstack": {"parts": 3}}}],
        "stage": [
            {"rule": [{"from": "e.{n:int}", "to": "f.{n}", "op": "transpose"}]},
            {"rule": [{"from": "f.{n:int}", "to": "f", "op": "stack"}]},
        ],
    }
    execute(plan_remap(state, parse_rules(file=passes)), state, tmp_path / "passes.safetensors")
    assert read == ["e"]
    assert torch.equal(load_file(tmp_path / "passes.safetensors")["f"], state["e"].transpose(1, 2))


def test_stages_that_double_the_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of sources of one operation is limited, since it can double with each two stages."""
    monkeypatch.setattr("ckptkit.rules.apply._MAX_SOURCES", 1000)  # the time grows with the limit
    apart = {"rule": [{"from": "a", "to": ["b", "c"], "op": {"split": {"parts": 2}}}]}
    together = {"rule": [{"from": ["b", "c"], "to": "a", "op": "concat"}]}
    with pytest.raises(RuleError, match="made of more than 1,000 tensors"):
        apply_rules(parse_rules(file={"stage": [apart, together] * 20}), ["a"])
