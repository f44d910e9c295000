"""The safetensors form of DCP: pieces are joined by their offsets, and a missing shard is never filled with zeros."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit.core.files.payloads import Extent
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.distributed.file_names import is_dcp
from tests.features import needs_dtype, needs_module
from tests.helpers_dcp import FILE_OF, full_tensors, open_dcp, refusal
from tests.helpers_formats import assert_same, random_tensor

pytestmark = needs_module("torch.distributed.checkpoint.hf_storage")
NAME = "shard-{:05}-model-{:05}-of-{:05}.safetensors"


@pytest.fixture
def ranks(saved_by_ranks: Path) -> Path:
    return saved_by_ranks / "safetensors"


@pytest.fixture
def copy(ranks: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ranks, tmp_path / "copy")


def put(path: Path, shard: int, pieces: dict[str, tuple[torch.Tensor, list[int]]], model: int = 1, of: int = 1) -> Path:
    """Write the file of one rank, as DCP does."""
    path.mkdir(exist_ok=True)
    info = {key: {"saved_offsets": offsets} for key, (_, offsets) in pieces.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
    tensors = {key: tensor.contiguous() for key, (tensor, _) in pieces.items()}
    save_file(tensors, path / NAME.format(shard, model, of), metadata)
    return path


def rows(path: Path, tensor: torch.Tensor, *counts: int) -> Path:
    at = 0
    for shard, count in enumerate(counts, start=1):
        put(path, shard, {"w": (tensor[at : at + count], [at, 0])})
        at += count
    return path


def test_two_ranks_give_whole_tensors(ranks: Path) -> None:
    assert is_dcp(os.listdir(ranks))
    with open_dcp(str(ranks)) as checkpoint:
        expected = full_tensors()
        assert set(checkpoint) == set(expected) == set(FILE_OF)
        assert_same(checkpoint, {key: expected[key] for key in checkpoint})
        assert checkpoint.format == "dcp safetensors (2 shards)"
        assert len(checkpoint.files) == 4
        assert checkpoint.metadata == {"format": "pt"}
        (warning,) = checkpoint.warnings
        assert "a missing last shard cannot be noticed" in warning
        kernel = {key for key in checkpoint if isinstance(checkpoint.payload(key), Extent)}
        assert kernel == {"one row", "whole", "plain"}
        checkpoint.check_unchanged()


@needs_module("torch.distributed.checkpoint._consolidate_hf_safetensors")
def test_it_is_what_torch_consolidates(ranks: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    (tmp_path / "out").mkdir()
    consolidate_safetensors_files(str(ranks), str(tmp_path / "out"), dict(FILE_OF))
    with open_checkpoint(tmp_path / "out") as whole, open_dcp(str(ranks)) as checkpoint:
        assert {key: (str(info), whole.read_bytes(key)) for key, info in whole.items()} == {
            key: (str(info), checkpoint.read_bytes(key)) for key, info in checkpoint.items()
        }


def test_h14_a_missing_first_or_middle_shard_is_refused(tmp_path: Path) -> None:
    tensor = random_tensor(torch.float32, (9, 2))
    for missing, named in ((1, "rows 0-2 are"), (2, "rows 3-5 are")):
        path = rows(tmp_path / f"without{missing}", tensor, 3, 3, 3)
        os.remove(path / NAME.format(missing, 1, 1))
        error = refusal(str(path))
        assert error.reason == f"'w': {named} covered by no chunk"
        assert error.hint == f"shard-{missing:05}-*.safetensors is missing"


def test_h14_a_missing_last_shard_is_warned_about(tmp_path: Path) -> None:
    path = rows(tmp_path / "run", torch.ones(9, 2), 3, 3, 3)
    os.remove(path / NAME.format(3, 1, 1))
    with open_dcp(str(path)) as checkpoint:
        assert checkpoint["w"].shape == (6, 2), "nothing in the files tells"
        assert checkpoint.warnings[0].startswith("2 shards joined; a missing last shard cannot be noticed")


def test_a_gap_in_the_numbers_is_refused_without_a_gap_in_a_tensor(tmp_path: Path) -> None:
    """A tensor that only the missing shard holds would be lost without a trace."""
    path = put(tmp_path / "run", 1, {"a": (torch.ones(2), [0])})
    put(path, 3, {"b": (torch.ones(2), [0])})
    put(path, 6, {"c": (torch.ones(2), [0])})
    put(path, 9, {"d": (torch.ones(2), [0])})
    assert refusal(str(path)).reason == (
        "shard-00002-*.safetensors, shard-00004-*.safetensors, shard-00005-*.safetensors, shard-00007-*.safetensors "
        "and 1 more is missing"
    )


@pytest.mark.parametrize("of", [3, 999_999_999])
def test_h14_missing_files_are_named_by_number(tmp_path: Path, of: int) -> None:
    path = put(tmp_path / "run", 1, {"a": (torch.ones(2), [0])}, 1, of)
    error = refusal(str(path))
    assert error.reason.startswith("no shard holds model-00002, model-00003")
    assert error.reason.endswith(f" of {of}")


Damage = Callable[[Path], object]


def _header(change: Callable[[dict[str, Any]], object], name: str = NAME.format(1, 1, 2)) -> Damage:
    def damage(path: Path) -> None:
        data = (path / name).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        raw = json.dumps(header).encode()
        (path / name).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])

    return damage


def _info(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(header: dict[str, Any]) -> None:
        info = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        change(info)
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)

    return _header(damage)


def _text(text: str) -> Damage:
    return _header(lambda header: header["__metadata__"].update({"DCP_SHARDING_INFO": text}))


DAMAGED: dict[str, tuple[Damage, str]] = {
    "no info": (_header(lambda header: header["__metadata__"].pop("DCP_SHARDING_INFO")), "has no DCP_SHARDING_INFO"),
    "no metadata": (_header(lambda header: header.pop("__metadata__")), "has no DCP_SHARDING_INFO"),
    "no JSON": (_text("{"), "DCP_SHARDING_INFO is not JSON"),
    "no object": (_text("[]"), "DCP_SHARDING_INFO is a JSON list"),
    "half a pair": (_text("\ud800"), "DCP_SHARDING_INFO is not UTF-8|surrogate"),
    "tensor not in info": (_info(lambda info: info.pop("rows")), "'rows': DCP_SHARDING_INFO has no saved_offsets of 2"),
    "tensor not in file": (
        _info(lambda info: info.update(gone=info["rows"])),
        "DCP_SHARDING_INFO names 'gone', which the shard does not hold",
    ),
    "no offsets": (_info(lambda info: info.update(rows={})), "'rows': DCP_SHARDING_INFO has no saved_offsets"),
    "odd entry": (_info(lambda info: info.update(rows=3)), "'rows': DCP_SHARDING_INFO has no saved_offsets"),
    "too few": (_info(lambda info: info["rows"].update(saved_offsets=[0])), "'rows': .* has no saved_offsets of 2"),
    "negative": (
        _info(lambda info: info["rows"].update(saved_offsets=[-1, 0])),
        r"saved_offsets \[-1, 0\] are not valid offsets",
    ),
    "no number": (_info(lambda info: info["rows"].update(saved_offsets=[True, 0])), "are not valid offsets"),
    "enormous": (_info(lambda info: info["rows"].update(saved_offsets=[2**62, 0])), "are not valid offsets"),
    "shifted": (_info(lambda info: info["rows"].update(saved_offsets=[1, 0])), "'rows': row 0 is covered by no chunk"),
    "overlap": (_info(lambda info: info["rows"].update(saved_offsets=[3, 0])), "'rows': rows 0-2 are covered by no"),
    "other dtype": (
        _header(lambda header: header["rows"].update(dtype="I32")),
        r"'rows': F32 \[3, 3\] here, I32 \[4, 3\] in another shard",
    ),
    "other dimensions": (
        lambda path: [
            _header(lambda header: header["rows"].update(shape=[12]))(path),
            _info(lambda info: info["rows"].update(saved_offsets=[0]))(path),
        ],
        r"'rows': F32 \[3, 3\] here, F32 \[12\] in another shard",
    ),
    "other count": (
        lambda path: os.rename(path / NAME.format(2, 2, 2), path / NAME.format(2, 2, 3)),
        "shards of two saves: some count 2 files, some 3",
    ),
    "beyond the count": (
        lambda path: shutil.move(path / NAME.format(2, 2, 2), path / NAME.format(2, 3, 2)),
        "a shard holds model-00003 of 2",
    ),
    "one file of a rank": (lambda path: os.remove(path / NAME.format(1, 1, 2)), "'conv': .* are covered by no"),
    "empty file": (lambda path: (path / NAME.format(1, 1, 2)).write_bytes(b""), "too short: 0 bytes"),
    "cut short": (
        lambda path: os.truncate(path / NAME.format(1, 1, 2), os.path.getsize(path / NAME.format(1, 1, 2)) - 1),
        "truncated",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_broken_shards_are_refused(copy: Path, case: str) -> None:
    damage, reason = DAMAGED[case]
    damage(copy)
    error = refusal(str(copy))
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason


@needs_dtype("F4")
def test_packed_elements_are_read_from_one_shard_and_refused_from_several(tmp_path: Path) -> None:
    tensor = random_tensor(torch.float4_e2m1fn_x2, (3, 4))
    with open_dcp(str(put(tmp_path / "one", 1, {"w": (tensor, [0, 0])}))) as checkpoint:
        assert_same(checkpoint, {"w": tensor})
    path = put(tmp_path / "two", 1, {"w": (tensor, [0, 0])})
    put(path, 2, {"w": (tensor, [3, 0])})
    assert refusal(str(path)).reason == "'w': F4 in several shards is not read"


def test_it_is_flat(ranks: Path) -> None:
    error = refusal(str(ranks), "model")
    assert error.reason == "holds only tensors, and not a mapping 'model'"
    assert error.hint == "without the :: part, --keep 'model.*' selects keys by their names"


def test_a_warning_names_another_version(copy: Path) -> None:
    _header(lambda header: header["__metadata__"].update(DCP_VERSION="2.0"))(copy)
    with open_dcp(str(copy)) as checkpoint:
        assert checkpoint.warnings[-1] == "written in version '2.0' of the form; 1.0 is supported"
