"""``ckpt merge --method lora`` folds an adapter of peft into its base, and uses every tensor of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import execute, plan_lora
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import CkptkitError, PlanError
from ckptkit.plans.saved import apply_plan, plan_from_json, plan_to_json
from tests.helpers_cli import Ran, run_ckpt

P = "base_model.model."
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q", "emb"]}
State = dict[str, torch.Tensor]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def base_state(dtype: torch.dtype = torch.float32) -> State:
    shapes = {
        "l.0.q.weight": (6, 4),
        "l.0.q.bias": (6,),
        "l.1.q.weight": (6, 4),
        "emb.weight": (9, 4),
        "head.weight": (3, 6),
    }
    return {key: randn(*shape, seed=seed, dtype=dtype) for seed, (key, shape) in enumerate(shapes.items())}


def adapter_state() -> State:
    return {
        f"{P}l.0.q.lora_A.weight": randn(2, 4, seed=10), f"{P}l.0.q.lora_B.weight": randn(6, 2, seed=11),
        f"{P}l.1.q.lora_A.weight": randn(2, 4, seed=12), f"{P}l.1.q.lora_B.weight": randn(6, 2, seed=13),
        f"{P}emb.lora_embedding_A": randn(2, 9, seed=14), f"{P}emb.lora_embedding_B": randn(4, 2, seed=15),
        f"{P}head.weight": randn(5, 6, seed=16),
    }  # fmt: skip


def folded(base: State, adapter: State, scale: float) -> State:
    """Return the folded weight, computed by torch in F64 and rounded once."""
    made = dict(base)
    for name in ("l.0.q", "l.1.q"):
        down, up = (adapter[f"{P}{name}.lora_{side}.weight"].double() for side in "AB")
        made[f"{name}.weight"] = base[f"{name}.weight"].double() + scale * up @ down
    down, up = (adapter[f"{P}emb.lora_embedding_{side}"].double() for side in "AB")
    made["emb.weight"] = base["emb.weight"].double() + scale * (up @ down).T
    made["head.weight"] = adapter[f"{P}head.weight"]
    return {key: value.to(base[key].dtype) for key, value in made.items()}


def written(tmp_path: Path, base: State, adapter: State, config: dict[str, Any] | None) -> tuple[Path, Path]:
    save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path / "base.safetensors", tmp_path / "adapter"


def fold(capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, *more: str | Path) -> Ran:
    return run_ckpt(
        capsys, "merge", base, adapter, "-o", base.parent / "out.safetensors", "--method", "lora", "--force", *more
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize(
    ("name", "more", "scale"),
    [
        pytest.param("", (), 3.0, id="directory"),
        pytest.param("adapter_model.safetensors", (), 3.0, id="file"),
        pytest.param("", ("--scale", "-0.5"), -1.5, id="scaled"),
    ],
)
def test_an_adapter_is_folded_as_torch_computes_it(
    dtype: torch.dtype, name: str, more: tuple[str, ...], scale: float, request: pytest.FixtureRequest
) -> None:
    """Linear layers, an embedding and a replaced module are folded; other tensors keep every bit."""
    tmp_path, capsys = request.getfixturevalue("tmp_path"), request.getfixturevalue("capsys")
    state, factors = base_state(dtype), adapter_state()
    base, adapter = written(tmp_path, state, factors, CONFIG)
    ran = fold(capsys, base, adapter / name, "--verify", *more)
    assert ran.code == 0, ran.err
    assert "5 tensors, " in ran.err
    assert "3 from base and donor, 1 from donor, 1 from base" in ran.err
    assert ": each of 5 tensors has the planned bytes" in ran.err
    made = load_file(tmp_path / "out.safetensors")
    expected = folded(state, factors, scale)
    assert sorted(made) == sorted(expected)
    for key, value in expected.items():
        assert made[key].dtype == dtype
        torch.testing.assert_close(made[key], value, rtol=1e-6 if dtype is torch.float32 else 0.008, atol=1e-6)
    assert torch.equal(made["l.0.q.bias"], state["l.0.q.bias"])


def test_the_plan_is_shown_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan names the changed weights, their sources and the scale."""
    base, adapter = written(tmp_path, base_state(), adapter_state(), CONFIG)
    ran = fold(capsys, base, adapter, "--dry-run", "--json", "--plan", tmp_path / "plan.json")
    document = json.loads(ran.out)
    steps = {step["key"]: step for step in document["plan"]}
    assert steps["l.0.q.weight"] == {
        "key": "l.0.q.weight", "dtype": "F32", "shape": [6, 4], "operation": "fold_lora", "rule": "lora, scale 3",
        "merge": None,
        "sources": [
            {"role": "base", "key": "l.0.q.weight"}, {"role": "donor", "key": f"{P}l.0.q.lora_A.weight"},
            {"role": "donor", "key": f"{P}l.0.q.lora_B.weight"},
        ],
    }  # fmt: skip
    assert steps["head.weight"]["shape"] == [5, 6]
    assert document["summary"]["by_source"] == {"base and donor": 3, "base": 1, "donor": 1}
    assert not (tmp_path / "out.safetensors").exists()
    text = fold(capsys, base, adapter, "--dry-run").out
    (row,) = (line.split() for line in text.splitlines() if line.startswith("l.{0,1}.q.weight"))
    assert " ".join(row) == "l.{0,1}.q.weight ×2 F32 [6, 4] base and donor fold_lora lora, scale 3"
    back = run_ckpt(capsys, "remap", base, "-o", tmp_path / "b.safetensors", "--invert", tmp_path / "plan.json")
    assert "the plan merges checkpoints" in back.err


