"""A cast says what it costs: the values that become inf or 0 are counted, and inf is never written unasked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ckptkit import (
    TensorInfo,
    choose_output,
    execute,
    load_into,
    load_optimizer_state,
    open_checkpoint,
    parse_rules,
    plan_lora,
    plan_merge,
    plan_remap,
)
from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.torch_bridge import CASTABLE, same_values
from ckptkit.errors import PlanError
from ckptkit.values.cast_payload import CastPayload
from tests.features import require
from tests.helpers_cli import run_ckpt
from tests.helpers_outputs import dtype_of, names_in, raw, same_state, tensor_of

FLOATS = sorted(code for code in CASTABLE if code.startswith(("F", "BF")) and code != "F8_E8M0")
INTEGERS = sorted(code for code in CASTABLE if code.startswith(("I", "U")))
WEIGHT = torch.tensor([[1e5, 1.0], [2.0, -7e4]])


@dataclass(frozen=True)
class Pieces:
    """A payload in pieces, which end within an element and within a row of the counter."""

    data: bytes
    size: int = 20_011

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        yield from (self.data[at : at + self.size] for at in range(0, len(self.data), self.size))


def loss_of(tensor: torch.Tensor, before: str, after: str) -> CastLoss:
    shape = tuple(tensor.shape)
    losses: dict[str, CastLoss] = {}
    found, out = TensorInfo("w", before, shape), TensorInfo("w", after, shape)
    for _ in CastPayload(Pieces(raw(tensor)), found, out, losses).chunks():
        pass
    return losses["w"]


def numbers(code: str) -> torch.Tensor:
    """Return values of every magnitude, weights with and without zeros, and random bits, with inf and NaN."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-50, 45, (2500,), generator=generator, dtype=torch.float64)
    magnitudes = torch.randn(2500, dtype=torch.float64, generator=generator) * 10.0**exponents
    weights = torch.randn(5000, dtype=torch.float64, generator=generator) * 0.02
    weights[:2600:2] = 0
    edges = [65519.0, 65519.999999999, 65520.0, 448.0, 464.0, 465.0, 57344.0, 61440.0, 240.0, 248.0, 2.0**-25, 2.0**-24]
    wide = torch.cat([weights, magnitudes, torch.tensor(edges, dtype=torch.float64), -weights[:999]])
    return torch.cat([wide.to(dtype_of(code)), tensor_of(code, (1500,), 7)])


@pytest.mark.parametrize("before", FLOATS)
def test_overflow_and_underflow_are_counted_as_torch_casts(before: str) -> None:
    """For every pair of floating-point dtypes ``Tensor.to`` makes as many inf and 0 as are counted."""
    source = numbers(before)
    old = source.double()
    for after in FLOATS:
        new = source.to(dtype_of(after)).double()
        overflowed = old.isfinite() & ~new.isfinite()
        if after == "F8_E4M3":  # everything above 464 becomes 448, also inf
            overflowed = old.abs() > 464
        loss = loss_of(source, before, after)
        expected = (int(overflowed.sum()), int(((old != 0) & (new == 0)).sum()), 0, len(source))
        assert (loss.overflowed, loss.underflowed, loss.truncated, loss.values) == expected, (before, after)
        assert loss.infinite == int(old[overflowed].isinf().sum())
        assert loss.saturated == (after == "F8_E4M3" and bool(overflowed.any()))
        assert loss.largest == (float(old[overflowed & old.isfinite()].abs().max()) if overflowed.any() else 0.0)


