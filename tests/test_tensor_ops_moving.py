"""Operations that move elements describe their outputs, keep every bit, and have exact inverses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape
from ckptkit.tensor_ops.registry import (
    NAMES,
    apply_chain,
    chain_dtypes,
    chain_shapes,
    invert_chain,
    parse_operation,
    parse_operations,
)
from tests.helpers_tensor_ops import MOVABLE, MOVES, random_bits, same

sizes = st.integers(0, 4)
some = st.integers(1, 3)


def shape_of(rank: int) -> st.SearchStrategy[Shape]:
    return st.tuples(*([sizes] * rank))


@st.composite
def moves(draw: st.DrawFn) -> tuple[dict[str, Any], list[Shape]]:
    """An operation that moves elements, and shapes that it accepts."""
    name = draw(st.sampled_from(MOVES))
    rank = draw(st.integers(1, 4))
    shape = draw(shape_of(rank))
    dim = draw(st.integers(-rank, rank - 1))
    count = draw(some)
    block = draw(some)

    def along(size: int) -> Shape:
        return tuple(size if at == dim % rank else old for at, old in enumerate(shape))

    if name == "transpose":
        return {name: {"dim0": dim, "dim1": draw(st.integers(-rank, rank - 1))}}, [shape]
    if name == "permute":
        signs = draw(st.permutations(range(rank)))
        return {name: {"dims": [at - rank * draw(st.integers(0, 1)) for at in signs]}}, [shape]
    if name == "reshape":
        wanted = [shape[at] for at in draw(st.permutations(range(rank)))]
        return {name: {"shape": [1, *wanted]}}, [shape]
    if name == "slice":
        start = draw(st.integers(0, shape[dim]))
        return {name: {"dim": dim, "start": start, "stop": draw(st.integers(start, shape[dim]))}}, [shape]
    if name == "split":
        cuts = draw(st.lists(sizes, min_size=1, max_size=4))
        return {name: {"dim": dim, "sizes": cuts}}, [along(sum(cuts))]
    if name == "concat":
        return {name: {"dim": dim}}, [along(size) for size in draw(st.lists(sizes, min_size=1, max_size=4))]
    if name == "stack":
        return {name: {"dim": draw(st.integers(-rank - 1, rank))}}, [shape] * count
    if name == "unstack":
        return {name: {"dim": dim, "parts": count}}, [along(count)]
    if name == "interleave":
        return {name: {"dim": dim, "block": block}}, [along(block * draw(sizes))] * count
    if name == "deinterleave":
        return {name: {"dim": dim, "parts": count, "block": block}}, [along(count * block * draw(sizes))]
    if name == "rope_permute":
        direction = draw(st.sampled_from(["to_hf", "to_original"]))
        rows = 2 * count * draw(sizes)
        return {name: {"heads": count, "direction": direction}}, [(rows, *shape[1:])]
    kv_heads, share, head_dim = count, draw(some), draw(some)
    layout = draw(st.sampled_from(["concat", "interleaved"]))
    params = {"heads": kv_heads * share, "kv_heads": kv_heads, "layout": layout, "dim": dim}
    query, key = along(kv_heads * share * head_dim), along(kv_heads * head_dim)
    if name == "split_qkv":
        return {name: params}, [along(kv_heads * (share + 2) * head_dim)]
    return {name: params}, [query, key, key]


@settings(max_examples=400, deadline=None)
@given(moves(), st.sampled_from(MOVABLE))
def test_moving_is_inverted_bit_for_bit(move: tuple[dict[str, Any], list[Shape]], code: str) -> None:
    """The inverse restores every bit, and the described shapes are the shapes of the outputs."""
    table, shapes = move
    operation = parse_operation(table)
    tensors = [random_bits(shape, code, seed) for seed, shape in enumerate(shapes)]
    made = operation.apply(tensors)
    assert tuple(tuple(tensor.shape) for tensor in made) == operation.shapes(shapes)
    assert operation.dtypes([code] * len(shapes)) == (code,) * len(made)
    assert all(str(tensor.dtype) == str(tensors[0].dtype) for tensor in made)
    inverse = operation.inverse(shapes)
    assert (inverse is None) == operation.lossy == (operation.name == "slice")
    if inverse is not None:
        assert inverse.shapes(operation.shapes(shapes)) == tuple(shapes)
        back = inverse.apply(made)
        assert len(back) == len(tensors)
        assert all(same(one, other) for one, other in zip(back, tensors, strict=True))


@given(moves())
def test_parameters_survive_json(move: tuple[dict[str, Any], list[Shape]]) -> None:
    """The parameters of an operation give an equal operation."""
    operation = parse_operation(move[0])
    assert parse_operation(json.loads(json.dumps({operation.name: operation.params()}))) == operation


def test_every_move_is_drawn() -> None:
    """Each name in ``MOVES`` is an operation; the tests of values hold all other operations."""
    assert set(MOVES) <= set(NAMES)


NUMBERS = torch.arange(24.0)


def only(table: Any, *tensors: torch.Tensor) -> torch.Tensor:
    (made,) = parse_operation(table).apply(tensors)
    return made


@pytest.mark.parametrize(
    ("table", "shape", "wanted"),
    [
        ("transpose", (4, 6), lambda t: t.T),
        ({"transpose": {"dim0": 0, "dim1": -1}}, (2, 3, 4), lambda t: t.transpose(0, 2)),
        ({"permute": {"dims": [3, 2, 0, 1]}}, (1, 2, 3, 4), lambda t: t.permute(3, 2, 0, 1)),
        ({"reshape": {"shape": [3, -1]}}, (2, 12), lambda t: t.view(3, 8)),
        ({"slice": {"dim": 1, "start": 1, "stop": 3}}, (4, 6), lambda t: t[:, 1:3]),
        ({"slice": {"start": 1}}, (4, 6), lambda t: t[1:]),
    ],
    ids=["transpose", "transpose dims", "HWIO to OIHW", "reshape", "slice", "slice to the end"],
)
def test_one_tensor_is_moved_as_torch_moves_it(table: Any, shape: Shape, wanted: Any) -> None:
    assert torch.equal(only(table, NUMBERS.view(shape)), wanted(NUMBERS.view(shape)))


def test_interleave_gate_and_up() -> None:
    """Row 0 of gate, row 0 of up, row 1 of gate, and so on, or in blocks."""
    gate, up = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11, 12, 13])
    assert only("interleave", gate, up).tolist() == [0, 10, 1, 11, 2, 12, 3, 13]
    assert only({"interleave": {"block": 2}}, gate, up).tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
def test_rope_rows_follow_the_published_conversion(*, bias: bool) -> None:
    """Both orders follow from the rotation: pair i is rows (2i, 2i+1), or rows (i, i + half)."""
    heads, head_dim, width = 3, 8, 5
    shape = (heads * head_dim,) if bias else (heads * head_dim, width)
    original = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = only({"rope_permute": {"heads": heads, "direction": "to_hf"}}, original)
    for head in range(heads):
        for pair in range(head_dim // 2):
            first = head * head_dim
            assert torch.equal(made[first + pair], original[first + 2 * pair])
            assert torch.equal(made[first + pair + head_dim // 2], original[first + 2 * pair + 1])


def test_rotating_gives_the_same_scores_after_the_permutation() -> None:
    """Each order, rotated in its own way, gives the same attention scores."""
    heads, head_dim, width = 2, 6, 7
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(heads * head_dim, width, generator=generator, dtype=torch.float64) for _ in "qk")
    states = torch.randn(4, width, generator=generator, dtype=torch.float64)
    angles = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.3, 0.05])).double()

    def side_by_side(weight: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((states @ weight.T).view(4, heads, head_dim // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    def half_apart(weight: torch.Tensor) -> torch.Tensor:
        one, other = (states @ weight.T).view(4, heads, head_dim).chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)

    scores = torch.einsum("qhd,khd->hqk", side_by_side(query), side_by_side(key))
    table = {"rope_permute": {"heads": heads, "direction": "to_hf"}}
    permuted = torch.einsum("qhd,khd->hqk", half_apart(only(table, query)), half_apart(only(table, key)))
    torch.testing.assert_close(permuted, scores)


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)], ids=["one each", "grouped", "one for all"])
@pytest.mark.parametrize("layout", ["concat", "interleaved"])
def test_fused_rows_have_the_layout(layout: str, heads: int, kv_heads: int, *, bias: bool) -> None:
    """Each row of the fused projection equals the row of its source."""
    head_dim, share = 3, heads // kv_heads
    rows = (heads + 2 * kv_heads) * head_dim
    fused = torch.arange(float(rows)) if bias else torch.arange(float(rows * 2)).view(rows, 2)
    table = {"split_qkv": {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "layout": layout}}
    query, key, value = parse_operation(table).apply([fused])
    heads_of = fused.view(heads + 2 * kv_heads, head_dim, *fused.shape[1:])
    for head in range(heads):
        at = head if layout == "concat" else head // share * (share + 2) + head % share
        assert torch.equal(query[head * head_dim : (head + 1) * head_dim], heads_of[at])
    for head in range(kv_heads):
        at = heads + head if layout == "concat" else head * (share + 2) + share
        assert torch.equal(key[head * head_dim : (head + 1) * head_dim], heads_of[at])
        at = heads + kv_heads + head if layout == "concat" else head * (share + 2) + share + 1
        assert torch.equal(value[head * head_dim : (head + 1) * head_dim], heads_of[at])


@pytest.mark.parametrize(
    ("table", "shapes", "reason"),
    [
        ("transpose", [(2, 3, 4)], "transpose: [2, 3, 4] is not a matrix"),
        ("transpose", [(2, 3), (2, 3)], "transpose: takes one tensor, not 2"),
        ({"transpose": {"dim0": 0, "dim1": 2}}, [(2, 3)], "transpose: [2, 3] has no dim 2"),
        ({"permute": {"dims": [0, 0]}}, [(2, 3)], "permute: dims [0, 0] must name each dim of [2, 3] once"),
        ({"reshape": {"shape": [5]}}, [(2, 3)], "reshape: [2, 3] has 6 elements, but [5] has 5"),
        ({"reshape": {"shape": [4, -1]}}, [(2, 3)], "reshape: the 6 elements of [2, 3] do not fill [4, -1]"),
        ({"reshape": {"shape": [0, -1]}}, [(0, 3)], "reshape: the 0 elements of [0, 3] do not fill [0, -1]"),
        ({"slice": {"stop": 4}}, [(3, 2)], "slice: dim 0 of [3, 2] does not have the rows from 0 to 4"),
        ({"split": {"sizes": [4, 2, 1]}}, [(8, 3)], "split: dim 0 of [8, 3] is 8, but 4 + 2 + 1 = 7"),
        ({"split": {"parts": 3}}, [(8, 3)], "split: dim 0 of [8, 3] cannot be divided into 3 equal parts"),
        ("concat", [], "concat: there is no tensor to join"),
        ("concat", [()], "concat: [] has no dim 0"),
        ("concat", [(2, 3), (2, 4)], "concat: [2, 3] and [2, 4] differ in more than dim 0"),
        ("concat", [(2, 3), (2,)], "concat: [2, 3] and [2] differ in more than dim 0"),
        ("stack", [(2, 3), (2, 4)], "stack: the tensors differ in shape: [2, 3] and [2, 4]"),
        ({"unstack": {"parts": 4}}, [(3, 2)], "unstack: dim 0 of [3, 2] is 3, not 4"),
        ({"interleave": {"block": 2}}, [(3,), (3,)], "interleave: dim 0 of [3] is not divisible into blocks of 2"),
        ("deinterleave", [(3, 2)], "deinterleave: dim 0 of [3, 2] is not divisible into 2 parts in blocks of 1"),
        ({"split_qkv": {"heads": 2}}, [(7, 4)], "split_qkv: dim 0 of [7, 4] is not 6 heads"),
        ({"split_qkv": {"heads": 2, "head_dim": 3}}, [(12, 4)], "split_qkv: dim 0 of [12, 4] is not 6 heads of 3"),
        (
            {"fuse_qkv": {"heads": 4, "kv_heads": 2}}, [(8, 4), (8, 4), (4, 4)],
            "fuse_qkv: the key is [8, 4], but a query of [8, 4] needs [4, 4]",
        ),
        ({"fuse_qkv": {"heads": 4}}, [(8, 4)], "fuse_qkv: takes query, key and value, not 1 tensor"),
        (
            {"rope_permute": {"heads": 2, "direction": "to_hf"}}, [(6, 4)],
            "rope_permute: the rows of [6, 4] cannot be divided into 2 heads of pairs",
        ),
    ],
)  # fmt: skip
def test_wrong_shapes_are_refused(table: Any, shapes: list[Shape], reason: str) -> None:
    """``shapes`` and ``apply`` raise the same error, which has the sizes."""
    operation = parse_operation(table)
    with pytest.raises(RuleError) as caught:
        operation.shapes(shapes)
    assert caught.value.reason == reason
    with pytest.raises(RuleError):
        operation.apply([torch.zeros(shape) for shape in shapes])


@pytest.mark.parametrize(
    ("dtypes", "reason"),
    [
        (["F32", "BF16"], "concat: the tensors differ in dtype (BF16, F32)"),
        (["F4", "F4"], "concat: elements of F4 cannot be moved one by one"),
        (["X\n", "X\n"], "concat: elements of 'X\\x0a' cannot be moved one by one"),
    ],
    ids=["two dtypes", "packed", "made up"],
)
def test_wrong_dtypes_are_refused(dtypes: list[str], reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_operation("concat").dtypes(dtypes)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("value", "reason", "hint"),
    [
        ("transpoze", "there is no operation 'transpoze'", "did you mean 'transpose'?"),
        ({"qqq": {}}, "there is no operation 'qqq'", "known: "),
        ({"split": {"sizes": [1], "axis": 0}}, "split has no parameter 'axis'", "its parameters: dim, sizes, parts"),
        ("permute", "permute needs dims", "its parameters: dims"),
        ("split", "split: needs either sizes or parts", None),
        ({"split": {"sizes": [1], "parts": 1}}, "split: needs either sizes or parts", None),
        ({"split": {"parts": True}}, "split: parts: True is not an integer", None),
        ({"split": {"parts": 1.0}}, "split: parts: 1.0 is not an integer", None),
        ({"split": {"parts": 0}}, "split: cannot split into 0", None),
        ({"split": {"sizes": []}}, "split: cannot split into []", None),
        ({"split": {"sizes": [3, -1]}}, "split: cannot split into [3, -1]", None),
        ({"split": {"sizes": "n"}}, "split: sizes: 'n' is not a list of integers", None),
        ({"split": {"sizes": ["m"]}}, "split: sizes: 'm' uses the unknown variable 'm'", "known: n"),
        ({"split": 3}, "the parameters of split are not a table", "split = { NAME = VALUE, ... }"),
        ({"split": {"parts": 2**64}}, "split: parts: an integer must not have more than 64 bits", None),
        ({"transpose": {"dim0": 1}}, "transpose: needs both dim0 and dim1, or neither", None),
        ({"reshape": {"shape": [-1, -1]}}, "reshape: [-1, -1] is not a valid shape", None),
        ({"slice": {"start": 3, "stop": 2}}, "slice: 3 to 2 is not a valid range", None),
        ({"unstack": {"parts": 0}}, "unstack: cannot unstack into 0 parts", None),
        ({"interleave": {"block": 0}}, "interleave: block is 0, not at least 1", None),
        ({"deinterleave": {"parts": 0}}, "deinterleave: cannot distribute blocks of 1 to 0 parts", None),
        ({"split_qkv": {"heads": 4, "kv_heads": 3}}, "split_qkv: 4 heads cannot share 3 key-value heads evenly", None),
        ({"split_qkv": {"heads": 0}}, "split_qkv: 0 heads cannot share 0 key-value heads evenly", None),
        ({"split_qkv": {"heads": 4, "head_dim": 0}}, "split_qkv: head_dim is 0, not at least 1", None),
        ({"split_qkv": {"heads": 4, "layout": "x"}}, "split_qkv: layout is 'x'", "it must be concat or interleaved"),
        ({"split_qkv": {"heads": 4, "layout": 1}}, "split_qkv: layout: 1 is not a string", None),
        ({"rope_permute": {"heads": 1, "direction": "x"}}, "rope_permute: direction is 'x'", "it must be to_hf or"),
        ({"rope_permute": {"heads": 0, "direction": "to_hf"}}, "rope_permute: heads is 0, not at least 1", None),
        ({"stack": {}, "concat": {}}, "an operation is one name with its parameters, not 2 names", "for example"),
        ([], "the list of operations is empty", None),
        ([3], "an operation must be a name or a table, not 3", None),
    ],
)
def test_wrong_parameters_are_refused(value: Any, reason: str, hint: str | None) -> None:
    """The error names the operation and the parameter; the hint lists the choices."""
    with pytest.raises(RuleError) as caught:
        parse_operations(value, {"n": 3})
    assert caught.value.reason == reason
    assert (caught.value.hint or "").startswith(hint or "")


def test_parameters_are_arithmetic_with_variables() -> None:
    """Parameters of a rule file are evaluated once, when the file is read."""
    variables = {"heads": 4, "kv": 2, "hd": 8}
    operation = parse_operation({"split": {"sizes": ["heads*hd", "kv*hd", "kv*hd"]}}, variables)
    assert operation == parse_operation({"split": {"sizes": [32, 16, 16]}})
    assert str(operation) == "split(dim=0, sizes=[32, 16, 16])"


def test_a_chain_runs_in_order_and_is_inverted() -> None:
    """A transpose and a split of a Conv1D are inverted with every bit."""
    chain = parse_operations(["transpose", {"split_qkv": {"heads": 2, "layout": "interleaved"}}])
    fused = random_bits((4, 12), "BF16")
    assert chain_shapes(chain, [(4, 12)]) == ((4, 4),) * 3
    assert chain_dtypes(chain, ["BF16"]) == ("BF16",) * 3
    made = apply_chain(chain, [fused])
    back = invert_chain(chain, [(4, 12)])
    assert back is not None
    assert [operation.name for operation in back] == ["fuse_qkv", "transpose"]
    assert same(apply_chain(back, made)[0], fused)
    assert invert_chain(parse_operations(["transpose", {"slice": {"stop": 2}}]), [(4, 12)]) is None


def test_conjugated_and_negated_views_move_as_their_values() -> None:
    """A lazy conjugate is resolved before its bits are moved."""
    tensor = torch.tensor([[1 + 2j, 3 - 4j]])
    assert torch.equal(only("transpose", tensor.conj()), torch.tensor([[1 - 2j], [3 + 4j]]))
