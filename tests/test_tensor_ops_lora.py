"""LoRA adapters are folded with the result of their forward pass, and updates are extracted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from ckptkit.adapters.model import AdapterPlan, Fold
from ckptkit.adapters.peft import read_peft
from ckptkit.adapters.placing import place_adapter
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.lora import ExtractLora, FoldLora
from ckptkit.tensor_ops.operation import Shape
from ckptkit.tensor_ops.registry import parse_operation
from tests.helpers_tensor_ops import dtype_of, same

RANK = 4


def randn(*shape: int, code: str = "F64", seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype_of(code))


def folded(table: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
    (made,) = parse_operation({"fold_lora": table}).apply(tensors)
    return made


def test_a_linear_layer_gives_the_output_with_its_adapter() -> None:
    weight, down, up, batch = randn(6, 5), randn(RANK, 5, seed=1), randn(6, RANK, seed=2), randn(3, 5, seed=3)
    made = folded({"alpha": 16, "r": RANK}, weight, down, up)
    torch.testing.assert_close(batch @ made.T, batch @ weight.T + 4 * (batch @ down.T @ up.T))
    turned = folded({"alpha": 16, "fan_in_fan_out": True}, weight.T, down, up)
    assert torch.equal(turned, made.T)


def test_an_embedding_gives_the_output_with_its_adapter() -> None:
    """A is [r, vocab] and B is [dim, r]: rows are looked up in A and multiplied by B."""
    weight, down, up, tokens = randn(9, 5), randn(RANK, 9, seed=1), randn(5, RANK, seed=2), torch.tensor([3, 0, 3, 8])
    made = folded({"scale": 0.5, "fan_in_fan_out": True}, weight, down, up)
    wanted = functional.embedding(tokens, weight) + 0.5 * functional.embedding(tokens, down.T) @ up.T
    torch.testing.assert_close(functional.embedding(tokens, made), wanted)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3,), (1, 2, 3)], ids=["1x1", "3x3", "1-D", "3-D"])
def test_a_convolution_gives_the_output_with_its_adapter(kernel: tuple[int, ...]) -> None:
    """A has the kernel of the convolution, and B a kernel of size 1."""
    weight, down = randn(6, 5, *kernel), randn(RANK, 5, *kernel, seed=1)
    up = randn(6, RANK, *(1 for _ in kernel), seed=2)
    batch = randn(2, 5, *(7 for _ in kernel), seed=3)
    convolve: Any = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(kernel)]
    made = folded({"alpha": 8}, weight, down, up)
    torch.testing.assert_close(convolve(batch, made), convolve(batch, weight) + 2 * convolve(convolve(batch, down), up))


@pytest.mark.parametrize("code", ["F16", "BF16", "F32", "F64"])
def test_the_sum_is_rounded_once(code: str) -> None:
    """The update is added in F32 before it is rounded; factors may have a wider dtype than the weight."""
    weight, down, up = randn(6, 5, code=code), randn(RANK, 5, code="F32", seed=1), randn(6, RANK, code="F32", seed=2)
    wide = torch.float64 if code == "F64" else torch.float32
    wanted = (weight.to(wide) + (up.to(wide) @ down.to(wide)) * 0.3).to(weight.dtype)
    assert same(folded({"scale": 0.3}, weight, down, up), wanted)


@pytest.mark.parametrize(
    ("table", "factor"),
    [
        ({"scale": 0.25}, 0.25),
        ({"alpha": 16}, 4.0),
        ({"alpha": 16, "rslora": True}, 8.0),
        ({"alpha": 6, "r": RANK}, 1.5),
    ],
    ids=["scale", "alpha over rank", "alpha over its root", "rank given"],
)
def test_the_scale_is_given_or_follows_from_alpha(table: dict[str, Any], factor: float) -> None:
    made = folded(table, torch.zeros(1, 1), torch.ones(RANK, 1), torch.ones(1, RANK))
    assert made.item() == factor * RANK


def test_the_bias_of_a_factor_folds_into_the_bias() -> None:
    made = folded({"alpha": 8, "r": RANK}, torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0]))
    assert made.tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("table", "shapes", "reason"),
    [
        ({"scale": 1}, [(6, 5), (4, 5), (6, 3)], "A of [4, 5] and B of [6, 3] have no rank in common"),
        ({"scale": 1}, [(6, 5), (0, 5), (6, 0)], "A of [0, 5] and B of [6, 0] have no rank in common"),
        ({"scale": 1}, [(6, 5), (4, 5, 1, 1), (6, 4)], "A of [4, 5, 1, 1] and B of [6, 4] have no rank in common"),
        ({"scale": 1}, [(6, 5), (4,), (6, 4)], "A of [4] and B of [6, 4] have no rank in common"),
        ({"alpha": 1, "r": 8}, [(6, 5), (4, 5), (6, 4)], "A of [4, 5] has rank 4, not 8"),
        ({"scale": 1}, [(5, 6), (4, 5), (6, 4)], "A of [4, 5] and B of [6, 4] make [6, 5], but W is [5, 6]"),
        (
            {"scale": 1, "fan_in_fan_out": True}, [(6, 5), (4, 5), (6, 4)],
            "A of [4, 5] and B of [6, 4] make [5, 6], but W is [6, 5]",
        ),
        ({"scale": 1}, [(6, 5)], "takes W, A and B, not 1 tensor"),
        ({"alpha": 1}, [(6,), (6,)], "a bias does not tell the rank"),
        ({"scale": 1}, [(6,), (5,)], "the bias is [6], but its update is [5]"),
    ],
)  # fmt: skip
def test_factors_that_do_not_fit_are_refused(table: dict[str, Any], shapes: list[Shape], reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_operation({"fold_lora": table}).shapes(shapes)
    assert caught.value.reason == f"fold_lora: {reason}"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({}, "fold_lora: needs either scale or alpha"),
        ({"scale": 1, "alpha": 1}, "fold_lora: needs either scale or alpha"),
        ({"alpha": 1, "r": 0}, "fold_lora: 0 is not a valid rank"),
    ],
)
def test_a_scale_is_given_once(table: dict[str, Any], reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_operation({"fold_lora": table})
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("shape", "down", "up", "turned"),
    [
        ((9, 7), (3, 7), (9, 3), False),
        ((9, 7), (3, 9), (7, 3), True),
        ((9, 4, 3, 3), (3, 4, 3, 3), (9, 3, 1, 1), False),
    ],
    ids=["linear", "fan_in_fan_out", "convolution"],
)
def test_an_update_of_low_rank_is_extracted_whole(shape: Shape, down: Shape, up: Shape, *, turned: bool) -> None:
    """Folding the extracted factors gives the tuned weight."""
    base = randn(*shape)
    fold = FoldLora(1.0, fan_in_fan_out=turned)
    (tuned,) = fold.apply([base, randn(*down, seed=1), randn(*up, seed=2)])
    operation = ExtractLora(3, fan_in_fan_out=turned)
    factors = operation.apply([base, tuned])
    assert [tuple(factor.shape) for factor in factors] == [down, up]
    torch.testing.assert_close(fold.apply([base, *factors])[0], tuned)
    assert operation.residual([base, tuned], factors) < 1e-12
    assert operation.residual([base, base], factors) == 0.0
    smaller = ExtractLora(2, fan_in_fan_out=turned)
    singular = torch.linalg.svdvals(((tuned - base).T if turned else tuned - base).flatten(1))
    wanted = float(singular[2] / singular.norm())
    assert smaller.residual([base, tuned], smaller.apply([base, tuned])) == pytest.approx(wanted)


def test_the_signs_of_an_extraction_do_not_depend_on_the_decomposition() -> None:
    """The largest entry of each column of B is positive."""
    _, up = ExtractLora(5).apply([randn(9, 7), randn(9, 7, seed=1)])
    assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("table", "shapes", "reason"),
    [
        ({"rank": 6}, [(9, 5), (9, 5)], "an update of [9, 5] has a rank of at most 5"),
        ({"rank": 1}, [(9, 5), (9, 4)], "takes two weights of one shape, not [9, 5], [9, 4]"),
        ({"rank": 1}, [(9,), (9,)], "[9] is not a weight to decompose"),
        ({"rank": 1, "fan_in_fan_out": True}, [(9, 1, 1), (9, 1, 1)], "[9, 1, 1] is not a matrix to decompose"),
    ],
)
def test_wrong_ranks_are_refused(table: dict[str, Any], shapes: list[Shape], reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_operation({"extract_lora": table}).shapes(shapes)
    assert caught.value.reason == f"extract_lora: {reason}"
    with pytest.raises(RuleError, match="extract_lora: 0 is not a valid rank"):
        parse_operation({"extract_lora": {"rank": 0}})


P = "base_model.model."
BASE: dict[str, Shape] = {
    "emb.weight": (31, 16), "q.weight": (24, 16), "q.bias": (24,), "k.weight": (24, 16), "sq.weight": (16, 16),
    "c.weight": (16, 48), "conv.weight": (8, 3, 3, 3), "head.weight": (5, 8), "head.bias": (5,),
    "mha.in_proj_weight": (48, 16),
}  # fmt: skip
CONFIG: dict[str, object] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "fan_in_fan_out": False}


def factors(module: str, ins: int, outs: int, rank: int = RANK, name: str = "") -> dict[str, Shape]:
    return {
        f"{P}{module}.lora_A{name}.weight": (rank, ins),
        f"{P}{module}.lora_B{name}.weight": (outs, rank),
    }


def place(adapter: dict[str, Shape], config: dict[str, object], base: dict[str, Shape]) -> AdapterPlan:
    return place_adapter(read_peft(adapter, config), adapter, base)


def lora_of(fold: Fold) -> FoldLora:
    assert isinstance(fold.operation, FoldLora)
    return fold.operation


def planned(adapter: dict[str, Shape], **config: object) -> AdapterPlan:
    return place(adapter, CONFIG | config, BASE)


def test_each_factor_finds_its_weight() -> None:
    """Saved keys and keys of the live model give the same folds."""
    (fold,) = planned(factors("q", 16, 24)).folds
    assert (fold.key, fold.factors) == ("q.weight", (f"{P}q.lora_A.weight", f"{P}q.lora_B.weight"))
    assert fold.operation == FoldLora(4.0)
    (live,) = planned(factors("q", 16, 24, name=".default")).folds
    assert (live.key, live.operation) == ("q.weight", FoldLora(4.0))


def test_embeddings_and_convolutions_have_factors_of_their_own() -> None:
    adapter: dict[str, Shape] = {
        f"{P}emb.lora_embedding_A": (RANK, 31),
        f"{P}emb.lora_embedding_B": (16, RANK),
        f"{P}conv.lora_A.weight": (RANK, 3, 3, 3),
        f"{P}conv.lora_B.weight": (8, RANK, 1, 1),
    }
    emb, conv = planned(adapter).folds
    assert (emb.key, emb.operation) == ("emb.weight", FoldLora(4.0, fan_in_fan_out=True))
    assert (conv.key, conv.operation) == ("conv.weight", FoldLora(4.0))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 8.0),
        ({"alpha_pattern": {"q": 2}}, 0.5),
        ({"alpha_pattern": {"k": 2}}, 4.0),
        ({"alpha_pattern": {"^q": 2, "q": 8}}, 0.5),
        ({"alpha_pattern": {"[pq]|x": 2}}, 0.5),
        ({"rank_pattern": {"q": 4}, "r": 64}, 4.0),
    ],
    ids=["rslora", "alpha", "another module's", "the first that fits", "a regular expression", "rank"],
)
def test_the_scale_follows_the_config_and_its_patterns(config: dict[str, object], scale: float) -> None:
    (fold,) = planned(factors("q", 16, 24), **config).folds
    assert lora_of(fold).scale == scale


def test_a_pattern_fits_whole_names_between_dots() -> None:
    """As in peft, ``proj`` matches the last name of a path and not a part of a name."""
    base: dict[str, Shape] = {"a.proj.weight": (24, 16), "a.qproj.weight": (24, 16)}
    adapter = factors("a.proj", 16, 24) | factors("a.qproj", 16, 24)
    made = place(adapter, CONFIG | {"alpha_pattern": {"proj": 2}}, base)
    assert [lora_of(fold).scale for fold in made.folds] == [0.5, 4.0]


@pytest.mark.parametrize("configured", [False, True])
def test_the_shape_tells_how_a_weight_is_stored(*, configured: bool) -> None:
    """The shape decides for a weight that is not square, and the config for a square one."""
    (plain,) = planned(factors("q", 16, 24), fan_in_fan_out=configured).folds
    (turned,) = planned(factors("c", 16, 48), fan_in_fan_out=configured).folds
    (square,) = planned(factors("sq", 16, 16), fan_in_fan_out=configured).folds
    assert [lora_of(fold).fan_in_fan_out for fold in (plain, turned, square)] == [False, True, configured]


def test_whole_modules_and_biases_are_replaced() -> None:
    """``modules_to_save`` and trained biases replace tensors of the base, also in another shape."""
    adapter = factors("q", 16, 24) | {
        f"{P}head.weight": (7, 8),
        f"{P}head.modules_to_save.default.bias": (7,),
        f"{P}q.base_layer.bias": (24,),
    }
    made = planned(adapter)
    assert made.replacements == {
        "head.weight": f"{P}head.weight",
        "head.bias": f"{P}head.modules_to_save.default.bias",
        "q.bias": f"{P}q.base_layer.bias",
    }


def test_an_update_of_a_replaced_weight_folds_into_the_new_one() -> None:
    """An embedding with a larger vocabulary is replaced and then folded."""
    adapter: dict[str, Shape] = {
        f"{P}emb.base_layer.weight": (40, 16),
        f"{P}emb.lora_embedding_A": (RANK, 40),
        f"{P}emb.lora_embedding_B": (16, RANK),
    }
    made = planned(adapter)
    assert made.replacements == {}
    assert [(fold.key, fold.replaced_by) for fold in made.folds] == [("emb.weight", f"{P}emb.base_layer.weight")]


def test_the_bias_of_a_factor_has_a_fold_of_its_own() -> None:
    made = planned(factors("q", 16, 24) | {f"{P}q.lora_B.bias": (24,)})
    assert [(fold.key, fold.factors) for fold in made.folds][1] == ("q.bias", (f"{P}q.lora_B.bias",))
    assert made.folds[1].operation == FoldLora(4.0)


@pytest.mark.parametrize(
    ("adapter", "config", "reason"),
    [
        (
            factors("q", 16, 24), {"peft_type": "VERA"},
            (
                "the type of the adapter is VERA, which cannot be folded; "
                "LORA, ADALORA, LOHA, LOKR, IA3, LN_TUNING, TRAINABLE_TOKENS can"
            ),
        ),
        (
            factors("q", 16, 24), {"peft_type": "LOHA", "alpha": 1},
            f"'{P}q.lora_A.weight' is not a factor of LOHA",
        ),
        (
            factors("q", 16, 24) | {f"{P}q.lora_magnitude_vector": (24,)}, {},
            f"'{P}q.lora_magnitude_vector' belongs to DoRA, and use_dora of the config is not true",
        ),
        (
            factors("q", 16, 24), {"use_dora": True},
            f"'{P}q.lora_A.weight' belongs to DoRA, and has no lora_magnitude_vector beside it",
        ),
        (
            factors("q", 16, 24), {"use_bdlora": {"nblocks": 2}},
            "the adapter uses use_bdlora, which cannot be folded",
        ),
        (
            factors("q", 16, 24), {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changed the base before training",
        ),
        (factors("z", 16, 24), {}, f"of 2 tensors, '{P}z.lora_A.weight' and 1 more have no matching key in the base"),
        (
            factors("q", 16, 24) | {f"{P}z.weight": (1,)}, {},
            f"of 3 tensors, '{P}z.weight' has no matching key in the base",
        ),
        (
            factors("k", 16, 24) | {f"{P}k.lora_B.bias": (24,)}, {},
            f"of 3 tensors, '{P}k.lora_B.bias' has no matching key in the base",
        ),
        (
            factors("k", 16, 24) | {f"{P}q.lora_B.bias": (24,)}, {},
            f"'{P}q.lora_B.bias' has no factors lora_A and lora_B",
        ),
        (factors("k", 16, 24) | {f"{P}q.lora_A.bias": (4,)}, {}, f"'{P}q.lora_A.bias' is not a tensor of an adapter"),
        ({f"{P}q.lora_A.weight": (RANK, 16)}, {}, f"'{P}q.lora_A.weight' has no partner in the adapter"),
        ({f"{P}head.weight": (5, 8)}, {}, "none of 1 tensor is a factor of the adapter, such as lora_A or lora_B"),
        (
            factors("q", 16, 24, name=".one") | factors("k", 16, 24, name=".two"), {},
            "there are 2 adapters ('one', 'two')",
        ),
        (
            factors("q", 16, 24) | factors("q", 16, 24, name=".one"), {},
            f"'{P}q.lora_A.weight' and '{P}q.lora_A.one.weight' have the same place in the base",
        ),
        (factors("q", 16, 24, rank=8), {}, f"'{P}q.lora_A.weight' is [8, 16], but the rank in the config is 4"),
        (
            factors("q", 16, 25), {},
            "'q.weight': fold_lora: A of [4, 16] and B of [25, 4] make [25, 16], but W is [24, 16]",
        ),
        (
            factors("mha", 16, 48), {},
            f"'{P}mha.lora_A.weight' adapts an attention block, where peft adds the update of out_proj twice",
        ),
        (
            factors("q", 16, 24) | factors("sq", 16, 16), {"fan_in_fan_out": True},
            "fan_in_fan_out is true, which the shape of 'q.weight' contradicts; 'sq.weight' is square and cannot tell",
        ),
        (factors("q", 16, 24), {"r": "4"}, "the config's r is '4'"),
        (factors("q", 16, 24), {"lora_alpha": True}, "the config's lora_alpha is True"),
        (factors("q", 16, 24), {"lora_alpha": math.nan}, "the config's lora_alpha is nan"),
        (factors("q", 16, 24), {"alpha_pattern": [1]}, "the config's alpha_pattern is not a table"),
        (factors("q", 16, 24), {"alpha_pattern": {"q": None}}, "the config's alpha_pattern is None"),
        (
            factors("q", 16, 24), {"alpha_pattern": {"(q": 1}},
            "the pattern '(q' of alpha_pattern is not a valid regular expression",
        ),
        (
            factors("q", 16, 24), {"alpha_pattern": {"(q+)+$": 1}},
            "the pattern '(q+)+$' of alpha_pattern has too many repetitions",
        ),
        (
            factors("q", 16, 24), {"rank_pattern": {".*.*.*.*x": 1}},
            "the pattern '.*.*.*.*x' of rank_pattern has too many repetitions",
        ),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_folded_are_refused(
    adapter: dict[str, Shape], config: dict[str, object], reason: str
) -> None:
    """The error names the tensor or the option, before any tensor is read."""
    with pytest.raises(RuleError) as caught:
        planned(adapter, **config)
    assert caught.value.reason == reason


def test_a_config_without_a_rank_is_refused() -> None:
    with pytest.raises(RuleError, match="the config has no r "):
        place(factors("q", 16, 24), {"lora_alpha": 1}, BASE)
