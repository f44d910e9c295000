"""The folds of adapters compute the formula of their paper, and refuse factors that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape
from ckptkit.tensor_ops.registry import parse_operation


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def only(name: str, table: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
    (made,) = parse_operation({name: table}).apply(tensors)
    return made


W, A, B = randn(5, 4), randn(2, 4, seed=1), randn(5, 2, seed=2)


def test_dora_gives_each_output_its_magnitude() -> None:
    """The direction is that of the folded weight, and the norm of each output is its magnitude."""
    magnitude = randn(5, seed=3).abs()
    made = only("fold_dora", {"scale": 0.5}, W, A, B, magnitude)
    folded = W + 0.5 * B @ A
    torch.testing.assert_close(made.norm(dim=1), magnitude)
    torch.testing.assert_close(torch.cosine_similarity(made, folded, dim=1), torch.ones(5, dtype=torch.float64))
    turned = only("fold_dora", {"scale": 0.5, "fan_in_fan_out": True}, W.T.contiguous(), A, B, magnitude)
    torch.testing.assert_close(turned, made.T)
    per_input = only("fold_dora", {"scale": 0.5, "per_input": True}, W, A, B, magnitude[:4].reshape(1, 4))
    torch.testing.assert_close(per_input.norm(dim=0), magnitude[:4])


def test_dora_of_a_convolution_takes_the_norm_over_the_kernel() -> None:
    weight, magnitude = randn(5, 4, 3, 3), randn(5, seed=3).abs()
    made = only("fold_dora", {"scale": 2}, weight, randn(2, 4, 3, 3), randn(5, 2, 1, 1), magnitude.reshape(1, 5, 1, 1))
    torch.testing.assert_close(made.flatten(1).norm(dim=1), magnitude)


def test_adalora_scales_the_rows_of_a() -> None:
    values = randn(2, 1, seed=3)
    made = only("fold_adalora", {"scale": 0.5}, W, A, B, values)
    torch.testing.assert_close(made, W + 0.5 * B @ torch.diag(values[:, 0]) @ A)


@pytest.mark.parametrize("turned", [False, True])
def test_each_expert_has_factors_of_its_own(*, turned: bool) -> None:
    """The rows of A and the columns of B are in the order of PEFT: A by expert, and B by rank."""
    weight, down, up = randn(3, 5, 4), randn(6, 4, seed=1), randn(5, 6, seed=2)
    expected = torch.stack([weight[e] + 0.5 * up[:, e::3] @ down[2 * e : 2 * e + 2] for e in range(3)])
    given = weight.transpose(1, 2).contiguous() if turned else weight
    made = only("fold_lora_experts", {"scale": 0.5, "fan_in_fan_out": turned}, given, down, up)
    torch.testing.assert_close(made.transpose(1, 2) if turned else made, expected)


def test_loha_multiplies_two_products() -> None:
    other, more = randn(5, 2, seed=3), randn(2, 4, seed=4)
    torch.testing.assert_close(only("fold_loha", {"scale": 2}, W, B, A, other, more), W + 2 * (B @ A) * (other @ more))


def test_the_kernels_of_loha_and_lokr_are_tucker_products() -> None:
    weight, kernel = randn(5, 4, 3, 3), randn(2, 2, 3, 3, seed=5)
    left, right = randn(2, 5, seed=6), randn(2, 4, seed=7)
    core = sum(
        kernel[i, j] * left[i][:, None, None, None] * right[j][:, None, None] for i in range(2) for j in range(2)
    )
    made = only("fold_loha", {"scale": 2}, weight, left, right, left, right, kernel, kernel)
    torch.testing.assert_close(made, weight + 2 * core * core)
    one = torch.ones(1, 1, dtype=torch.float64)
    made = only("fold_lokr", {"scale": 2, "w2": 3}, weight, one, left, right, kernel)
    torch.testing.assert_close(made, weight + 2 * core)


def test_lokr_is_a_kronecker_product() -> None:
    weight, first = randn(10, 12), randn(2, 3, seed=1)
    expected = weight + 0.5 * torch.kron(first, B @ A)
    torch.testing.assert_close(only("fold_lokr", {"scale": 0.5, "w2": 2}, weight, first, B, A), expected)
    torch.testing.assert_close(only("fold_lokr", {"scale": 0.5}, weight, first, B @ A), expected)


def test_ia3_multiplies_outputs_or_inputs() -> None:
    out, into = randn(5, 1, seed=1), randn(1, 4, seed=2)
    torch.testing.assert_close(only("fold_ia3", {}, W, out), torch.diag(out[:, 0]) @ W)
    torch.testing.assert_close(only("fold_ia3", {"per_input": True}, W, into), W @ torch.diag(into[0]))
    torch.testing.assert_close(only("fold_ia3", {"fan_in_fan_out": True}, W, into), W @ torch.diag(into[0]))
    torch.testing.assert_close(only("fold_ia3", {}, W[:, 0].contiguous(), out), W[:, 0] * out[:, 0])


def test_replaced_rows_are_the_new_ones_and_the_others_keep_their_bits() -> None:
    weight, rows = torch.randn(5, 3).bfloat16(), torch.randn(2, 3)
    made = only("replace_rows", {"indices": [4, 0]}, weight, rows)
    assert torch.equal(made[[4, 0]], rows.bfloat16())
    assert torch.equal(made[1:4], weight[1:4])


REFUSED: list[tuple[str, dict[str, Any], list[Shape], str]] = [
    ("fold_dora", {"scale": 1}, [(5, 4), (2, 4), (5, 2), (4,)], "the magnitude is [4], and W needs 5 values"),
    ("fold_dora", {"scale": 1}, [(5, 4), (2, 4), (5, 2)], "takes W, A, B and the magnitude, not 3 tensors"),
    ("fold_adalora", {"scale": 1}, [(5, 4), (2, 4), (5, 2), (2,)], "A is [2, 4], and E is [2]"),
    ("fold_adalora", {"scale": 1}, [(5, 4)], "takes W, A, B and E, not 1 tensor"),
    ("fold_lora_experts", {"scale": 1}, [(3, 5, 4), (7, 4), (5, 7)],
     "A of [7, 4] and B of [5, 7] do not fit [3, 5, 4]"),
    ("fold_lora_experts", {"scale": 1}, [(3, 5, 4), (6, 4)], "takes W, A and B, not 2 tensors"),
    ("fold_loha", {"scale": 1}, [(5, 4), (5, 2), (2, 4), (5, 2), (3, 4)], "[5, 2], [3, 4] do not make [5, 4]"),
    ("fold_loha", {"scale": 1}, [(5, 4)], "takes W with four factors, and t1 and t2 or none, not 1 tensor"),
    ("fold_lokr", {"scale": 1}, [(5, 4), (5, 2), (2, 2)], "[5, 2], [2, 2] do not make [5, 4]"),
    ("fold_lokr", {"scale": 1}, [(5, 4), (5,), (2, 2)], "[5], [2, 2] do not make two matrices"),
    ("fold_lokr", {"scale": 1}, [(5, 4)], "takes W and 2 factors, not 1 tensor"),
    ("fold_ia3", {}, [(5, 4), (4,)], "l of [4] does not fit [5, 4]"),
    ("fold_ia3", {"per_input": True}, [(5,), (5,)], "l of [5] does not fit [5]"),
    ("replace_rows", {"indices": [7]}, [(5, 4), (1, 4)], "there is no row 7 in [5, 4]"),
    ("replace_rows", {"indices": [1]}, [(5, 4), (2, 4)], "the rows are [2, 4], and [1, 4] fit [5, 4]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "table", "shapes", "reason"), REFUSED)
def test_tensors_that_do_not_fit_are_refused(
    name: str, table: dict[str, Any], shapes: list[Shape], reason: str
) -> None:
    with pytest.raises(RuleError) as caught:
        parse_operation({name: table}).shapes(shapes)
    assert caught.value.reason == f"{name}: {reason}"


@pytest.mark.parametrize(
    ("name", "table", "reason"),
    [
        ("replace_rows", {"indices": []}, "needs indices of rows, each once and counted from 0"),
        ("replace_rows", {"indices": [1, 1]}, "needs indices of rows, each once and counted from 0"),
        ("fold_lokr", {"scale": 1, "w2": 4}, "w1 has 1 or 2 factors and w2 1 to 3, not 1 and 4"),
    ],
)
def test_parameters_that_have_no_meaning_are_refused(name: str, table: dict[str, Any], reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_operation({name: table})
    assert caught.value.reason == f"{name}: {reason}"