def test_a_saved_plan_of_two_inputs_is_applied_again() -> None:
    """Both inputs are compared with the inputs of the plan."""
    roles = {"base": as_checkpoint(base_state(), "base"), "donor": as_checkpoint(adapter_state(), "donor")}
    plan = plan_lora(roles["base"], roles["donor"], CONFIG)
    saved = plan_from_json(json.loads(json.dumps(plan_to_json(plan, roles))))
    assert apply_plan(saved, roles).steps == plan.steps
    less = {key: value for key, value in adapter_state().items() if "l.1" not in key}
    with pytest.raises(PlanError, match="the donor is not the input that the plan was made from"):
        apply_plan(saved, {**roles, "donor": as_checkpoint(less, "donor")})


REFUSED: dict[str, tuple[dict[str, Any], State, str]] = {
    # id: (changes of the config, changes of the adapter, a piece of the message)
    "a module that the base lacks": (
        {},
        {f"{P}z.lora_A.weight": torch.ones(2, 4), f"{P}z.lora_B.weight": torch.ones(6, 2)},
        "z.lora_A.we",
    ),
    "no partner": ({}, {f"{P}head.lora_A.weight": torch.ones(2, 6)}, "has no partner in the adapter"),
    "another rank": ({"r": 4}, {}, "but the rank in the config is 4"),
    "DoRA": ({"use_dora": True}, {}, "belongs to DoRA, and has no lora_magnitude_vector beside it"),
    "another formula": ({"peft_type": "OFT"}, {}, "is OFT, which cannot be folded"),
    "no shape": (
        {},
        {f"{P}head.lora_A.weight": torch.ones(2, 9), f"{P}head.lora_B.weight": torch.ones(3, 2)},
        "'head.we",
    ),
}