@pytest.mark.parametrize("before", ["F32", "BF16", "I64", "U8"])
def test_values_that_an_integer_dtype_cannot_hold_are_counted(before: str) -> None:
    """A number out of range overflows; a fraction is cut, or becomes 0; a BOOL keeps only whether a value is 0."""
    values = [0, 0.25, -0.5, 1, 2.5, 100, 300, -1, -2.75, 70_000] if before != "U8" else [0, 1, 100, 200]
    source = torch.tensor(values, dtype=torch.float64).to(dtype_of(before))
    for after in INTEGERS:
        limits = torch.iinfo(dtype_of(after))
        old = [float(value) for value in source.double()]
        inside = [value for value in old if limits.min <= int(value) <= limits.max]
        zeros = sum(value != 0 and int(value) == 0 for value in inside)
        cut = sum(value != int(value) and int(value) != 0 for value in inside)
        loss = loss_of(source, before, after)
        counts = (loss.overflowed, loss.underflowed, loss.truncated)
        assert counts == ((len(old) - len(inside), zeros, cut) if before != after else (0, 0, 0)), (before, after)
    assert loss_of(source, before, "BOOL").truncated == int(((source != 0) & (source != 1)).sum())


def test_complex_values_overflow_in_either_part() -> None:
    """A complex value counts once, though both of its parts overflow."""
    source = torch.tensor([1e300 + 1j, 1 + 1e300j, 1e300 + 1e300j, 1 + 1j], dtype=torch.complex128)
    assert loss_of(source, "C128", "C64").overflowed == 3


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({key.replace("__", "."): value for key, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out"])
@pytest.mark.parametrize("dtype", ["F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ"])
def test_inf_made_of_finite_values_is_not_written(
    name: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command exits with 2, names keys, counts and the way out, and writes nothing, or what was asked for."""
    source = saved(tmp_path / "in.safetensors", a=WEIGHT, b=torch.full((3,), -7e4), c=torch.ones(2))
    shards = ["--max-shard-size", "20"] if name == "out" else []
    command: list[str | Path] = ["convert", source, "-o", tmp_path / name, "--dtype", dtype, *shards]
    ran = run_ckpt(capsys, *command)
    assert (ran.code, ran.out) == (2, "")
    assert f"'a' (F32 to {dtype}): 2 of 4 values become" in ran.err
    assert f"'b' (F32 to {dtype}): 3 of 3 values become" in ran.err
    assert f"{source}: 5 values do not fit the new dtype" in ran.err
    assert "hint: BF16 holds them; --allow-overflow" in ran.err
    assert names_in(tmp_path) == ["in.safetensors"]
    dry = run_ckpt(capsys, *command, "--dry-run")
    assert (dry.code, "too large for their new dtype were not looked for" in dry.out) == (0, True)
    ran = run_ckpt(capsys, *command, "--allow-overflow", "--json", "--verify")
    assert ran.code == 0, ran.err
    losses = json.loads(ran.out)["output"]["cast_losses"]
    assert [(loss["key"], loss["overflowed"], loss["values"]) for loss in losses] == [("a", 2, 4), ("b", 3, 3)]
    assert "5 values do not fit the new dtype" in ran.err
    with open_checkpoint(tmp_path / name) as written:
        wanted = torch.full((3,), -448.0 if dtype == "F8_E4M3" else -7e4)  # older versions of torch make NaN of it
        assert same_values(written.read("b"), wanted)


def test_an_inf_of_the_input_is_named_where_it_becomes_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F8_E4M3 has no inf: the error says which values it becomes, and how many were inf."""
    source = saved(tmp_path / "in.safetensors", w=torch.tensor([1.0, 1e3, torch.inf, -torch.inf]))
    ran = run_ckpt(capsys, "convert", source, "-o", tmp_path / "o.pt", "--dtype", "F8_E4M3")
    assert "'w' (F32 to F8_E4M3): 3 of 4 values become 448 or -448 (2 of them infinite before), up to 1000" in ran.err
    assert "hint: BF16 holds them" in ran.err


def test_an_old_output_is_kept_where_a_cast_overflows(tmp_path: Path) -> None:
    """``--force`` replaces an output only by a complete one."""
    out = saved(tmp_path / "out.safetensors", old=torch.ones(1))
    before = out.read_bytes()
    state = {"w": WEIGHT}
    with pytest.raises(PlanError, match="2 values do not fit"):
        execute(plan_remap(state, dtype="F16"), state, choose_output(out, force=True))
    assert out.read_bytes() == before
    assert names_in(tmp_path) == ["out.safetensors"]


def test_inf_and_nan_of_the_source_pass_silently(tmp_path: Path) -> None:
    """The cast did not make them, so there is nothing to say."""
    state = {"w": torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, 65504.0])}
    written = execute(plan_remap(state, dtype="F16"), state, tmp_path / "o.safetensors")
    assert written.losses == ()
    assert torch.equal(load_file(tmp_path / "o.safetensors")["w"][:2], torch.tensor([1, -1]).half() * float("inf"))


@pytest.mark.parametrize("lowest", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3"])
def test_a_mask_of_the_lowest_value_is_named(lowest: torch.dtype, dtype: str, tmp_path: Path) -> None:
    """The error names a mask of ``torch.finfo(...).min`` as a mask, and weights that overflow as weights."""
    state = {"mask": torch.full((4, 4), torch.finfo(lowest).min).triu(1), "w": torch.ones(2)}
    plan = plan_remap(state, dtype=dtype)
    if lowest == torch.bfloat16 and dtype == "BF16":
        assert not execute(plan, state, tmp_path / "o.safetensors").losses
        return
    with pytest.raises(PlanError, match="as in an attention mask") as caught:
        execute(plan, state, tmp_path / "o.safetensors")
    assert ("writes -inf, which masks as well" in str(caught.value)) == (dtype != "F8_E4M3")  # F8_E4M3 has no inf
    state["mask"][0, 0] = 3.4e38
    with pytest.raises(PlanError, match="7 of 16 values") as caught:
        execute(plan, state, tmp_path / "o.safetensors")
    assert "mask of" not in str(caught.value)
    assert "attention" not in str(caught.value)


def test_values_that_become_0_are_reported_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Underflow is said in one line with exact counts; a cast without losses says nothing."""
    source = saved(tmp_path / "in.safetensors", a=torch.full((4,), 1e-9), b=torch.tensor([1e-9, 0.0, 1.0]))
    ran = run_ckpt(capsys, "convert", source, "-o", tmp_path / "o.safetensors", "--dtype", "F16")
    assert (ran.code, "cast of 2 tensors (F32 to F16): 5 of 7 values become 0; most in 'a'" in ran.err) == (0, True)
    ran = run_ckpt(capsys, "convert", source, "-o", tmp_path / "p.safetensors", "--dtype", "BF16")
    assert (ran.code, "cast of" in ran.err) == (0, False)


OPERATIONS: list[tuple[str, dict[str, Any], dict[str, torch.Tensor], dict[str, int]]] = [
    ("rounding", {"from": "w", "to": "v", "op": {"scale": {"factor": 2.0}}}, {"w": torch.tensor([4e4, 1.0]).half()},
     {"v": 1}),
    ("in F32", {"from": "w", "to": "v", "op": {"scale": {"factor": 1e30}}}, {"w": torch.tensor([1e30, 1.0])}, {"v": 1}),
    ("cast", {"from": "w", "to": "v", "op": [{"cast": {"dtype": "F16"}}, {"cast": {"dtype": "F32"}}]},
     {"w": torch.tensor([1e30, 1.0, float("inf")])}, {"v": 1}),
    ("parts", {"from": "w", "to": ["a", "b"], "op": [{"cast": {"dtype": "F16"}}, {"split": {"parts": 2}}]},
     {"w": torch.tensor([1e5, 1e6, 1.0, 1e7])}, {"a": 2, "b": 1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "state", "overflowed"), [case[1:] for case in OPERATIONS], ids=[c[0] for c in OPERATIONS]
)
def test_operations_count_what_they_round(
    rule: dict[str, Any], state: dict[str, torch.Tensor], overflowed: dict[str, int], tmp_path: Path
) -> None:
    """An overflow inside an operation is found, and counted for the output that has it."""
    plan = plan_remap(state, parse_rules(file={"rule": [rule]}))
    with pytest.raises(PlanError, match="not fit the new dtype"):
        execute(plan, state, tmp_path / "o.safetensors")
    written = execute(plan, state, tmp_path / "o.safetensors", allow_overflow=True)
    assert {loss.key: loss.overflowed for loss in written.losses} == overflowed


def test_a_folded_adapter_that_overflows_is_refused(tmp_path: Path) -> None:
    """The sum of base and adapter is rounded to the dtype of the base, which must hold it."""
    base = {"l.weight": torch.full((2, 2), 6e4).half()}
    adapter = {"base_model.model.l.lora_A.weight": torch.full((1, 2), 100.0),
               "base_model.model.l.lora_B.weight": torch.tensor([[100.0], [0.0]])}  # fmt: skip
    plan = plan_lora(base, adapter, {"r": 1, "lora_alpha": 1})
    roles = {"base": base, "donor": adapter}
    with pytest.raises(PlanError, match=r"'l.weight' \(F32 to F16\): 2 of 4 values become inf"):
        execute(plan, roles, tmp_path / "o.safetensors")
    assert names_in(tmp_path) == []
    assert plan_merge(base, {"l.weight": torch.ones(2, 2)}).steps[0].is_cast


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2, torch.int8])
def test_load_into_refuses_an_overflow_before_it_copies(dtype: torch.dtype) -> None:
    """The model is untouched to the bit, and its hooks do not run."""
    require(nn.Module, "register_load_state_dict_pre_hook")
    model = nn.Module()
    model.register_buffer("a", torch.full((2,), 3.0).to(dtype))
    model.register_buffer("w", torch.full((2, 2), 5.0).to(dtype))
    calls: list[object] = []
    model.register_load_state_dict_pre_hook(lambda *args: calls.append(args))  # type: ignore[no-untyped-call]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {"a": torch.ones(2), "w": WEIGHT}
    with pytest.raises(PlanError, match="2 of 4 values become") as caught:
        load_into(model, state)
    assert "allow_overflow=True" in str(caught.value)
    assert same_state(model.state_dict(), before)
    assert not calls
    report = load_into(model, state, allow_overflow=True)
    assert [(finding.code, finding.key) for finding in report.findings] == [("load.overflow", "w")]
    assert torch.equal(model.state_dict()["w"].float(), WEIGHT.to(dtype).float())
    assert calls


def test_load_into_reports_values_that_become_0() -> None:
    """They are a note with exact counts, and no reason to refuse."""
    model = nn.Linear(2, 2).half()
    report = load_into(model, {"weight": torch.tensor([[1e-9, 1.0], [0.0, 1e-9]]), "bias": torch.ones(2)})
    (note,) = report.findings
    assert (note.code, note.severity, note.key) == ("load.underflow", "note", "weight")
    assert "2 of 4 values become 0" in note.message
    assert not load_into(model, {"weight": torch.ones(2, 2).double(), "bias": torch.ones(2)}).findings


def test_optimizer_state_is_cast_with_counts() -> None:
    """torch casts the state to the dtype of its parameter: values that become 0 are reported, inf is refused."""
    trained, model = nn.Linear(2, 2), nn.Linear(2, 2).half()
    source, target = (torch.optim.Adam(module.parameters()) for module in (trained, model))
    for parameter in trained.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    source.step()
    state = source.state_dict()
    report = load_optimizer_state(target, model, state)
    found = [finding for finding in report.findings if finding.code == "optim.underflow"]
    assert [finding.key for finding in found] == ["weight", "bias"]
    assert "'weight.exp_avg_sq' (F32 to F16): 4 of 4 values become 0" in found[0].message
    state["state"][0]["exp_avg"][0, 0] = 1e6
    target = torch.optim.Adam(model.parameters())
    with pytest.raises(PlanError, match=r"'weight.exp_avg' \(F32 to F16\): 1 of 4 values becomes inf"):
        load_optimizer_state(target, model, state)
    assert not target.state
    report = load_optimizer_state(target, model, state, allow_overflow=True)
    assert "optim.overflow" in {finding.code for finding in report.findings}
    assert target.state[model.weight]["exp_avg"][0, 0].isinf()
