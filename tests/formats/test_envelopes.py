"""The mapping of weights inside a training checkpoint is found by its content, and everything else is listed."""

from __future__ import annotations

import math
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.core.checkpoint import Entry
from ckptkit.core.findings import ReaderWarning
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.helpers_formats import assert_same, bits, opened, saved, write

NET = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
WEIGHTS = NET.state_dict()
OTHER = {key: value + 1 for key, value in WEIGHTS.items()}
OPTIMIZER = torch.optim.Adam(NET.parameters(), lr=0.5)
NET(torch.ones(4, 2)).sum().backward()
OPTIMIZER.step()
OPTIM = OPTIMIZER.state_dict()


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def legacy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize(
    ("tree", "envelope"),
    [
        pytest.param(WEIGHTS, "", id="a state_dict itself"),
        pytest.param({"state_dict": WEIGHTS, "epoch": 3}, "state_dict", id="state_dict"),
        pytest.param({"model": WEIGHTS, "optimizer": OPTIM}, "model", id="model beside an optimizer"),
        pytest.param({"ema": WEIGHTS, "step": 3}, "ema", id="only ema"),
        pytest.param({"whatever": WEIGHTS, "optimizer": OPTIM, "epoch": 1}, "whatever", id="an unknown key"),
        pytest.param({"model": {"state_dict": WEIGHTS}, "lr": 1.0}, "model.state_dict", id="two deep"),
        pytest.param({"model": WEIGHTS, "stats": {"mean": torch.ones(1)}}, "model", id="a known key wins"),
        pytest.param({**WEIGHTS, "epoch": 3}, "", id="a state_dict with an epoch in it"),
        pytest.param(OrderedDict(model=OrderedDict(WEIGHTS), a=1), "model", id="ordered"),
        pytest.param({"model_state": WEIGHTS, "cfg": {"a": 1}}, "model_state", id="pycls"),
        pytest.param({"module": WEIGHTS, "dp_world_size": 1}, "module", id="DeepSpeed"),
        pytest.param(
            {"phase": 1, "classy_state_dict": {"base_model": {"model": {"trunk": WEIGHTS}}}},
            "classy_state_dict.base_model.model.trunk",
            id="ClassyVision",
        ),
    ],
)
def test_the_weights_are_found_and_the_envelope_says_where(
    tmp_path: Path, legacy: bool, tree: Any, envelope: str
) -> None:
    path = write(tmp_path, saved(tree, legacy=legacy))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.envelope == envelope
        assert_same(checkpoint, WEIGHTS)


@pytest.mark.parametrize(
    ("tree", "listed"),
    [
        pytest.param({"model": WEIGHTS, "ema": OTHER}, ["'::model'", "'::ema'"], id="model and ema"),
        pytest.param({"generator": WEIGHTS, "discriminator": OTHER, "g": 1}, ["'::generator'", "'::dis"], id="a GAN"),
        pytest.param({"one": WEIGHTS, "two": OTHER}, ["'::one'", "'::two'"], id="unknown names"),
        pytest.param(
            {"model": {"teacher": WEIGHTS, "student": OTHER}}, ["'::model.teacher'", "'::model.stud"], id="deep"
        ),
    ],
)
def test_two_candidates_are_an_error_that_lists_them(tmp_path: Path, tree: Any, listed: list[str]) -> None:
    with pytest.raises(FormatError, match="holds 2 mappings of weights") as caught:
        opened(tmp_path, saved(tree))
    assert [text for text in listed if text not in (caught.value.hint or "")] == []


def mmengine() -> dict[str, Any]:
    """Return what EMAHook saves: the average as state_dict, the trained weights with the prefix of the average."""
    trained = {f"module.{key}": value for key, value in WEIGHTS.items()}
    return {"meta": {}, "message_hub": {}, "state_dict": OTHER, "ema_state_dict": {"steps": torch.tensor(3), **trained}}


