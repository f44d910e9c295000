"""Operations that compute have the values of torch in F32 or F64, rounded once, and keep all other bits."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.utils import fusion, parametrizations, prune, weight_norm

from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape
from ckptkit.tensor_ops.registry import NAMES, parse_operation
from tests.helpers_tensor_ops import MOVABLE, MOVES, as_integers, dtype_of, random_bits, same

FLOATS = ("F16", "BF16", "F32", "F64")
TABLES: dict[str, tuple[dict[str, Any], list[Shape]]] = {
    "cast": ({"dtype": "BF16"}, [(3, 4)]),
    "dequantize": ({}, [(3, 4)]),
    "quantize": ({"form": "int8"}, [(3, 4)]),
    "scale": ({"factor": 0.3}, [(3, 4)]),
    "add": ({"value": 1}, [(3, 4)]),
    "maximum": ({}, [(3, 4), (3, 4), (3, 4)]),
    "pad": ({"size": 9, "fill": "normal", "seed": 3}, [(5, 4)]),
    "pad number": ({"size": 9, "fill": 2.5}, [(5, 4)]),
    "resize_pos_embed": ({"new": [3, 5], "old": [4, 4], "prefix": 2}, [(1, 18, 8)]),
    "resize_pos_embed 1d": ({"new": [7]}, [(5, 8)]),
    "conv_in_channels": ({"channels": 4}, [(2, 3, 5, 5)]),
    "conv_in_channels base": ({"channels": 1, "base": 3}, [(2, 12, 5, 5)]),
    "fold_weight_norm": ({"dim": 1}, [(1, 5, 1), (4, 5, 3)]),
    "fold_spectral_norm": ({"dim": 1}, [(4, 5, 3), (5,), (12,)]),
    "fold_mask": ({}, [(4, 5), (4, 5)]),
    "fold_batch_norm": ({"eps": 0.001, "transposed": True}, [(3, 4, 2, 2), (4,), (4,), (4,), (4,), (4,)]),
    "fold_lora": ({"alpha": 16, "r": 2, "rslora": True, "fan_in_fan_out": True}, [(6, 4), (2, 6), (4, 2)]),
    "fold_lora bias": ({"scale": 2.0}, [(4,), (4,)]),
    "fold_dora": ({"scale": 0.5}, [(4, 3, 2, 2), (2, 3, 2, 2), (4, 2, 1, 1), (1, 4, 1, 1)]),
    "fold_dora inputs": ({"scale": 0.5, "per_input": True}, [(6, 4), (2, 4), (6, 2), (1, 4)]),
    "fold_adalora": ({"scale": 0.5, "fan_in_fan_out": True}, [(6, 4), (2, 6), (4, 2), (2, 1)]),
    "fold_lora_experts": ({"scale": 0.5}, [(3, 4, 5), (6, 5), (4, 6)]),
    "fold_locon": ({"scale": 0.5}, [(6, 4, 3, 2), (2, 4, 1, 1), (6, 3, 1, 1), (3, 2, 3, 2)]),
    "fold_loha": ({"scale": 0.5}, [(6, 4), (6, 2), (2, 4), (6, 2), (2, 4)]),
    "fold_loha kernels": ({"scale": 0.5}, [(6, 4, 3, 3), *[(2, 6), (2, 4)] * 2, *[(2, 2, 3, 3)] * 2]),
    "fold_lokr": ({"scale": 0.5, "w2": 2}, [(6, 4, 3), (3, 2), (2, 1), (1, 6)]),
    "fold_lokr kernels": ({"scale": 0.5, "w1": 2, "w2": 3}, [(6, 4, 3), (3, 1), (1, 2), (2, 2), (2, 2), (2, 2, 3, 1)]),
    "fold_ia3": ({"per_input": True, "fan_in_fan_out": True}, [(6, 4), (6, 1)]),
    "fold_ia3 bias": ({}, [(6,), (1, 6, 1)]),
    "replace_rows": ({"indices": [4, 0]}, [(5, 3), (2, 3)]),
    "lora_alpha": ({"alpha": 0.1}, [(2, 6)]),
    "extract_lora": ({"rank": 2}, [(4, 3, 2, 2), (4, 3, 2, 2)]),
}


def randn(*shape: int, code: str = "F32", seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype_of(code))


def only(table: Any, *tensors: torch.Tensor) -> torch.Tensor:
    (made,) = parse_operation(table).apply(tensors)
    return made


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize(("case", "table", "shapes"), [(case, *row) for case, row in TABLES.items()], ids=TABLES.keys())
def test_descriptions_equal_the_outputs(case: str, table: dict[str, Any], shapes: list[Shape], code: str) -> None:
    """Descriptions equal the outputs, parameters survive JSON, and the inputs are not changed."""
    name = case.partition(" ")[0]
    operation = parse_operation({name: table})
    assert parse_operation(json.loads(json.dumps({name: operation.params()}))) == operation
    tensors = [randn(*shape, code=code, seed=seed).abs() for seed, shape in enumerate(shapes)]
    before = [tensor.clone() for tensor in tensors]
    made = operation.apply(tensors)
    assert all(same(one, other) for one, other in zip(tensors, before, strict=True))
    assert tuple(tuple(tensor.shape) for tensor in made) == operation.shapes(shapes)
    codes = operation.dtypes([code] * len(shapes))
    assert [tensor.dtype for tensor in made] == [dtype_of(made_code) for made_code in codes]
    assert operation.outputs == len(made)
    assert all(tensor.is_contiguous() for tensor in made)
    assert all(tensor.isfinite().all() for tensor in made)
    assert operation.lossy == (operation.inverse(shapes) is None)


def test_every_operation_that_computes_is_in_the_table() -> None:
    assert {case.partition(" ")[0] for case in TABLES} == set(NAMES) - set(MOVES)


@pytest.mark.parametrize("code", MOVABLE)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_padding_keeps_every_bit_and_is_undone(code: str, data: st.DataObject) -> None:
    """Any dtype with a zero can be padded with zeros, and the inverse restores the rows."""
    shape = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    operation = parse_operation({"pad": {"dim": dim, "size": shape[dim] + data.draw(st.integers(0, 3))}})
    tensor = random_bits(shape, code)
    if code == "F8_E8M0":
        with pytest.raises(RuleError, match="pad: F8_E8M0 cannot hold zeros"):
            operation.apply([tensor])
        return
    (made,) = operation.apply([tensor])
    assert (tuple(made.shape),) == operation.shapes([shape])
    added = made.narrow(dim, shape[dim], made.shape[dim] - shape[dim])
    assert not as_integers(added).any()
    inverse = operation.inverse([shape])
    assert inverse is not None
    assert same(inverse.apply([made])[0], tensor)


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_are_padded_with_their_mean(dim: int, code: str) -> None:
    tensor = randn(5, 7, code=code)
    made = only({"pad": {"dim": dim, "size": 9, "fill": "mean"}}, tensor)
    wanted = tensor.double().mean(dim, keepdim=True).to(tensor.dtype)
    added = made.narrow(dim, tensor.shape[dim], 9 - tensor.shape[dim])
    assert torch.equal(added, wanted.expand_as(added))


def test_normal_rows_have_the_moments_of_the_input() -> None:
    """New rows have the mean and the deviation of each column, and depend only on the seed."""
    tensor = torch.stack([randn(400, seed=1) * 3 + 10, randn(400, seed=2) * 0.1 - 5], 1)
    made = only({"pad": {"size": 20_400, "fill": "normal"}}, tensor)
    added = made[400:]
    torch.testing.assert_close(added.mean(0), tensor.mean(0), rtol=0.01, atol=0)
    torch.testing.assert_close(added.std(0), tensor.std(0), rtol=0.03, atol=0)
    assert same(made, only({"pad": {"size": 20_400, "fill": "normal"}}, tensor))
    assert not same(made, only({"pad": {"size": 20_400, "fill": "normal", "seed": 1}}, tensor))
    pair = only({"pad": {"size": 20_002, "fill": "normal"}}, torch.tensor([[0.0], [2.0]]))
    torch.testing.assert_close(pair[2:].std(), torch.tensor(math.sqrt(2)), rtol=0.03, atol=0)
    single = only({"pad": {"size": 3, "fill": "normal"}}, torch.tensor([[2.0, 5.0]]))
    assert single.tolist() == [[2.0, 5.0]] * 3


def test_the_mean_of_many_rows_is_computed_in_pieces() -> None:
    """The result for many rows equals the result for one piece."""
    tensor = randn(3000, 700)
    made = only({"pad": {"size": 3001, "fill": "mean"}}, tensor)
    assert torch.equal(made[-1], tensor.double().mean(0).float())


@pytest.mark.parametrize(
    ("code", "fill", "fits"),
    [
        ("I8", 127, True), ("I8", 128, False), ("I8", -128, True), ("I8", -129, False), ("I8", 1.5, False),
        ("U8", 255, True), ("U8", -1, False), ("U8", 256, False), ("I64", 2**53, True), ("U64", 2**63 - 1, True),
        ("U64", 2**63, False), ("I64", 2**63, False), ("BOOL", 1, True), ("BOOL", 2, False), ("F16", 65504, True),
        ("F16", 65505, False), ("BF16", 1e39, False), ("F32", 1e39, False), ("F64", 1e300, True), ("C64", 1, False),
        ("F8_E4M3", 1, False), ("QI8", 1, False), ("U16", 65535, True), ("U32", 2**32, False), ("BITS8", 1, False),
    ],
)  # fmt: skip
def test_a_number_is_filled_in_where_the_dtype_holds_it(code: str, fill: float, *, fits: bool) -> None:
    operation = parse_operation({"pad": {"size": 2, "fill": fill}})
    if not fits:
        with pytest.raises(RuleError, match=f"pad: {code} cannot hold "):
            operation.dtypes([code])
        return
    (made,) = operation.apply([torch.zeros(1, dtype=dtype_of(code))])
    assert made.tolist() == [0, fill]


@pytest.mark.parametrize("code", FLOATS)
def test_casting_scaling_and_adding_round_once(code: str) -> None:
    """The computation is in F32, or in F64 for an F64 tensor, and is rounded once."""
    tensor = randn(40, code=code)
    wide = tensor if code == "F64" else tensor.float()
    assert same(only({"scale": {"factor": 1 / 3}}, tensor), (wide * (1 / 3)).to(tensor.dtype))
    assert same(only({"add": {"value": 1}}, tensor), (wide + 1).to(tensor.dtype))
    assert same(only({"cast": {"dtype": "float8_e4m3fn"}}, tensor), tensor.to(torch.float8_e4m3fn))
    assert parse_operation({"cast": {"dtype": "torch.bfloat16"}}) == parse_operation({"cast": {"dtype": "bf16"}})


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("rank", [2, 3], ids=["[N, D]", "[1, N, D]"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("old", "new", "prefix"),
    [((4, 4), (6, 6), 1), ((6, 6), (3, 3), 0), ((4, 3), (5, 7), 2)],
    ids=["grown", "shrunk", "not square"],
)
def test_a_grid_is_resized_as_an_image(
    old: tuple[int, int], new: tuple[int, int], prefix: int, rank: int, code: str, *, antialias: bool
) -> None:
    """Each channel is resized bicubically, and prefix tokens keep every bit."""
    tokens = randn(1, prefix + math.prod(old), 8, code=code)
    table: dict[str, Any] = {"new": list(new), "prefix": prefix, "antialias": antialias}
    if old[0] != old[1]:
        table["old"] = list(old)
    made = only({"resize_pos_embed": table}, tokens if rank == 3 else tokens[0])
    assert made.dim() == rank
    made = made.reshape(1, -1, 8)
    assert same(made[:, :prefix], tokens[:, :prefix])
    wide = tokens[:, prefix:] if code == "F64" else tokens[:, prefix:].float()
    image = torch.zeros(1, 8, *old, dtype=wide.dtype)
    for row in range(old[0]):
        for column in range(old[1]):
            image[0, :, row, column] = wide[0, row * old[1] + column]
    resized = functional.interpolate(image, new, mode="bicubic", antialias=antialias)
    for row in range(new[0]):
        for column in range(new[1]):
            wanted = resized[0, :, row, column].to(tokens.dtype)
            assert same(made[0, prefix + row * new[1] + column], wanted)


def test_a_row_of_positions_is_resized_by_linear_interpolation() -> None:
    """A position between two others gets their mean, and the ends are kept."""
    made = only({"resize_pos_embed": {"new": [6], "prefix": 1}}, torch.tensor([[9.0], [0.0], [1.0], [4.0]]))
    assert made.flatten().tolist() == [9.0, 0.0, 0.25, 0.75, 1.75, 3.25, 4.0]


def test_an_unchanged_grid_keeps_every_bit() -> None:
    """This includes NaNs."""
    tokens = random_bits((1, 17, 4), "BF16")
    assert same(only({"resize_pos_embed": {"new": [4, 4], "prefix": 1}}, tokens), tokens)


def test_first_convolutions_give_the_same_output() -> None:
    """A grey image gives the same output with any number of channels."""
    weight, grey = randn(4, 3, 5, 5, code="F64"), randn(1, 1, 8, 8, code="F64", seed=1)
    wanted = functional.conv2d(grey.expand(1, 3, 8, 8), weight)
    summed = only({"conv_in_channels": {"channels": 1}}, weight)
    torch.testing.assert_close(functional.conv2d(grey, summed), wanted)
    single = randn(4, 1, 5, 5, code="F64", seed=2)
    for channels in (2, 3, 4, 7):
        repeated = only({"conv_in_channels": {"channels": channels}}, single)
        torch.testing.assert_close(
            functional.conv2d(grey.expand(1, channels, 8, 8), repeated), functional.conv2d(grey, single)
        )


@pytest.mark.parametrize("code", FLOATS)
def test_channels_are_summed_and_repeated_exactly(code: str) -> None:
    """Channels are repeated in order and scaled by old over new."""
    weight = randn(4, 3, 2, 2, code=code)
    wide = weight if code == "F64" else weight.float()
    four = only({"conv_in_channels": {"channels": 4}}, weight)
    for channel in range(4):
        assert same(four[:, channel], (wide[:, channel % 3] * (3 / 4)).to(weight.dtype))
    assert same(only({"conv_in_channels": {"channels": 1}}, weight), wide.sum(1, keepdim=True).to(weight.dtype))
    assert same(only({"conv_in_channels": {"channels": 3}}, weight), weight)
    first = only({"conv_in_channels": {"channels": 1, "mode": "repeat"}}, weight)
    assert same(first, (wide[:, :1] * 3).to(weight.dtype))


def test_space_to_depth_sums_within_each_place() -> None:
    """Twelve channels of a base of three become four: channel 3k + c belongs to position k."""
    weight = randn(2, 12, 1, 1)
    made = only({"conv_in_channels": {"channels": 1, "base": 3}}, weight)
    assert torch.equal(made, torch.stack([weight[:, 3 * at : 3 * at + 3].sum(1) for at in range(4)], 1))


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("style", ["old", "parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_norm_folds_into_the_very_weight_of_the_module(style: str, dim: int | None) -> None:
    """The folded weight has the bits of the module's weight in its forward pass."""
    module = torch.nn.Conv1d(3, 4, 5)
    if style == "old":
        weight_norm(module, dim=dim)  # type: ignore[arg-type]
        keys = ("weight_g", "weight_v")
    else:
        parametrizations.weight_norm(module, dim=dim)  # type: ignore[arg-type]
        keys = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    with torch.no_grad():
        for key in keys:
            module.get_parameter(key).mul_(1.7).add_(0.01)
        module(torch.zeros(1, 3, 9))  # the old style computes its weight here
        state = module.state_dict()
        made = only({"fold_weight_norm": {"dim": -1 if dim is None else dim}}, *(state[key] for key in keys))
        assert torch.equal(made, module.weight)


