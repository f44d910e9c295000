"""Plan files are applied again and inverted, and refused for inputs that changed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptkit import execute, plan_merge, plan_remap
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import CkptkitError, PlanError
from ckptkit.plans.saved import SavedPlan, apply_plan, header_digest, invert_plan, plan_from_json, plan_to_json
from ckptkit.rules.parse import parse_rules
from tests.helpers_cli import run_ckpt

State = dict[str, torch.Tensor]
RULES = """
[[rule]]
from = "h.{i:int}.qkv.*"
to = ["l.{i}.q.*", "l.{i}.k.*", "l.{i}.v.*"]
op = { split = { dim = 0, sizes = [4, 2, 2] } }
[[rule]]
from = "e.{n:int}.w"
to = "experts"
op = ["stack", { permute = { dims = [0, 2, 1] } }]
[[rule]]
from = "a.*"
to = "b.*"
[[rule]]
from = "b.*"
to = "a.*"
"""


def state() -> State:
    made = {
        f"h.{layer}.qkv.{leaf}": torch.randn(8, 3)[:, : 3 if leaf == "w" else 1] for layer in (0, 1) for leaf in "wb"
    }
    made |= {f"e.{n}.w": torch.randn(2, 5) for n in range(11)}
    return {key: value.contiguous() for key, value in made.items()} | {"a.x": torch.ones(2), "b.x": torch.zeros(3)}


def saved(plan: Any, source: State) -> SavedPlan:
    """Return the plan after it was written as JSON and read again."""
    return plan_from_json(json.loads(json.dumps(plan_to_json(plan, {"source": as_checkpoint(source, "source")}))))


def apply_and_invert(source: State, rules: str, tmp_path: Path) -> State:
    """Return the output of the inverse plan on the plan's output, read by safetensors."""
    plan = plan_remap(source, parse_rules(file=tomllib.loads(rules)))
    execute(plan, source, tmp_path / "there.safetensors")
    written = load_file(tmp_path / "there.safetensors")
    restored = apply_plan(invert_plan(saved(plan, source)), {"source": as_checkpoint(written, "source")})
    execute(restored, written, tmp_path / "back.safetensors")
    return load_file(tmp_path / "back.safetensors")