@pytest.mark.parametrize(("config", "changes", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_without_a_place_are_named(
    config: dict[str, Any], changes: State, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written, and the error has the path of the adapter."""
    base, adapter = written(tmp_path, base_state(), adapter_state() | changes, CONFIG | config)
    ran = fold(capsys, base, adapter)
    assert (ran.code, ran.out) == (2, "")
    assert reason in ran.err
    assert f"ckpt: {adapter}: " in ran.err
    assert not (tmp_path / "out.safetensors").exists()


PREFIXES = {
    "longer in the base": ("net.", "", f"'{P}*={P}net.*'"),
    "longer in the adapter": ("", "net.", f"'{P}net.*={P}*'"),
}


@pytest.mark.parametrize(("of_base", "of_adapter", "rename"), PREFIXES.values(), ids=PREFIXES.keys())
def test_another_prefix_of_the_base_is_in_the_hint(
    of_base: str, of_adapter: str, rename: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rename in the hint works."""
    state = {f"{of_base}{key}": value for key, value in base_state().items()}
    factors = {key.replace(P, f"{P}{of_adapter}"): value for key, value in adapter_state().items()}
    base, adapter = written(tmp_path, state, factors, CONFIG)
    ran = fold(capsys, base, adapter)
    assert ran.code == 2
    assert "of 7 tensors" in ran.err
    assert f"hint: every tensor has a matching key after --rename {rename}\n" in ran.err
    ran = fold(capsys, base, adapter, "--rename", rename.strip("'"))
    assert ran.code == 0, ran.err
    assert "3 from base and donor" in ran.err


USAGE: dict[str, tuple[list[str], str]] = {
    "scale of an overlay": (["--scale", "2"], "--scale has no meaning with --method overlay"),
    "policy of a fold": (
        ["--method", "lora", "--on-missing", "keep"],
        "--on-missing has no meaning with --method lora",
    ),
    "no scale": (["--method", "lora", "--scale", "nan"], "nan is not a valid scale"),
}


@pytest.mark.parametrize(("more", "reason"), USAGE.values(), ids=USAGE.keys())
def test_options_of_another_method_are_refused(
    more: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = written(tmp_path, base_state(), adapter_state(), CONFIG)
    ran = run_ckpt(capsys, "merge", base, adapter, "-o", tmp_path / "o.safetensors", *more)
    assert (ran.code, ran.out) == (2, "")
    assert reason in ran.err


def test_without_its_configuration_an_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = written(tmp_path, base_state(), adapter_state(), None)
    ran = fold(capsys, base, adapter)
    file = f"{adapter}/adapter_model.safetensors"
    reason = "no adapter_config.json in the directory of the adapter: the scale is unknown"
    hint = "hint: copy adapter_config.json there, or in Python give it as lora_config"
    assert (ran.code, ran.err.splitlines()[-2:]) == (2, [f"ckpt: {file}: {reason}", hint])


def test_ties_of_the_base_are_followed(tmp_path: Path) -> None:
    """A fold into one of two tied weights changes both; folds into both are refused."""
    weight = randn(6, 4, seed=1)
    base = {"q.weight": weight, "k.weight": weight}
    adapter = {f"{P}q.lora_A.weight": randn(2, 4, seed=2), f"{P}q.lora_B.weight": randn(6, 2, seed=3)}
    execute(plan_lora(base, adapter, CONFIG), {"base": base, "donor": adapter}, tmp_path / "o.pt")
    made = torch.load(tmp_path / "o.pt")
    assert made["q.weight"].data_ptr() == made["k.weight"].data_ptr()
    torch.testing.assert_close(
        made["k.weight"], weight + 3 * adapter[f"{P}q.lora_B.weight"] @ adapter[f"{P}q.lora_A.weight"]
    )
    both = adapter | {key.replace("q.", "k."): value.clone() for key, value in adapter.items()}
    with pytest.raises(PlanError, match=r"'q\.weight' and 'k.weight' are one tensor in the base, and both are adapted"):
        plan_lora(base, both, CONFIG)


def test_rules_may_drop_and_not_copy() -> None:
    """A layer keeps its weight where a rule drops its factors."""
    plan = plan_lora(base_state(), adapter_state(), CONFIG, _drop("*l.1.*"))
    assert {step.out.key for step in plan.steps if step.recipe is not None} == {"l.0.q.weight", "emb.weight"}
    assert [drop.key for drop in plan.dropped] == [f"{P}l.1.q.lora_A.weight", f"{P}l.1.q.lora_B.weight"]
    copies: Any = {"rule": [{"from": f"{P}head.weight", "to": [f"{P}head.weight", f"{P}x.weight"]}]}
    with pytest.raises(PlanError, match="rules may rename and drop the tensors of an adapter"):
        plan_lora(base_state(), adapter_state(), CONFIG, copies)


def _drop(pattern: str) -> Any:
    return {"rule": [{"from": pattern, "drop": True}]}


def test_weights_of_unsupported_dtypes_are_refused() -> None:
    """Integers and packed dtypes are refused."""
    base = base_state() | {"l.0.q.weight": torch.ones(6, 4, dtype=torch.int8)}
    with pytest.raises(CkptkitError, match=r"'l\.0\.q\.weight': fold_lora: "):
        plan_lora(base, adapter_state(), CONFIG)