@pytest.mark.parametrize("style", ["old", "parametrization"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_spectral_norm_folds_into_the_very_weight_of_evaluation(style: str, dim: int) -> None:
    """The folded weight has the bits of the module's weight in evaluation mode."""
    module = torch.nn.ConvTranspose1d(3, 4, 5) if dim else torch.nn.Conv1d(3, 4, 5)
    keys: tuple[str, ...]
    if style == "old":
        torch.nn.utils.spectral_norm(module, n_power_iterations=3)
        keys = ("weight_orig", "weight_u", "weight_v")
    else:
        parametrizations.spectral_norm(module, n_power_iterations=3)
        keys = tuple(f"parametrizations.weight.{leaf}" for leaf in ("original", "0._u", "0._v"))
    with torch.no_grad():
        for _ in range(3):
            module(torch.zeros(1, 3, 9))
        module.eval()(torch.zeros(1, 3, 9))
        state = module.state_dict()
        made = only({"fold_spectral_norm": {"dim": dim}}, *(state[key] for key in keys))
        assert torch.equal(made, module.weight)


def test_a_mask_folds_into_the_very_weight_of_the_pruned_module() -> None:
    """The folded weight has the bits of the module's weight, also the signs of zeros."""
    module = torch.nn.Linear(6, 5)
    prune.random_unstructured(module, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    state = module.state_dict()
    assert same(only("fold_mask", state["weight_orig"], state["weight_mask"]), module.weight.detach())


BATCH_NORMS = {
    "conv": (torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), (2, 3, 8, 8)),
    "conv without bias": (torch.nn.Conv2d(3, 6, 3, bias=False), torch.nn.BatchNorm2d(6), (2, 3, 8, 8)),
    "conv1d, groups": (torch.nn.Conv1d(4, 6, 3, groups=2), torch.nn.BatchNorm1d(6), (2, 4, 8)),
    "transposed": (torch.nn.ConvTranspose2d(3, 6, 3), torch.nn.BatchNorm2d(6), (2, 3, 8, 8)),
    "linear": (torch.nn.Linear(5, 600), torch.nn.BatchNorm1d(600), (4, 5)),
}


@pytest.mark.parametrize(("layer", "norm", "shape"), BATCH_NORMS.values(), ids=BATCH_NORMS.keys())
def test_a_batch_norm_folds_as_torch_fuses_it(layer: Any, norm: Any, shape: Shape) -> None:
    """The result has the bits of torch.nn.utils.fusion and the output of both layers in evaluation mode."""
    with torch.no_grad():
        for seed, tensor in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            tensor.copy_(randn(norm.num_features, seed=seed).abs() + 0.1)
        norm.eps = 1e-3
        transposed = isinstance(layer, torch.nn.ConvTranspose2d)
        bias = [] if layer.bias is None else [layer.bias]
        weight, shift = parse_operation({"fold_batch_norm": {"eps": norm.eps, "transposed": transposed}}).apply(
            [layer.weight, *bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        )
        args = (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        linear = isinstance(layer, torch.nn.Linear)
        wanted = fusion.fuse_linear_bn_weights(*args) if linear else fusion.fuse_conv_bn_weights(*args, transposed)
        assert torch.equal(weight, wanted[0])
        assert torch.equal(shift, wanted[1])
        batch = randn(*shape, seed=9)
        if linear:
            made = functional.linear(batch, weight, shift)
        elif transposed:
            made = functional.conv_transpose2d(batch, weight, shift)
        else:
            convolve = functional.conv2d if weight.dim() == 4 else functional.conv1d
            made = convolve(batch, weight, shift, groups=layer.groups)
        torch.testing.assert_close(made, norm.eval()(layer(batch)))


def test_a_bias_keeps_its_own_dtype_and_statistics_may_be_wider() -> None:
    """A BF16 convolution can have F32 statistics."""
    operation = parse_operation("fold_batch_norm")
    assert operation.dtypes(["BF16", "F32", "F32", "F32", "F32", "F32"]) == ("BF16", "F32")
    assert operation.dtypes(["BF16", "F32", "F32", "F32", "F32"]) == ("BF16", "BF16")
    made = operation.apply([randn(4, 3, 2, 2, code="BF16"), *(randn(4, seed=seed).abs() for seed in range(4))])
    assert [tensor.dtype for tensor in made] == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("table", "shapes", "reason"),
    [
        ({"pad": {"size": 2}}, [(3, 4)], "pad: dim 0 of [3, 4] is already larger than 2"),
        ({"pad": {"size": 2, "fill": "mean"}}, [(0, 4)], "pad: [0, 4] has no rows to compute a mean of"),
        (
            {"resize_pos_embed": {"new": [2, 2]}}, [(17, 4)],
            "resize_pos_embed: [17, 4] has 17 positions, which is not a square grid",
        ),
        (
            {"resize_pos_embed": {"new": [2, 2], "prefix": 2}}, [(1, 17, 4)],
            "resize_pos_embed: [1, 17, 4] has 15 positions after 2 prefix tokens, which is not a square grid",
        ),
        (
            {"resize_pos_embed": {"new": [2, 2], "old": [3, 3]}}, [(16, 4)],
            "resize_pos_embed: [16, 4] has 16 positions, not 3 x 3",
        ),
        (
            {"resize_pos_embed": {"new": [2]}}, [(2, 4, 4)],
            "resize_pos_embed: [2, 4, 4] is neither [N, D] nor [1, N, D]",
        ),
        (
            {"resize_pos_embed": {"new": [2, 2]}}, [(9, 0)],
            "resize_pos_embed: [9, 0] is neither [N, D] nor [1, N, D]",
        ),
        (
            {"resize_pos_embed": {"new": [2], "prefix": 4}}, [(4, 4)],
            "resize_pos_embed: [4, 4] has 0 positions after 4 prefix tokens, which is not a square grid",
        ),
        (
            {"conv_in_channels": {"channels": 1}}, [(4, 3)],
            "conv_in_channels: [4, 3] is not the weight of a convolution",
        ),
        (
            {"conv_in_channels": {"channels": 4, "base": 3}}, [(4, 12, 3, 3)],
            "conv_in_channels: dim 1 of [4, 12, 3, 3] is not 3 channels",
        ),
        ({"conv_in_channels": {"channels": 1}}, [(4, 0, 3)], "conv_in_channels: dim 1 of [4, 0, 3] is not 0 channels"),
        ("fold_weight_norm", [(4, 1), (3, 5)], "fold_weight_norm: g is [4, 1], but a v of [3, 5] needs [3, 1]"),
        ("fold_weight_norm", [(3, 1)], "fold_weight_norm: takes g and v, not 1 tensor"),
        ("fold_spectral_norm", [(3, 4), (3,)], "fold_spectral_norm: takes orig, u and v, not 2 tensors"),
        (
            "fold_spectral_norm", [(3, 4, 2), (8,), (3,)],
            "fold_spectral_norm: an orig of [3, 4, 2] needs u of [3] and v of [8], not [8] and [3]",
        ),
        ("fold_mask", [(3, 4), (4, 3)], "fold_mask: takes orig and a mask of its shape, not [3, 4], [4, 3]"),
        ("fold_batch_norm", [(3, 1)], "fold_batch_norm: takes 5 or 6 tensors, not 1"),
        (
            "fold_batch_norm", [(4, 3, 1, 1), (4,), (4,), (3,), (4,)],
            "fold_batch_norm: a weight of [4, 3, 1, 1] has 4 channels, not [3]",
        ),
    ],
)  # fmt: skip
def test_wrong_shapes_are_refused(table: Any, shapes: list[Shape], reason: str) -> None:
    operation = parse_operation(table)
    with pytest.raises(RuleError) as caught:
        operation.shapes(shapes)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("table", "dtypes", "reason"),
    [
        ({"scale": {"factor": 2}}, ["I64"], "scale: computes with BF16, F16, F32, F64, not with I64"),
        ({"add": {"value": 2}}, ["F8_E4M3"], "add: computes with BF16, F16, F32, F64, not with F8_E4M3"),
        ({"pad": {"size": 2, "fill": "mean"}}, ["I64"], "pad: fill cannot be mean for I64"),
        ({"pad": {"size": 2}}, ["F4"], "pad: F4 cannot hold zeros"),
        ({"cast": {"dtype": "F32"}}, ["C64"], "cast: C64 to F32 would lose the imaginary part"),
        ({"cast": {"dtype": "F32"}}, ["QI8"], "cast: QI8 cannot be cast to F32"),
    ],
)
def test_wrong_dtypes_are_refused(table: Any, dtypes: list[str], reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_operation(table).dtypes(dtypes)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"cast": {"dtype": "F4"}}, "cast: 'F4' is not a dtype to cast to"),
        ({"cast": {"dtype": "float33"}}, "cast: 'float33' is not a dtype to cast to"),
        ({"scale": {"factor": "2"}}, "scale: factor: '2' is not a number"),
        ({"scale": {"factor": math.inf}}, "scale: factor: inf is not a finite number"),
        ({"scale": {"factor": True}}, "scale: factor: True is not a number"),
        ({"scale": {"factor": 10**400}}, "scale: factor: the integer is too large for a computation"),
        ({"pad": {"size": 2, "fill": "noise"}}, "pad: fill is 'noise'"),
        ({"pad": {"size": -1}}, "pad: -1 is not a valid size"),
        ({"resize_pos_embed": {"new": []}}, "resize_pos_embed: [] is not a valid grid"),
        ({"resize_pos_embed": {"new": [2, 2], "old": [4]}}, "resize_pos_embed: [4] is not a valid grid"),
        ({"resize_pos_embed": {"new": [2, 0]}}, "resize_pos_embed: [2, 0] is not a valid grid"),
        ({"resize_pos_embed": {"new": [2], "prefix": -1}}, "resize_pos_embed: prefix is -1, not at least 0"),
        ({"resize_pos_embed": {"new": [2], "antialias": 1}}, "resize_pos_embed: antialias: 1 is not true or false"),
        ({"conv_in_channels": {"channels": 0}}, "conv_in_channels: 0 is not a valid number of channels"),
        ({"conv_in_channels": {"channels": 1, "base": 0}}, "conv_in_channels: 0 is not a valid number of channels"),
        ({"conv_in_channels": {"channels": 2, "mode": "sum"}}, "conv_in_channels: a sum has one channel, not 2"),
        ({"conv_in_channels": {"channels": 2, "mode": "x"}}, "conv_in_channels: mode is 'x'"),
        ({"fold_weight_norm": {"dim": -2}}, "fold_weight_norm: dim is -2"),
    ],
)
def test_wrong_parameters_are_refused(table: Any, reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_operation(table)
    assert caught.value.reason == reason
