"""The assertions of ``ckptkit.testing``: torch's own loader and ``torch.testing`` decide what they must say."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ckptkit import ArgumentError, ModelError, RuleError, open_checkpoint
from ckptkit.testing import assert_loads, assert_param_groups, assert_same_weights
from fixtures.lenet import build
from tests.helpers_cli import ROOT, run_ckpt

LENET = ROOT / "fixtures" / "lenet_10class.pth"
NAN, INF = float("nan"), float("inf")


def _message(error: pytest.ExceptionInfo[AssertionError]) -> list[str]:
    return str(error.value).splitlines()


def test_a_model_that_loads_passes() -> None:
    """A model that torch loads strictly passes, and is not changed."""
    model = build(10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert_loads(model, LENET)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.load_state_dict(torch.load(LENET, weights_only=True), strict=True)


def test_keys_outside_of_fresh_must_load(capsys: pytest.CaptureFixture[str]) -> None:
    """A head of another size fails unless it is fresh, and the failure ends with the page of ``ckpt diff``."""
    with torch.device("meta"):
        model = build()
    assert_loads(model, LENET, fresh="fc3.*")
    assert_loads(model, str(LENET), fresh=["fc3.weight", "fc3.bias"])
    with pytest.raises(AssertionError) as error:
        assert_loads(model, LENET, fresh="fc3.bias")
    assert _message(error)[0] == "1 of 10 keys of the model is not loaded: 'fc3.weight'"
    shown = run_ckpt(capsys, "diff", "py:fixtures.lenet:build", str(LENET)).out.splitlines()
    assert _message(error)[3:] == shown[1:]


def test_fresh_keys_must_not_load() -> None:
    """A head that would get old values is not a fresh head."""
    with pytest.raises(AssertionError) as error:
        assert_loads(build(10), LENET, fresh="fc3.*")
    assert _message(error)[0] == "2 of 10 keys of the model are loaded, and must stay fresh: 'fc3.weight', 'fc3.bias'"


def test_fresh_must_match_a_key() -> None:
    """A pattern that matches nothing would hide that a layer was renamed."""
    with pytest.raises(RuleError, match=r"fresh='head\.\*' matches none of 10 keys"):
        assert_loads(build(10), LENET, fresh="head.*")
    with pytest.raises(ArgumentError, match="fresh is 3"):
        assert_loads(build(10), LENET, fresh=3)  # type: ignore[arg-type]


def test_rules_rename_the_checkpoint() -> None:
    """A checkpoint with a prefix loads by the rules that ``load_into`` takes."""
    rules = ["module.*=*"]
    with pytest.raises(AssertionError, match="10 of 10 keys of the model are not loaded"):
        assert_loads(build(10), ROOT / "fixtures" / "lenet_ddp.pt")
    assert_loads(build(10), ROOT / "fixtures" / "lenet_ddp.pt", rules=rules)


class _WithState(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.ones(2)

    def set_extra_state(self, state: Tensor) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("state", "fits"),
    [
        ({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, True),
        ({"weight": torch.ones(2, 2, dtype=torch.float64), "bias": torch.ones(2), "more": torch.ones(1)}, True),
        ({"weight": torch.ones(2, 2).to_sparse(), "bias": torch.ones(2)}, False),
        ({"weight": 3, "bias": torch.ones(2)}, False),
        ({"weight": torch.ones(2, 2)}, False),
    ],
    ids=["plain", "other dtype", "sparse", "not a tensor", "missing"],
)
def test_fit_is_what_torch_says(state: dict[str, Tensor], fits: bool) -> None:
    """A model passes where ``load_state_dict(strict=False)`` misses no key and raises nothing."""
    model = nn.Linear(2, 2)
    loaded = False
    with contextlib.suppress(RuntimeError, NotImplementedError):
        loaded = not model.load_state_dict(state, strict=False).missing_keys
    assert loaded is fits
    with contextlib.nullcontext() if fits else pytest.raises(AssertionError, match=r"'weight'|'bias'"):
        assert_loads(nn.Linear(2, 2), state)


def test_extra_state_must_load() -> None:
    """A model with extra state that the checkpoint does not have fails, as strict loading does."""
    model = _WithState(2, 2)
    assert_loads(model, model.state_dict())
    with pytest.raises(AssertionError, match="'_extra_state'"):
        assert_loads(model, nn.Linear(2, 2))
    assert_loads(model, nn.Linear(2, 2), fresh="_extra_state")


def test_same_weights_in_two_formats() -> None:
    """Two files of the same weights, a module that loaded them, and an open checkpoint are the same; it stays open."""
    model = build(10)
    model.load_state_dict(torch.load(LENET, weights_only=True))
    with open_checkpoint(LENET) as checkpoint:
        for other in (LENET.with_suffix(".safetensors"), model, model.state_dict(), checkpoint):
            assert_same_weights(checkpoint, other)
        assert checkpoint.read("fc3.bias").shape == (10,)


def test_the_worst_tensors_are_shown(tmp_path: Path) -> None:
    """The page lists the tensors that differ most, with the place and both values of the largest difference."""
    state = torch.load(LENET, weights_only=True)
    changed = {key: value.clone() for key, value in state.items()}
    changed["fc1.weight"][3, 5] += 2
    changed["fc1.weight"][0, 0] -= 1
    changed["conv1.bias"] += 4
    torch.save(changed, tmp_path / "changed.pt")
    with pytest.raises(AssertionError) as error:
        assert_same_weights(LENET, tmp_path / "changed.pt")
    lines = _message(error)
    assert lines[0] == "2 of 10 tensors differ: 'conv1.bias', 'fc1.weight'"
    rows = [line.split() for line in lines if line.startswith(("conv1.bias", "fc1.weight"))]
    assert [row[0] for row in rows] == ["conv1.bias", "fc1.weight"]
    old, new = state["fc1.weight"][3, 5].item(), changed["fc1.weight"][3, 5].item()
    assert rows[1][1:] == [
        "F32",
        "[120,",
        "400]",
        "2",
        "of",
        "48,000",
        "2",
        "[3,",
        "5]",
        str(np.float32(old)),
        str(np.float32(new)),
    ]


def test_other_names_and_shapes_are_a_diff() -> None:
    """Where keys, shapes or dtypes differ, the failure counts the kinds, and no value is read."""
    one = {"a": torch.ones(2), "b": torch.ones(2, 2), "c": torch.ones(1)}
    two = {"a": torch.ones(3), "c": torch.ones(1, dtype=torch.float16), "d": torch.ones(1)}
    with pytest.raises(AssertionError) as error:
        assert_same_weights(one, two)
    assert _message(error)[0] == (
        "the tensors are not the same: 1 key missing, 1 key unexpected, 1 key of another shape, 1 key of another dtype"
    )
    assert_same_weights({"c": one["c"]}, {"c": two["c"]}, check_dtype=False)
    with pytest.raises(AssertionError, match="1 of 1 tensor differs: 'c'"):
        assert_same_weights({"c": one["c"]}, {"c": two["c"] + 1}, check_dtype=False)


PAIRS = {
    "equal": (1.0, 1.0),
    "close": (1.0, 1.05),
    "far": (1.0, 1.5),
    "infinite": (INF, INF),
    "other sign": (INF, -INF),
    "one infinite": (1.0, INF),
    "infinite to number": (INF, 1.0),
    "NaN": (NAN, NAN),
    "NaN to number": (NAN, 1.0),
    "number to NaN": (1.0, NAN),
    "zeros": (0.0, -0.0),
    "near zero": (0.0, 0.05),
}


@pytest.mark.parametrize(("a", "b"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize(("rtol", "atol"), [(0.1, 0.0), (0.0, 0.1), (0.1, 0.1), (1e-9, 0.0)])
def test_tolerances_are_those_of_torch(a: float, b: float, dtype: torch.dtype, rtol: float, atol: float) -> None:
    """With a tolerance, elements are equal where ``torch.testing.assert_close`` with ``equal_nan`` says so."""
    one, two = torch.tensor([0.5, a], dtype=dtype), torch.tensor([0.5, b], dtype=dtype)
    try:
        torch.testing.assert_close(two, one, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError:
        with pytest.raises(AssertionError, match=r"1 of 1 tensor differs by more than"):
            assert_same_weights({"w": one}, {"w": two}, rtol=rtol, atol=atol)
    else:
        assert_same_weights({"w": one}, {"w": two}, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("a", "b"), PAIRS.values(), ids=PAIRS)
def test_without_tolerance_bits_are_equal(a: float, b: float) -> None:
    """By default two tensors are the same where their bytes are."""
    one, two = torch.tensor([0.5, a]), torch.tensor([0.5, b])
    same = torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    with contextlib.nullcontext() if same else pytest.raises(AssertionError, match="1 of 1 tensor differs: 'w'"):
        assert_same_weights({"w": one}, {"w": two})


@pytest.mark.parametrize("value", [torch.tensor(3), torch.tensor([], dtype=torch.int8), torch.tensor([True, False])])
def test_every_dtype_and_shape_compares(value: Tensor) -> None:
    """Scalars, empty tensors and tensors of integers and booleans are compared."""
    assert_same_weights({"w": value}, {"w": value.clone()})
    if value.numel():
        other = value.clone()
        other.view(-1)[-1] = 1 - value.view(-1)[-1].int()
        for atol in (0.0, 0.5):
            with pytest.raises(AssertionError, match="1 of 1 tensor differs"):
                assert_same_weights({"w": value}, {"w": other}, atol=atol)


def test_large_tensors_are_compared_in_pieces() -> None:
    """The place of a difference counts over all pieces of a tensor."""
    one = torch.zeros(3, 2, 200_000)
    two = one.clone()
    two[1, 1, 1], two[2, 0, 77] = 1, -3
    with pytest.raises(AssertionError) as error:
        assert_same_weights({"w": one}, {"w": two})
    (row,) = [line.split() for line in _message(error) if line.startswith("w ")]
    assert row[1:] == ["F32", "[3,", "2,", "200000]", "2", "of", "1,200,000", "3", "[2,", "0,", "77]", "0.0", "-3.0"]


def test_dtypes_without_numbers_differ_by_bytes() -> None:
    """Where a dtype has no numbers, the failure says that the bytes differ."""
    one, two = (torch.tensor(data, dtype=torch.uint8).view(torch.bits8) for data in ([1, 2], [1, 3]))
    assert_same_weights({"w": one}, {"w": one.clone()})
    with pytest.raises(AssertionError, match="the bytes"):
        assert_same_weights({"w": one}, {"w": two})


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_large_integers_differ_by_their_exact_difference(dtype: torch.dtype) -> None:
    """F64 has no number between 2**62 and 2**62 + 1024."""
    a, b = (torch.tensor([2**62 + more, 7]).to(dtype) for more in (0, 3))
    assert_same_weights({"w": a}, {"w": b}, atol=np.float32(3))  # type: ignore[arg-type]
    for tolerance in (0.0, 2.5):
        with pytest.raises(AssertionError, match="1 of 1 tensor differs"):
            assert_same_weights({"w": a}, {"w": b}, atol=tolerance)
    with pytest.raises(AssertionError, match="1 of 1 tensor differs"):
        assert_same_weights({"w": -a if dtype is torch.int64 else a * 3}, {"w": b}, atol=1e18)


@pytest.mark.parametrize("tolerance", [-0.1, NAN, "0.1", None, True])
def test_tolerances_are_numbers(tolerance: object) -> None:
    """A tolerance that is negative or not a number is refused."""
    with pytest.raises(ArgumentError, match="rtol must be a number of at least 0"):
        assert_same_weights({}, {}, rtol=tolerance)  # type: ignore[arg-type]


def test_tensors_without_values_are_refused() -> None:
    """A model on the meta device has no values to compare."""
    with pytest.raises(ModelError, match="has no values"):
        assert_same_weights(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))


def test_param_groups_are_the_same_assertion() -> None:
    """``assert_param_groups`` is the function of the package."""
    import ckptkit

    assert assert_param_groups is ckptkit.assert_param_groups


def test_a_part_of_two_checkpoints_is_the_same() -> None:
    """With ``keep``, a trained head and a new one pass, and each other fault of the backbone fails."""
    before = {"body.w": torch.zeros(2), "body.b": torch.ones(2), "head.w": torch.ones(3)}
    after = before | {"head.w": torch.zeros(4), "new.w": torch.ones(1)}
    assert_same_weights(before, after, keep="body.*")
    wrapped = {f"module.{key}": value for key, value in after.items()}
    assert_same_weights(before, wrapped, keep=["body.*"], rules=["module.*=*"])
    with pytest.raises(AssertionError, match="2 keys missing"):
        assert_same_weights(before, wrapped, keep=["body.*"])
    with pytest.raises(AssertionError, match=r"1 of 2 tensors differs: 'body\.b'"):
        assert_same_weights(before, after | {"body.b": torch.zeros(2)}, keep="body.*")
    with pytest.raises(AssertionError, match="1 key unexpected"):
        assert_same_weights(before, after | {"body.more": torch.zeros(2)}, keep="body.*")
    with pytest.raises(AssertionError, match="1 key missing"):
        assert_same_weights(before, {"body.w": torch.zeros(2)}, keep=["body.w", "body.b"])
    with pytest.raises(RuleError, match=r"keep='new\.\*' matches none of 3 keys of a"):
        assert_same_weights(before, after, keep=["body.*", "new.*"])
