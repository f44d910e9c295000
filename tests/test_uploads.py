"""Outputs in stores: whole or not at all, whichever call of the store fails, and never an index of mixed shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save_file

from ckptkit import convert, open_checkpoint
from ckptkit.errors import CkptkitError
from ckptkit.formats.writing.stores import transfers
from tests.helpers_outputs import same_state, tensor_of
from tests.helpers_stores import AtCloseStore, PartsStore, ShownStore, register_stores

NEW = {"a.weight": tensor_of("F32", (40, 3)), "a.bias": tensor_of("F32", (40,), 1), "b": tensor_of("BF16", (50,), 2)}
OLD = {"old": tensor_of("F32", (70,), 3), "older": tensor_of("U8", (200,), 4)}
STORES = (PartsStore, AtCloseStore, ShownStore)
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send many parts of few bytes."""
    monkeypatch.setattr(transfers, "_PART", 300)
    monkeypatch.setattr(transfers, "_PART_IN_ORDER", 300)
    monkeypatch.setattr(transfers, "_MIB", 1)
    register_stores()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(NEW, tmp_path / "in.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    return tmp_path / "in.safetensors"


class Case(NamedTuple):
    """An output: its name, and the options of ``convert``."""

    name: str
    options: dict[str, Any]


CASES = [
    Case("out.safetensors", {}),
    Case("out.pt", {"dtype": "F64"}),
    Case("out", {"max_shard_size": 300, "carry": True}),
    Case("out", {"format": "dcp"}),
]
NAMES = ["safetensors", "torch", "shards", "dcp"]
each_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


def state_at(url: str) -> dict[str, torch.Tensor]:
    with open_checkpoint(url) as checkpoint:
        return {key: checkpoint.read(key) for key in checkpoint}


def write(source: Any, url: str, case: Case) -> None:
    convert(source, url, force=True, **case.options)


def wanted(case: Case, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in state.items()} if case.options.get("dtype") else state


@each_case
@pytest.mark.parametrize("store", STORES, ids=[store.protocol for store in STORES])
def test_a_new_output_is_whole_or_not_there(store: type[PartsStore], case: Case, source: Path) -> None:
    """Whichever call of the store fails, nothing is visible after the error, and no upload is unfinished."""
    url = f"{store.protocol}://bucket/{case.name}"
    for nth in range(1, 200):
        store.reset({}, nth)
        try:
            write(source, url, case)
        except CkptkitError as error:
            path = error.path
        else:
            break
        finally:
            store.fails_at = 0
        assert path is not None, nth
        assert path.startswith(url), nth
        assert (store.content(), store.unfinished) == ({}, set()), nth
    assert nth > 3
    same_state(state_at(url), wanted(case, NEW))


def index_is_of_one_checkpoint(content: dict[str, bytes]) -> None:
    """Assert that an index, if there is one, names files of one checkpoint."""
    data = content.get(f"/bucket/out/{INDEX}")
    if data is None:
        return
    for key, name in json.loads(data)["weight_map"].items():
        assert key in load(content[f"/bucket/out/{name}"])


@each_case
def test_an_old_output_stays_until_the_new_one_is_sent(case: Case, source: Path) -> None:
    """After a failure the old output can be read, or the error says that it is lost. No index is ever wrong."""
    url = f"parts://bucket/{case.name}"
    PartsStore.reset({})
    write(dict(OLD), url, Case(case.name, {name: value for name, value in case.options.items() if name != "carry"}))
    before = {**PartsStore.content(), "/bucket/other": b"stays"}
    outcomes = set()
    for nth in range(1, 200):
        PartsStore.reset(before, nth)
        PartsStore.watch = lambda: index_is_of_one_checkpoint(PartsStore.content())
        try:
            write(source, url, case)
        except CkptkitError as error:
            outcome = "lost" if "is lost" in (error.hint or "") else "old"
        else:
            break
        finally:
            PartsStore.watch, PartsStore.fails_at = None, 0
        index_is_of_one_checkpoint(PartsStore.content())
        assert (PartsStore.content() == before) == (outcome == "old"), (nth, outcome)
        assert not PartsStore.unfinished
        assert PartsStore.content()["/bucket/other"] == b"stays"
        outcomes.add(outcome)
    assert outcomes == {"old", "lost"}
    same_state(state_at(url), wanted(case, NEW))
    assert not PartsStore.unfinished