AVERAGES: dict[str, tuple[dict[str, Any], str, str]] = {
    # id: (tree, key of the average, key of the trained weights)
    "mmengine": (mmengine(), "state_dict", "ema_state_dict"),
    "Lightning": (
        {"state_dict": OTHER, "current_model_state": WEIGHTS, "averaging_state": {"n_averaged": torch.tensor(3)}},
        "state_dict", "current_model_state",
    ),
    "timm": ({"state_dict": WEIGHTS, "state_dict_ema": OTHER}, "state_dict_ema", "state_dict"),
    "ultralytics": ({"model": WEIGHTS, "ema": OTHER, "best_fitness": 0.5, "updates": 3}, "ema", "model"),
    "judging by the keys": ({"model": WEIGHTS, "ema": OTHER}, "ema", "model"),
    "BasicSR": ({"params": WEIGHTS, "params_ema": OTHER}, "params_ema", "params"),
}  # fmt: skip


@pytest.mark.parametrize("origin", AVERAGES.keys())
def test_an_average_is_recognised_by_the_keys_beside_it(tmp_path: Path, origin: str) -> None:
    """The error says which mapping is the average and who saves such a file.

    A file is from a library only if it has a key that others do not write. The warning of each mapping says the same
    where no key has the word: who selects ``::model`` or ``::ema`` knows it.
    """
    tree, average, trained = AVERAGES[origin]
    path = write(tmp_path, saved(tree))
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    for text in (f"{average} (the average of the weights: ", f"{trained} (the trained weights: "):
        assert text in caught.value.reason
        assert origin in caught.value.reason.partition(text)[2].partition(")")[0]
    for key, first, second in (
        (average, "the average of the weights", f"'{trained}' holds the trained weights"),
        (trained, "the trained weights", f"'{average}' holds the average of the weights"),
    ):
        with open_checkpoint(f"{path}::{key}") as checkpoint:
            if "ema" in average:
                assert checkpoint.warnings == ()
                continue
            (warning,) = checkpoint.warnings
            assert isinstance(warning, ReaderWarning)
            assert (warning.code.name, warning.severity) == ("average-beside", "note")
            assert warning.startswith(f"'{key}' holds {first}, and {second} (")


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param({"state_dict": WEIGHTS, "ema_state_dict": {}, "message_hub": {}}, id="an empty one"),
        pytest.param({"model": None, "ema": WEIGHTS}, id="ultralytics after training"),
        pytest.param({"state_dict": WEIGHTS, "message_hub": {}}, id="mmengine without"),
    ],
)
def test_weights_without_an_average_get_no_warning(tmp_path: Path, tree: dict[str, Any]) -> None:
    with opened(tmp_path, saved(tree)) as checkpoint:
        assert_same(checkpoint, WEIGHTS)
        assert checkpoint.warnings == ()


def test_an_optimizer_is_never_taken_for_the_weights(tmp_path: Path, legacy: bool) -> None:
    with opened(tmp_path, saved({"optimizer": OPTIM, "epoch": 3}, legacy=legacy)) as checkpoint:
        assert checkpoint.envelope == ""
        assert all(key.startswith("optimizer.state.") for key in checkpoint)
    with opened(tmp_path, saved(OPTIM, legacy=legacy)) as checkpoint:
        assert checkpoint.envelope == ""
        assert all(key.startswith("state.") for key in checkpoint)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        pytest.param("model", WEIGHTS, id="one name"),
        pytest.param("nested.ema.state_dict", OTHER, id="three names"),
        pytest.param("optimizer.state.0", OPTIM["state"][0], id="a key that is an int"),
        pytest.param("a.b", WEIGHTS, id="a key with a dot"),
        pytest.param("a.b.0.weight", {"0.weight": WEIGHTS["0.weight"]}, id="one tensor"),
        pytest.param("list.1", OTHER, id="an item of a list"),
    ],
)
def test_a_mapping_inside_is_opened_by_its_path(tmp_path: Path, legacy: bool, key: str, expected: Any) -> None:
    tree = {"model": WEIGHTS, "nested": {"ema": {"state_dict": OTHER}}, "optimizer": OPTIM, "a.b": WEIGHTS, "a": 1,
            "list": [WEIGHTS, OTHER]}  # fmt: skip
    path = write(tmp_path, saved(tree, legacy=legacy))
    with open_checkpoint(f"{path}::{key}") as checkpoint:
        assert_same(checkpoint, expected)
        assert checkpoint.envelope == key