def assert_same(found: State, expected: State) -> None:
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(found[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key


def test_a_plan_is_the_same_after_it_was_a_file(tmp_path: Path) -> None:
    """A saved plan writes the same bytes when it is applied to the same input."""
    source = state()
    plan = plan_remap(source, parse_rules(file=tomllib.loads(RULES)), dtype="BF16")
    again = apply_plan(saved(plan, source), {"source": as_checkpoint(source, "source")})
    assert again == plan
    execute(plan, source, tmp_path / "a.safetensors")
    execute(again, source, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_plan_is_inverted_bit_by_bit(tmp_path: Path) -> None:
    """The inverse restores splits, stacks and swaps without the text of a rule."""
    source = state()
    assert_same(apply_and_invert(source, RULES, tmp_path), source)


@given(order=st.permutations([f"k{n}" for n in range(6)]), parts=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_any_renaming_with_a_split_is_inverted(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], parts: int
) -> None:
    """The inverse restores the source of any permutation of keys."""
    source = {f"k{n}": torch.randn(n + 1) for n in range(6)} | {"fused": torch.randn(4 * parts)}
    renames = "".join(f'[[rule]]\nfrom = "k{n}"\nto = "{name}"\n' for n, name in enumerate(order))
    names = json.dumps([f"part{n}" for n in range(parts)])
    rules = renames + f'[[rule]]\nfrom = "fused"\nto = {names}\nop = {{ split = {{ dim = 0, parts = {parts} }} }}'
    assert_same(apply_and_invert(source, rules, tmp_path_factory.mktemp("undo")), source)


LOSSY: dict[str, tuple[str, dict[str, Any], str]] = {
    "dropped": ('[[rule]]\nfrom = "a.x"\ndrop = true', {}, "'a.x' was dropped"),
    "cast": ("", {"dtype": "BF16"}, "was cast from F32 to BF16"),
    "a part dropped": (
        (
            '[[rule]]\nfrom = "a.x"\nto = ["y", "z"]\nop = { split = { dim = 0, parts = 2 } }\n'
            '[[stage]]\n[[stage.rule]]\nfrom = "z"\ndrop = true'
        ),
        {},
        "and the output lacks some of them",
    ),
    "sliced": ('[[rule]]\nfrom = "a.x"\nto = "y"\nop = { slice = { stop = 1 } }', {}, "which has no inverse"),
    "taken by another": (
        '[[rule]]\nfrom = "{n}.x"\nto = "x"\non_collision = "first"', {}, "'b.x' was dropped ('a.x' gets the name 'x')"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "options", "reason"), LOSSY.values(), ids=LOSSY.keys())
def test_lossy_steps_are_named(rules: str, options: dict[str, Any], reason: str) -> None:
    source = {"a.x": torch.ones(2), "b.x": torch.zeros(3)}
    plan = plan_remap(source, parse_rules(file=tomllib.loads(rules)), **options)
    with pytest.raises(PlanError, match="cannot be inverted") as caught:
        invert_plan(saved(plan, source))
    assert reason in caught.value.reason


def test_a_merge_is_not_inverted() -> None:
    """The output of a merge lacks the values that were replaced."""
    one = as_checkpoint({"w": torch.zeros(2), "v": torch.zeros(1)}, "base")
    two = as_checkpoint({"w": torch.ones(2)}, "donor")
    document = plan_to_json(plan_merge(one, two), {"base": one, "donor": two})
    with pytest.raises(PlanError, match="the plan merges checkpoints"):
        invert_plan(plan_from_json(document))
    assert apply_plan(plan_from_json(document), {"base": one, "donor": two}) == plan_merge(one, two)


CHANGED: dict[str, tuple[State, str]] = {
    "another shape": ({"w": torch.zeros(3)}, "'w' is F32 [3], and was F32 [2]"),
    "another dtype": ({"w": torch.zeros(2, dtype=torch.float64)}, "'w' is F64 [2], and was F32 [2]"),
    "gone": ({"v": torch.zeros(2)}, "'w' is missing"),
    "one more": ({"w": torch.zeros(2), "v": torch.zeros(2)}, "a set of 2 tensors"),
}


@pytest.mark.parametrize(("changed", "reason"), CHANGED.values(), ids=CHANGED.keys())
def test_a_changed_source_is_refused(changed: State, reason: str) -> None:
    source = {"w": torch.zeros(2)}
    with pytest.raises(PlanError, match="is not the input that the plan was made from") as caught:
        apply_plan(saved(plan_remap(source), source), {"source": as_checkpoint(changed, "source")})
    assert reason in caught.value.reason


def test_the_digest_is_of_names_dtypes_and_shapes() -> None:
    """The digest depends on names, dtypes and shapes, and not on their order."""
    infos = [TensorInfo("a", "F32", (1, 2)), TensorInfo("b", "F32", (2,))]
    assert header_digest(infos) == header_digest(infos[::-1])
    others = [TensorInfo("a", "F32", (2, 1)), TensorInfo("a", "F16", (1, 2)), TensorInfo("c", "F32", (1, 2))]
    assert len({header_digest([info, infos[1]]) for info in (infos[0], *others)}) == 4


def broken(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Return the document with one place changed; ``plan.0.key`` is a path."""
    made: Any = json.loads(json.dumps(document))
    level = made
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        level = level[part]
    level[last] = value
    return dict(made)


BROKEN: dict[str, tuple[str, object]] = {
    "schema": ("schema", "ckptkit.plan/9"),
    "no steps": ("plan", None),
    "a key that is a number": ("plan.0.key", 1),
    "a shape of text": ("plan.0.shape", ["x"]),
    "no sources": ("plan.0.sources", []),
    "another operation": ("plan.0.operation", "copy"),
    "an unknown operation": ("plan.0.recipe.operations", [{"explode": {}}]),
    "no operations": ("plan.0.recipe.operations", []),
    "an input that is not there": ("plan.0.recipe.inputs", [7]),
    "a part that is not made": ("plan.0.recipe.part", 9),
    "another shape": ("plan.0.shape", [9, 9]),
    "a source that is not there": ("plan.0.sources.0.key", "none"),
    "a shape beyond numbers": ("plan.0.shape", [float("inf")]),
    "a shape below zero": ("plan.0.shape", [-1, -2]),
    "a part between two": ("plan.0.recipe.part", 0.5),
    "a part of text": ("plan.0.recipe.part", "0"),
    "a version that is none": ("versions", {"": 1e400}),
    "an input that is not given": (
        "plan.0.sources",
        [{"role": role, "key": "w", "dtype": "F32", "shape": [1]} for role in ("source", "donor")],
    ),
    "very many parts": ("plan.0.recipe.operations", [{"split": {"parts": 10**12}}, "concat"]),
}


@pytest.mark.parametrize(("path", "value"), BROKEN.values(), ids=BROKEN.keys())
def test_a_plan_with_a_wrong_edit_is_refused(path: str, value: object) -> None:
    """A plan file with a wrong edit is refused with an error, never with a traceback."""
    source = {"fused": torch.zeros(4, 2), "w": torch.zeros(1)}
    rules = parse_rules(file={"rule": [{"from": "fused", "to": "t", "op": "transpose"}]})
    checkpoint: Checkpoint = as_checkpoint(source, "source")
    document = plan_to_json(plan_remap(checkpoint, rules), {"source": checkpoint})
    with pytest.raises(CkptkitError):
        apply_plan(plan_from_json(broken(document, path, value)), {"source": checkpoint})


@pytest.mark.parametrize("depth", [100, 300])
def test_very_deep_recipes_are_refused(depth: int) -> None:
    source = {"w": torch.zeros(2, 2)}
    document = plan_to_json(plan_remap(source), {"source": as_checkpoint(source, "source")})
    recipe: object = 0
    for _ in range(depth):
        recipe = {"inputs": [recipe], "operations": [{"transpose": {}}], "part": 0}
    with pytest.raises(PlanError, match="not a valid plan"):
        plan_from_json(broken(document, "plan.0.recipe", recipe))


def test_inputs_in_another_order_are_restored(tmp_path: Path) -> None:
    """The plan was edited to join the second tensor before the first; its inverse restores both."""
    source = {"a": torch.zeros(2), "b": torch.ones(2)}
    roles = {"source": as_checkpoint(source, "source")}
    joined = plan_remap(source, parse_rules(file={"rule": [{"from": ["a", "b"], "to": "c", "op": "concat"}]}))
    edited = plan_from_json(broken(plan_to_json(joined, roles), "plan.0.recipe.inputs", [1, 0]))
    execute(apply_plan(edited, roles), source, tmp_path / "c.safetensors")
    written = load_file(tmp_path / "c.safetensors")
    assert written["c"].tolist() == [1, 1, 0, 0]
    restored = apply_plan(invert_plan(edited), {"source": as_checkpoint(written, "source")})
    execute(restored, written, tmp_path / "back.safetensors")
    assert_same(load_file(tmp_path / "back.safetensors"), source)


def test_a_plan_that_lacks_a_tensor_is_not_inverted() -> None:
    """The digest shows that the plan does not restore every tensor of the source."""
    source = {"a": torch.zeros(2), "b": torch.ones(2)}
    document = plan_to_json(plan_remap(source), {"source": as_checkpoint(source, "source")})
    del document["plan"][1]
    with pytest.raises(PlanError, match="does not name every tensor"):
        invert_plan(plan_from_json(document))


def test_the_versions_of_modules_are_restored(tmp_path: Path) -> None:
    """A model may convert values that have no version, so the inverse restores the versions."""
    source = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    plan = plan_remap(source, ["{i:int}.*=layers.{i}.*"])
    execute(plan, source, tmp_path / "there.pt")
    written = torch.load(tmp_path / "there.pt")
    restored = apply_plan(invert_plan(saved(plan, source)), {"source": as_checkpoint(written, "source")})
    assert restored.versions == {"": 1, "0": 1, "1": 2}


def test_a_dropped_copy_is_no_loss(tmp_path: Path) -> None:
    source = {"a": torch.arange(2.0)}
    rules = '[[rule]]\nfrom = "a"\nto = ["x", "y"]\n[[stage]]\nkeep = "y"'
    assert_same(apply_and_invert(source, rules, tmp_path), source)


def test_a_cast_of_one_output_is_named() -> None:
    """A cast of one output of a split makes the whole split lossy."""
    source = {"f": torch.zeros(2)}
    split = parse_rules(file={"rule": [{"from": "f", "to": ["x", "y"], "op": {"split": {"parts": 2}}}]})
    plan = plan_remap(source, split, like={"x": torch.zeros(1), "y": torch.zeros(1, dtype=torch.float16)})
    with pytest.raises(PlanError, match="'y' was cast from F32 to F16"):
        invert_plan(saved(plan, source))


def test_plans_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--plan`` writes a plan, ``--apply`` repeats it, ``--invert`` inverts it, ``--verify`` checks the output."""
    source, rules, plan = tmp_path / "in.safetensors", tmp_path / "rules.toml", tmp_path / "plan.json"
    written, again, restored = (tmp_path / f"{name}.safetensors" for name in ("there", "again", "back"))
    save_file(state(), source)
    rules.write_text(RULES, encoding="utf-8")
    ran = run_ckpt(capsys, "remap", source, "-o", written, "--rules", rules, "--plan", plan, "--verify")
    assert (ran.code, "verified by safetensors" in ran.err) == (0, True), ran.err
    assert run_ckpt(capsys, "remap", source, "-o", again, "--apply", plan).code == 0
    assert again.read_bytes() == written.read_bytes()
    assert run_ckpt(capsys, "remap", written, "-o", restored, "--invert", plan).code == 0
    assert_same(load_file(restored), load_file(source))
    ran = run_ckpt(capsys, "remap", written, "-o", restored, "--force", "--apply", plan)
    assert (ran.code, "the source is not the input that the plan was made from" in ran.err) == (2, True)
    ran = run_ckpt(capsys, "remap", source, "-o", tmp_path / "n.pt", "--rules", rules, "--plan", plan, "--dry-run")
    assert (ran.code, f"{plan}: already exists" in ran.err) == (2, True)
    ran = run_ckpt(capsys, "remap", source, "-o", restored, "--apply", plan, "--rename", "a.*=c.*")
    assert (ran.code, "give nothing else" in ran.err) == (2, True)


def test_like(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has exactly the keys, the order, the shapes and the dtypes of EXPECTED."""
    wanted = {"b": torch.zeros(2, dtype=torch.bfloat16), "a": torch.zeros(3)}
    save_file(wanted, tmp_path / "wanted.safetensors")
    save_file({"m.a": torch.ones(3), "m.b": torch.ones(2), "m.c": torch.ones(1)}, tmp_path / "in.safetensors")
    arguments: list[str | Path] = [
        tmp_path / "in.safetensors",
        "-o",
        tmp_path / "o.pt",
        "--like",
        tmp_path / "wanted.safetensors",
    ]
    ran = run_ckpt(capsys, "remap", *arguments)
    assert (ran.code, "2 of 2 tensors cannot be filled" in ran.err) == (2, True)
    assert "'b' is missing" in ran.err
    ran = run_ckpt(capsys, "remap", *arguments, "--rename", "m.*=*")
    assert ran.code == 0, ran.err
    assert "m.c" in ran.err
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    with_dtypes = {key: (value.dtype, value.shape) for key, value in found.items()}
    assert with_dtypes == {key: (value.dtype, value.shape) for key, value in wanted.items()}
    save_file({"a": torch.ones(3), "b": torch.ones(4)}, tmp_path / "in.safetensors")
    ran = run_ckpt(capsys, "remap", *arguments, "--force")
    assert (ran.code, "'b' is [4] and should be [2]" in ran.err) == (2, True)
