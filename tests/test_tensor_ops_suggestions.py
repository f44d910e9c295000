"""Operations for a shape mismatch are found by the shapes, and by the key where shapes are not enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.errors import RuleError
from ckptkit.tensor_ops.mismatch import MISMATCH_NAMES
from ckptkit.tensor_ops.operation import Shape
from ckptkit.tensor_ops.registry import parse_operation
from ckptkit.tensor_ops.suggestions import suggest, suggestions

POS = "vit.pos_embed"


@pytest.mark.parametrize(
    ("name", "found", "expected", "key", "made"),
    [
        ("resize_pos_embed", (1, 197, 8), (1, 577, 8), POS, {"new": [24, 24], "old": [14, 14], "prefix": 1}),
        ("resize_pos_embed", (196, 8), (64, 8), "position_embedding.weight", {"new": [8, 8], "old": [14, 14]}),
        ("resize_pos_embed", (1, 198, 8), (1, 578, 8), POS, {"new": [24, 24], "old": [14, 14], "prefix": 2}),
        ("resize_pos_embed", (1, 201, 8), (1, 261, 8), POS, {"new": [16, 16], "old": [14, 14], "prefix": 5}),
        ("resize_pos_embed", (77, 8), (154, 8), "positional_embedding", None),
        ("resize_pos_embed", (197, 8), (577, 8), "head.weight", None),
        ("resize_pos_embed", (1, 197, 8), (1, 577, 9), POS, None),
        ("resize_pos_embed", (2, 197, 8), (2, 577, 8), POS, None),
        ("resize_pos_embed", (169, 4), (225, 4), "relative_position_bias_table", None),
        ("resize_pos_embed", (169, 4), (225, 4), "attn.rel_pos", None),
        ("resize_pos_embed", (197,), (577,), POS, None),
        ("resize_pos_embed", (4, 8), (9, 8), "compose.weight", None),
        ("resize_pos_embed_1d", (77, 8), (154, 8), "positional_embedding", {"new": [154], "old": [77]}),
        ("resize_pos_embed_1d", (0, 8), (154, 8), "positional_embedding", None),
        ("conv_in_channels", (8, 3, 7, 7), (8, 1, 7, 7), "conv1.weight", {"channels": 1}),
        ("conv_in_channels", (8, 3, 7, 7), (8, 5, 7, 7), "conv1.weight", {"channels": 5}),
        ("conv_in_channels", (8, 64, 7, 7), (8, 128, 7, 7), "conv1.weight", None),
        ("conv_in_channels", (8, 3, 7, 7), (9, 1, 7, 7), "conv1.weight", None),
        ("conv_in_channels", (8, 3, 7, 7), (8, 0, 7, 7), "conv1.weight", None),
        ("transpose", (4, 6), (6, 4), "w", {}),
        ("transpose", (4, 6), (6, 5), "w", None),
        ("permute", (3, 3, 4, 8), (8, 4, 3, 3), "w", {"dims": [3, 2, 0, 1]}),
        ("permute", (3, 4, 8), (8, 4, 3), "w", {"dims": [2, 1, 0]}),
        ("permute", (8, 4, 3, 3), (3, 3, 4, 8), "w", None),
        ("permute", (4, 6), (6, 4), "w", None),
        ("reshape", (8, 1, 1, 4), (8, 4), "w", {"shape": [8, 4]}),
        ("reshape", (8, 48), (8, 3, 4, 4), "w", {"shape": [8, 3, 4, 4]}),
        ("reshape", (1,), (), "w", {"shape": []}),
        ("reshape", (4, 2), (2, 4), "w", None),
        ("reshape", (4, 6), (8, 3), "w", None),
        ("reshape", (0, 2), (0,), "w", None),
        ("slice", (10, 84), (4, 84), "w", {"dim": 0, "start": 0, "stop": 4}),
        ("slice", (10, 84), (10, 60), "w", {"dim": 1, "start": 0, "stop": 60}),
        ("slice", (4, 84), (10, 84), "w", None),
        ("slice", (10, 84), (4, 80), "w", None),
        ("slice", (10,), (4, 80), "w", None),
        ("pad", (4, 84), (10, 84), "w", {"size": 10}),
        ("pad", (0, 84), (10, 84), "w", {"size": 10}),
        ("pad_mean", (4, 84), (10, 84), "w", {"size": 10, "fill": "mean"}),
        ("pad_mean", (0, 84), (10, 84), "w", None),
        ("pad_normal", (4, 84), (4, 90), "w", {"size": 90, "dim": 1, "fill": "normal"}),
        ("pad", (10, 84), (4, 84), "w", None),
    ],
)
def test_an_operation_is_found_for_its_shapes(
    name: str, found: Shape, expected: Shape, key: str, made: dict[str, object] | None
) -> None:
    operation = suggest(name, found, expected, key)
    kind = "pad" if name.startswith("pad") else name.removesuffix("_1d")
    assert operation == (None if made is None else parse_operation({kind: made}))
    assert operation is None or operation.shapes([found]) == (expected,)
    assert (name in dict(suggestions(found, expected, key))) == (made is not None)


@pytest.mark.parametrize(
    ("found", "expected", "key", "names"),
    [
        ((1, 197, 8), (1, 577, 8), POS, ["resize_pos_embed", "resize_pos_embed_1d", "pad_mean", "pad_normal", "pad"]),
        ((1024, 8), (256, 8), "wpe.weight", ["resize_pos_embed_1d", "resize_pos_embed", "slice"]),
        ((256, 8), (64, 8), "vision.position_embedding", ["resize_pos_embed", "resize_pos_embed_1d", "slice"]),
        ((50, 8), (197, 8), "position_embedding", ["resize_pos_embed", "resize_pos_embed_1d", "pad_mean"]),
        ((8, 3, 7, 7), (8, 1, 7, 7), "conv1.weight", ["conv_in_channels", "slice"]),
        ((10, 84), (4, 84), "fc.weight", ["slice"]),
        ((4, 6), (6, 4), "fc.weight", ["transpose"]),
        ((4, 6), (7, 5), "fc.weight", []),
        ((4, 6), (4, 6), "fc.weight", ["reshape"]),
    ],
    ids=["image", "text that looks square", "image by name", "class token", "first convolution", "head", "kernel",
         "none", "no mismatch"],
)  # fmt: skip
def test_the_best_comes_first(found: Shape, expected: Shape, key: str, names: list[str]) -> None:
    assert [name for name, _ in suggestions(found, expected, key)][: len(names) or None] == names


@pytest.mark.parametrize(
    ("found", "expected", "key", "why"),
    [
        ((1, 197, 8), (1, 577, 8), POS, "a 14 x 14 grid becomes 24 x 24, one prefix token kept"),
        ((1, 198, 8), (1, 578, 8), POS, "a 14 x 14 grid becomes 24 x 24, two prefix tokens kept"),
        ((1, 196, 8), (1, 576, 8), POS, "a 14 x 14 grid becomes 24 x 24"),
        ((77, 8), (1054, 8), "wpe", "77 positions in a row become 1,054"),
        ((8, 3, 7, 7), (8, 1, 7, 7), "w", "3 input channels become 1, summed"),
        ((8, 3, 7, 7), (8, 4, 7, 7), "w", "3 input channels become 4, repeated and scaled by 3/4"),
        ((10, 84), (4, 84), "w", "the first 4 of 10 rows are kept"),
        ((84, 10), (84, 4), "w", "the first 4 of 10 along dim 1 are kept"),
        ((4, 84), (10, 84), "w", "6 rows of their mean are added after the first 4"),
    ],
)
def test_a_suggestion_describes_its_effect(found: Shape, expected: Shape, key: str, why: str) -> None:
    assert suggestions(found, expected, key)[0][1] == why


shapes = st.lists(st.integers(0, 20), max_size=4).map(tuple)


@given(shapes, shapes, st.sampled_from([POS, "fc.weight", "relative_position_bias_table"]))
def test_every_suggestion_gives_the_shape(found: Shape, expected: Shape, key: str) -> None:
    """Each suggested operation describes an output of the expected shape."""
    for name, why in suggestions(found, expected, key):
        operation = suggest(name, found, expected, key)
        assert operation is not None
        assert why
        assert operation.shapes([found]) == (expected,)


def test_other_names_are_refused() -> None:
    with pytest.raises(RuleError) as caught:
        suggest("fold_lora", (1,), (2,), "w")
    assert caught.value.reason == "'fold_lora' is not an operation for a mismatch"
    assert caught.value.hint == f"one of {', '.join(MISMATCH_NAMES)}"
    assert sorted(MISMATCH_NAMES) == list(MISMATCH_NAMES)


@pytest.mark.parametrize("shape", [(1, 0), (1, 4, 0), ()], ids=str)
def test_empty_tensors_are_not_grids(shape: Shape) -> None:
    """Tables without columns and scalars are not position embeddings."""
    assert suggest("resize_pos_embed", shape, shape, POS) is None