def test_the_optimizer_is_opened_with_its_state_and_its_groups(tmp_path: Path) -> None:
    path = write(tmp_path, saved({"model": WEIGHTS, "optimizer": OPTIM}))
    with open_checkpoint(f"{path}::optimizer") as checkpoint:
        assert checkpoint.read_bytes("state.0.exp_avg") == bits(OPTIM["state"][0]["exp_avg"])
        assert Entry("param_groups.0.lr", "float", 0.5) in checkpoint.entries


@pytest.mark.parametrize("key", ["nothing", "model.nothing", "model.0.weight.x", "epoch.x", "modelx", "."])
def test_a_missing_key_is_refused_with_a_list_of_the_keys_there(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, saved({"model": WEIGHTS, "epoch": 3}))
    with pytest.raises(FormatError, match="holds nothing at") as caught:
        open_checkpoint(f"{path}::{key}")
    assert caught.value.path == path
    assert caught.value.hint is not None


def test_everything_beside_the_weights_is_listed(tmp_path: Path, legacy: bool) -> None:
    tree = {
        "epoch": 3, "best": True, "none": None, "name": "x\x1b[2J", "lr": math.nan, "loss": -math.inf, "big": 10**5000,
        "text": "x" * 5000, "args": Namespace(lr=0.5, name="net"), "optimizer": OPTIM, "history": [1.0] * 1000,
        "pair": (1, "two"), "size": torch.Size([2, 3]), "device": torch.device("cuda", 1), "set": {1, 2},
        "bytes": b"ab", "state_dict": WEIGHTS, "dtype": torch.bfloat16,
    }  # fmt: skip
    with opened(tmp_path, saved(tree, legacy=legacy)) as checkpoint:
        entries = {entry.path: (entry.type, entry.value) for entry in checkpoint.entries if entry.path != "_metadata"}
        warnings = checkpoint.warnings
    dtype = entries.pop("dtype")
    assert dtype[1] == "not shown"
    assert entries == {
        "epoch": ("int", 3),
        "best": ("bool", True),
        "none": ("null", None),
        "name": ("str", "x\x1b[2J"),
        "lr": ("float", "nan"),
        "loss": ("float", "-inf"),
        "big": ("int", f"an integer of {(10**5000).bit_length()} bits"),
        "text": ("str", "5,000 characters"),
        "args": ("argparse.Namespace", {"lr": 0.5, "name": "net"}),
        "optimizer": ("dict", "2 items, 12 tensors"),
        "history": ("list", "1,000 items: 1, 1, 1, ..., 1"),
        "pair": ("tuple", [1, "two"]),
        "size": ("tuple", [2, 3]),
        "device": ("str", "cuda:1"),
        "set": ("list", [1, 2]),
        "bytes": ("bytes", "2 bytes"),
    }
    assert warnings == ()


@pytest.mark.parametrize(
    ("tree", "keys"),
    [
        pytest.param(torch.ones(2), [""], id="a bare tensor"),
        pytest.param([torch.ones(2), torch.ones(1)], ["0", "1"], id="a list of tensors"),
        pytest.param({}, [], id="an empty dict"),
        pytest.param({"a": 1}, [], id="no tensors"),
        pytest.param(5, [], id="a number"),
        pytest.param({0: torch.ones(1), 1.5: torch.ones(1), None: torch.ones(1)}, ["0", "1.5", "None"], id="odd keys"),
        pytest.param({"0012": torch.ones(1), "1e5": torch.ones(1)}, ["0012", "1e5"], id="names that look like numbers"),
        pytest.param({"a": {"b": {"c": torch.ones(1)}}}, ["a.b.c"], id="nested"),
    ],
)
def test_unusual_trees_are_listed(tmp_path: Path, legacy: bool, tree: Any, keys: list[str]) -> None:
    with opened(tmp_path, saved(tree, legacy=legacy)) as checkpoint:
        assert list(checkpoint) == keys
        assert {checkpoint.read_bytes(key) for key in keys} <= {bits(torch.ones(1)), bits(torch.ones(2))}
