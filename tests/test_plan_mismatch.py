"""``--on-mismatch`` applies a tensor operation by its name, and errors suggest one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import load_into, plan_merge
from ckptkit.errors import PlanError
from tests.helpers_cli import run_ckpt

Shape = tuple[int, ...]


def state(**shapes: Shape) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


MENDED: dict[str, tuple[str, str, Shape, Shape]] = {
    "a larger vocabulary": ("pad", "wte.weight", (10, 4), (16, 4)),
    "a smaller vocabulary": ("slice", "wte.weight", (16, 4), (10, 4)),
    "a finer grid": ("resize_pos_embed", "pos_embed", (1, 5, 4), (1, 17, 4)),
    "one channel": ("conv_in_channels", "conv1.weight", (8, 3, 3, 3), (8, 1, 3, 3)),
    "a transposed kernel": ("transpose", "fc.weight", (4, 6), (6, 4)),
}


@pytest.mark.parametrize("case", MENDED.values(), ids=MENDED.keys())
def test_the_operation_is_suggested_and_applied(
    case: tuple[str, str, Shape, Shape], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default, the error names the operation; with its name, the output has the shape of the base."""
    name, key, found, expected = case
    base, donor, out = (tmp_path / f"{part}.safetensors" for part in ("base", "donor", "out"))
    save_file({key: torch.zeros(expected), "same": torch.zeros(2)}, base)
    save_file({key: torch.randn(found), "same": torch.ones(2)}, donor)
    ran = run_ckpt(capsys, "merge", base, donor, "-o", out)
    assert (ran.code, out.exists()) == (2, False)
    assert f"--on-mismatch '{key}={name}': " in ran.err
    ran = run_ckpt(capsys, "merge", base, donor, "-o", out, "--on-mismatch", f"{key}={name}", "--verify")
    assert ran.code == 0, ran.err
    made = load_file(out)
    assert made[key].shape == expected
    assert torch.equal(made["same"], torch.ones(2))
    if name == "pad":
        assert torch.equal(made[key][:10], load_file(donor)[key])
    if name == "transpose":
        assert torch.equal(made[key], load_file(donor)[key].T)


def test_a_wrong_operation_is_refused_with_a_suggestion() -> None:
    """The hint names an operation that works."""
    with pytest.raises(PlanError, match=r"and resize_pos_embed does not change one into the other") as caught:
        plan_merge(state(fc__weight=(6, 4)), state(fc__weight=(4, 6)), on_mismatch="resize_pos_embed")
    assert caught.value.hint is not None
    assert "--on-mismatch 'fc.weight=transpose': " in caught.value.hint


def test_a_model_loads_through_it() -> None:
    """``load_into`` has the same policies, and checks the loaded values."""
    model = torch.nn.Embedding(6, 3)
    old = torch.randn(4, 3)
    report = load_into(model, {"weight": old}, on_mismatch="pad")
    assert report.coverage == 1
    assert torch.equal(model.weight[:4], old)
