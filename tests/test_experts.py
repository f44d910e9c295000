"""Experts in one tensor are found in tensors of one expert each, and both ways compute what torch computes."""

from __future__ import annotations

import pytest
import torch

from ckptkit.comparison.experts import find_stacked_experts
from ckptkit.tensor_ops.registry import apply_chain

EXPERTS, ROWS, WIDTH = 4, 6, 5
AT = "layers.{}.moe.experts.{}."
State = dict[str, torch.Tensor]


def apart(gate: str, up: str, down: str, rows: int = ROWS) -> State:
    return {
        f"{AT.format(layer, expert)}{name}.weight": torch.randn(*shape)
        for layer in range(2)
        for expert in range(EXPERTS)
        for name, shape in ((gate, (rows, WIDTH)), (up, (rows, WIDTH)), (down, (WIDTH, rows)))
    }


def together(parts: State, names: tuple[str, str, str], *, transposed: bool) -> State:
    """Return the experts in one tensor each, made by torch."""
    made = {}
    for layer in range(2):
        gate, up, down = (
            torch.stack([parts[f"{AT.format(layer, expert)}{name}.weight"] for expert in range(EXPERTS)])
            for name in names
        )
        fused = torch.cat([gate, up], 1)
        made[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = fused.mT.contiguous() if transposed else fused
        made[f"model.layers.{layer}.mlp.experts.down_proj"] = down.mT.contiguous() if transposed else down
    return made


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("rows", [ROWS, 5], ids=["plain", "square"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")])
def test_both_ways_agree_with_torch(names: tuple[str, str, str], transposed: bool, rows: int) -> None:
    """The operations join and divide bit by bit; where down is square, gate_up shows the orientation."""
    parts = apart(*names, rows=rows)
    wholes = together(parts, names, transposed=transposed)
    found = find_stacked_experts(shapes(wholes), shapes(parts))
    assert {one.key for one in found} == set(wholes)
    for one in found:
        (joined,) = apply_chain(one.join, [parts[key] for key in one.parts])
        assert torch.equal(joined, wholes[one.key])
        divided = apply_chain(one.divide, [wholes[one.key]])
        assert all(torch.equal(value, parts[key]) for key, value in zip(one.parts, divided, strict=True))
        in_order = torch.cat([parts[key].flatten() for key in one.parts_as_stored])
        assert torch.equal(in_order, wholes[one.key].flatten()) == one.is_in_order


def test_nothing_is_guessed() -> None:
    """Another number of experts, a missing expert, equal towers and unknown names give nothing."""
    parts = shapes(apart("w1", "w3", "w2"))
    whole = {"layers.0.mlp.experts.down_proj": (EXPERTS, WIDTH, ROWS)}
    assert len(find_stacked_experts(whole, parts)) == 1
    assert find_stacked_experts({"layers.0.mlp.experts.down_proj": (EXPERTS + 1, WIDTH, ROWS)}, parts) == []
    assert find_stacked_experts(whole, {key: shape for key, shape in parts.items() if ".2.w2" not in key}) == []
    towers = {f"{name}.layers.0.mlp.experts.down_proj": (EXPERTS, WIDTH, ROWS) for name in ("student", "teacher")}
    assert find_stacked_experts(towers, parts) == []
    assert find_stacked_experts({"layers.0.mlp.experts.other": (EXPERTS, WIDTH, ROWS)}, parts) == []
    assert find_stacked_experts({"layers.7.mlp.experts.down_proj": (EXPERTS, WIDTH, ROWS)}, parts) == []
