"""``diff`` says what ``load_state_dict`` does with any state_dict: torch itself is called."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from ckptkit import diff
from tests.features import FLOAT4
from tests.helpers_outputs import CODES, dtype_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


class Buffers(nn.Module):
    """Buffers and parameters with and without dimensions, one of them not in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scalar", torch.tensor(2))
        self.register_buffer("table", torch.zeros(2, 3))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_parameter("nothing", None)


class Lookalike(nn.Module):
    """Has the buffers of batch norm, but is another class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class Extra(nn.Module):
    """Has extra state and a weight."""

    def __init__(self, state: object) -> None:
        super().__init__()
        self.state = state
        self.weight = nn.Parameter(torch.zeros(2))

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def low_precision() -> nn.Module:
    module = nn.Module()
    module.register_buffer("eight", torch.zeros(3, dtype=torch.float8_e4m3fn))
    for dtype in FLOAT4:
        module.register_buffer("four", torch.zeros(3, dtype=torch.uint8).view(dtype))
    module.register_buffer("wave", torch.zeros(3, dtype=torch.complex64))
    return module


def tied() -> nn.Module:
    module = nn.Module()
    module.a, module.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    module.b.weight = module.a.weight
    return module


def headless() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1] = None  # type: ignore[assignment]
    return module


LEAVES = {
    "linear": lambda: nn.Linear(2, 3),
    "no bias": lambda: nn.Linear(2, 3, bias=False),
    "conv": lambda: nn.Conv2d(1, 2, 1),
    "bn": lambda: nn.BatchNorm1d(2),
    "bn plain": lambda: nn.BatchNorm2d(2, affine=False),
    "bn untracked": lambda: nn.BatchNorm1d(2, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
    "ln": lambda: nn.LayerNorm(2),
    "buffers": Buffers,
    "lookalike": Lookalike,
    "extra int": lambda: Extra(3),
    "extra dict": lambda: Extra({"amax": torch.ones(2), "step": 1}),
    "extra tensor": lambda: Extra(torch.ones(2)),
    "half": lambda: nn.Linear(2, 2).to(torch.bfloat16),
    "low": low_precision,
    "tied": tied,
    "headless": headless,
}


@st.composite
def models(draw: st.DrawFn, depth: int = 2) -> nn.Module:
    if depth == 0 or draw(st.booleans()):
        return LEAVES[draw(st.sampled_from(sorted(LEAVES)))]()
    model = nn.Module()
    for name in draw(st.lists(st.sampled_from(("conv1", "fc", "bn", "0", "layers", "model")), max_size=3, unique=True)):
        model.add_module(name, draw(models(depth - 1)))
    return model


VALUES: tuple[Any, ...] = (None, 3, "text", [1.0], {}, {"a": 1}, 2.5)
NEW_KEYS = ("", ".", "x", "conv1", "fc", "fc.weight.extra", "fc.", "bn.num_batches_tracked", "num_batches_tracked",
            "_extra_state", "fc._extra_state", "my_extra_state", "1.weight", "module.weight", "0.1.bias")  # fmt: skip
CHANGES = (
    "drop",
    "drop",
    "add",
    "rename",
    "reshape",
    "cast",
    "cast",
    "scalar",
    "value",
    "sparse",
    "child",
    "old",
    "old",
)


def changed(draw: st.DrawFn, state: OrderedDict[str, Any], change: str) -> None:
    """Change a state_dict as people or programs do."""
    if change == "add" or not state:
        value = draw(st.sampled_from((torch.ones(2), torch.tensor(1), *VALUES)))
        state[draw(st.sampled_from(NEW_KEYS))] = value
        return
    key = draw(st.sampled_from(sorted(state)))
    plain = torch.ones(state[key].shape if isinstance(state[key], torch.Tensor) else (2,))  # only the shape matters
    if change == "drop":
        del state[key]
    elif change == "old":  # as torch wrote it before batch norm had a counter
        for counter in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[counter]
    elif change == "rename":
        state[draw(st.sampled_from((f"module.{key}", f"{key}_g", key.rpartition(".")[2])))] = state.pop(key)
    elif change == "reshape":
        shapes = (plain.reshape(-1), plain.unsqueeze(0), plain.new_zeros(5), plain.new_zeros(0), plain.new_zeros(2, 2))
        state[key] = draw(st.sampled_from(shapes))
    elif change == "scalar":
        state[key] = draw(st.sampled_from((torch.tensor(1), torch.ones(1), torch.ones(2), torch.ones(1, 1))))
    elif change == "cast":
        code = draw(st.sampled_from((*CODES, *(["F4"] if FLOAT4 else []))))
        state[key] = torch.zeros(plain.shape).to(dtype_of(code)) if code != "F4" else packed(plain.shape)
    elif change == "sparse":
        state[key] = plain.to_sparse()
    elif change == "child":
        state[f"{key}.{draw(st.sampled_from(('weight', '_extra_state', 'x.y')))}"] = torch.ones(1)
    else:
        state[key] = draw(st.sampled_from(VALUES))


def packed(shape: torch.Size) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).view(FLOAT4[0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model and its own state_dict after some changes."""
    model = draw(models())
    own = copy.deepcopy(model).state_dict()
    state: OrderedDict[str, Any] = OrderedDict(own)
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=3)):
        changed(draw, state, change)
    if draw(st.booleans()):
        table = copy.deepcopy(own._metadata)  # type: ignore[attr-defined]
        for prefix in list(table):
            version = draw(st.sampled_from((None, None, None, 0, 1, "deleted")))
            if version == "deleted":
                del table[prefix]
            elif version is not None:
                table[prefix]["version"] = version
        state._metadata = table  # type: ignore[attr-defined]
    return model, state


def accepts(model: nn.Module, state: dict[str, Any], *, strict: bool) -> bool:
    """Return whether torch loads the state_dict, by loading it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch only warns of a complex value cast to a real one
        try:
            copy.deepcopy(model).load_state_dict(state, strict=strict)
        except (RuntimeError, AttributeError):
            return False
    return True


@functools.cache
def takes_first_of_many() -> bool:
    """Return whether torch loads a vector into a scalar and drops all elements but the first, which diff refuses."""
    module = nn.Module()
    module.register_buffer("scalar", torch.tensor(0.0))
    return accepts(module, {"scalar": torch.ones(2)}, strict=True)


def is_vector_for_scalar(model: nn.Module, key: str, value: object) -> bool:
    expected = model.state_dict().get(key)
    is_scalar = isinstance(expected, torch.Tensor) and expected.dim() == 0
    return is_scalar and isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) != 1


@pytest.mark.skipif(not FLOAT4, reason="this torch has no float4")
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_packed_numbers_are_not_repeated_into_a_buffer(norm: type[nn.Module]) -> None:
    """torch copies no float4 into float32, also where code of the module loads it, which a rehearsal accepts."""
    model = norm(2, track_running_stats=True)
    state = {**model.state_dict(), "running_mean": packed(torch.Size([2]))}
    assert not accepts(model, state, strict=False)
    assert not diff(model, state).loads


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_the_verdict_is_that_of_load_state_dict(case: tuple[nn.Module, dict[str, Any]]) -> None:
    """``loads_strict`` and ``loads`` are true exactly if torch does not raise."""
    model, state = case
    assume(not (takes_first_of_many() and any(is_vector_for_scalar(model, key, value) for key, value in state.items())))
    result = diff(model, state)
    assert (result.loads_strict, result.loads) == (
        accepts(model, state, strict=True),
        accepts(model, state, strict=False),
    )
    if not result.different:
        assert result.loads_strict
