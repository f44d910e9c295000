"""torch.export archives give the state_dict of torch.export.load; the program and pickles are never read."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch._export.serde.schema import ScalarType

from ckptkit.checks import run_checks
from ckptkit.core.ties import shared_keys
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.torch.export import CODES
from tests.features import needs_module
from tests.helpers_cli import run_ckpt
from tests.helpers_export import CONSTANTS, DTYPES, WEIGHTS, changed, config, exported, exported_as, small
from tests.helpers_formats import CODE_OF, assert_same, bits, opened, refused, rezip, saved, write

# Older versions of torch write another archive.
pytestmark = needs_module("torch.export.pt2_archive")


@cache
def loaded() -> torch.export.ExportedProgram:
    return torch.export.load(io.BytesIO(exported()))


def several() -> bytes:
    from torch.export.pt2_archive._package import package_pt2

    def save(buffer: io.BytesIO, program: torch.export.ExportedProgram) -> None:
        package_pt2(buffer, exported_programs={"one": program, "two": torch.export.export(Shift(), (torch.ones(2),))})

    return exported_as(save, torch.nn.Linear(3, 2))


class Shift(torch.nn.Module):
    """A module with one constant and no state."""

    def __init__(self) -> None:
        super().__init__()
        self.by = torch.arange(2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by


def test_the_table_of_dtypes_is_that_of_the_schema() -> None:
    assert set(CODES) == {int(kind) for kind in ScalarType} - {0}
    assert set(CODES.values()) == {CODE_OF[dtype] for dtype in DTYPES}


def test_the_state_dict_is_that_of_torch(tmp_path: Path) -> None:
    """Names, order, dtypes, shapes, strides, ties and bytes agree with torch, for every dtype."""
    expected = loaded().state_dict
    with opened(tmp_path, exported(), "x.pt2") as checkpoint:
        assert checkpoint.format == "torch-export"
        assert_same(checkpoint, expected)
        shared = shared_keys(checkpoint)
        for key, info in checkpoint.items():
            tensor = expected[key]
            assert info.view is not None
            assert (info.view.stride, info.view.offset) == (tensor.stride(), tensor.storage_offset()), key
            start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            same = {
                other
                for other, found in expected.items()
                if other != key and start < found.data_ptr() + found.untyped_storage().nbytes()
                and found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            }  # fmt: skip
            assert set(shared.get(key, ())) == (same if size else set()), key
        assert {"a.weight", "b.weight"} <= set(shared)
        assert {"slice", "whole"} <= set(shared)


def test_constants_are_told_and_can_be_taken(tmp_path: Path) -> None:
    path = write(tmp_path, exported(), "x.pt2")
    expected = loaded().constants
    with open_checkpoint(path) as checkpoint:
        redescribed = {
            entry.path: entry.value for entry in checkpoint.entries if entry.type == "tensor" and entry.is_outside
        }
        assert redescribed == {f"constants.{key}": "F32 [4]" for key in ("fixed", "lifted_tensor_0", "passing")}
        assert [line for line in checkpoint.warnings if line.startswith("3 constants beside the state_dict")]
    with open_checkpoint(f"{path}::constants") as checkpoint:
        assert_same(checkpoint, expected)
        assert checkpoint.envelope == "constants"
        assert checkpoint.warnings == ()


def test_other_files_are_listed_and_not_read(tmp_path: Path) -> None:
    with opened(tmp_path, small(), "x.pt2") as checkpoint:
        files = {entry.path for entry in checkpoint.entries if entry.type == "file"}
        assert files == {"models/model.json", "data/sample_inputs/model.pt"}
        assert checkpoint.warnings == ()
        assert list(checkpoint) == ["weight", "bias"]


def test_of_several_programs_one_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, several(), "x.pt2")
    with pytest.raises(FormatError, match="holds 2 exported programs") as caught:
        open_checkpoint(path)
    assert caught.value.hint == "choose one: PATH::one, PATH::two"
    with open_checkpoint(f"{path}::one") as checkpoint:
        assert [str(info) for info in checkpoint.values()] == ["F32 [2, 3]", "F32 [2]"]
    with open_checkpoint(f"{path}::two") as checkpoint:
        assert len(checkpoint) == 0
    with open_checkpoint(f"{path}::two.constants") as checkpoint:
        assert_same(checkpoint, {"by": torch.arange(2.0)})
    with pytest.raises(FormatError, match="holds nothing at 'three'"):
        open_checkpoint(f"{path}::three")


def test_it_becomes_safetensors_and_torch_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, exported(), "x.pt2")
    expected = loaded().state_dict
    skip = [part for key in ("all_complex32", "all_complex128") for part in ("--drop", key)]
    assert run_ckpt(capsys, "remap", path, "-o", tmp_path / "y.safetensors", *skip).code == 0
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        keys = set(expected) - {"all_complex32", "all_complex128"}
        assert set(file.keys()) == keys
        assert all(bits(file.get_tensor(key)) == bits(expected[key]) for key in keys)
    assert run_ckpt(capsys, "convert", path, "-o", tmp_path / "y.pt").code == 0
    made = torch.load(tmp_path / "y.pt", weights_only=True)
    assert {key: bits(tensor) for key, tensor in made.items()} == {key: bits(expected[key]) for key in expected}
    assert made["a.weight"].data_ptr() == made["b.weight"].data_ptr()
    document = json.loads(run_ckpt(capsys, "show", path, "--json").out)
    assert [entry["key"] for entry in document["tensors"]] == list(expected)
    assert {"path": "constants.passing", "type": "tensor", "value": "F32 [4]", "beside": True} in document["entries"]


def test_a_flipped_byte_is_found_with_the_tensors_that_lie_in_it(tmp_path: Path) -> None:
    """A good archive gives only notes; each record is read once, for tied tensors and other files too."""
    with opened(tmp_path, exported(), "x.pt2") as checkpoint:
        assert [finding.code for finding in run_checks(checkpoint).findings] == [
            "constants",
            "dtype-mix",
            "not-scanned",
        ]
        assert {key for record in checkpoint.records() for key in record.keys} == set(checkpoint)
    data, weights = bytearray(exported()), bits(loaded().state_dict["a.weight"])
    assert data.count(weights) == 1
    data[data.index(weights)] ^= 1
    with opened(tmp_path, bytes(data), "x.pt2") as checkpoint:
        report = run_checks(checkpoint)
        codes = [finding.code for finding in report.findings]
        assert codes == ["constants", "dtype-mix", "checksum", "not-scanned"]
        assert "'a.weight', 'b.weight'" in report.findings[2].message


def redescribed(place: str = WEIGHTS, key: str = "weight", /, **fields: Any) -> bytes:
    """Return the small archive with other fields in the description of one tensor."""
    table = config(small(), place)
    meta = table[key]["tensor_meta"]
    for name, value in fields.items():
        (meta if name in meta else table[key])[name] = value
    return changed(small(), **{place: json.dumps({"config": table}).encode()})


def ints(*values: int) -> list[dict[str, int]]:
    return [{"as_int": value} for value in values]


def test_pickled_weights_are_listed_and_never_opened(tmp_path: Path) -> None:
    """torch.export.load would unpickle these records without restrictions."""
    data = changed(redescribed(use_pickle=True), **{"data/weights/weight_0": saved({"w": torch.zeros(2)})})
    with opened(tmp_path, data, "x.pt2") as checkpoint:
        assert [str(info) for info in checkpoint.values()] == ["F32 [2, 3] (pickled)", "F32 [2]"]
        assert checkpoint.span("weight") is None
        with pytest.raises(FormatError, match="'weight' is a pickled tensor, which is listed but cannot be read"):
            checkpoint.payload("weight")


def test_objects_among_the_constants_are_listed_and_never_opened(tmp_path: Path) -> None:
    table = {
        "helper": {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None},
        "other": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None},
    }
    entries = {CONSTANTS: json.dumps({"config": table}).encode(), "data/constants/custom_obj_0": b"cos\nsystem\n",
               "data/constants/opaque_obj_0": b"x"}  # fmt: skip
    path = write(tmp_path, changed(small(), **entries), "x.pt2")
    for inner, prefix in (("", "constants."), ("::constants", "")):
        with open_checkpoint(path + inner) as checkpoint:
            objects = [entry[:3] for entry in checkpoint.entries if entry.type != "file"]
            assert objects == [
                (f"{prefix}helper", "custom object", "a pickle, not read"),
                (f"{prefix}other", "opaque object", "a pickle, not read"),
            ]


@pytest.mark.parametrize(
    ("data", "kinds", "warning"),
    [
        pytest.param(lambda: redescribed(layout=1), "F32 [2, 3] (sparse)", "", id="sparse"),
        pytest.param(lambda: changed(small(), **{"data/weights/weight_0": b""}), "F32 [2, 3] (meta)", "", id="fake"),
        pytest.param(
            lambda: redescribed(sizes=ints(0, 3)), "F32 [0, 3]", "", id="no elements in a record that has bytes"
        ),
        pytest.param(lambda: redescribed(sizes=[], strides=[]), "F32 []", "", id="a scalar of a longer record"),
        pytest.param(
            lambda: changed(
                small(), **{"data/aotinductor/model/x.so": b"\x7fELF", "data/aotinductor/model/x.cpp": b""}
            ),
            "F32 [2, 3]",
            "holds compiled code, 2 entries such as 'data/aotinductor/model/x.so': listed, and never loaded",
            id="compiled",
        ),
        pytest.param(lambda: changed(small(), **{CONSTANTS: None, "byteorder": None}), "F32 [2, 3]", "", id="less"),
    ],
)
def test_what_is_odd_and_allowed_is_listed(tmp_path: Path, data: Callable[[], bytes], kinds: str, warning: str) -> None:
    with opened(tmp_path, data(), "x.pt2") as checkpoint:
        assert [str(info) for info in checkpoint.values()] == [kinds, "F32 [2]"]
        assert "; ".join(checkpoint.warnings) == warning


def test_a_package_of_compiled_code_alone_has_no_tensors(tmp_path: Path) -> None:
    gone = dict.fromkeys((WEIGHTS, CONSTANTS, "models/model.json", "data/weights/weight_0", "data/weights/weight_1"))
    with opened(tmp_path, changed(small(), **gone, **{"data/aotinductor/model/x.so": b"\x7fELF"}), "x.pt2") as found:
        assert len(found) == 0
        assert "data/aotinductor/model/x.so" in {entry.path for entry in found.entries}


def test_a_deflated_archive_is_inflated(tmp_path: Path) -> None:
    data = changed(small())
    packed = rezip(data, method=zipfile.ZIP_DEFLATED)
    with opened(tmp_path, data, "x.pt2") as one, opened(tmp_path, packed, "y.pt2") as other:
        assert [line for line in other.warnings if "the archive is compressed" in line]
        assert {key: one.read_bytes(key) for key in one} == {key: other.read_bytes(key) for key in other}


HOSTILE = [
    pytest.param(
        lambda: redescribed(path_name="../weights/weight_0"), "'weight': the record name .* is not valid", id="climbs"
    ),
    pytest.param(lambda: redescribed(path_name=".."), "'weight': the record name", id="dots"),
    pytest.param(lambda: redescribed(path_name="/etc/passwd"), "'weight': the record name", id="absolute"),
    pytest.param(lambda: redescribed(path_name="a\\b"), "'weight': the record name", id="backslash"),
    pytest.param(lambda: redescribed(path_name=""), "'weight': the record name '' is not valid", id="no record name"),
    pytest.param(
        lambda: redescribed(path_name=5), "'weight': the record name '5' is not valid", id="a number for a name"
    ),
    pytest.param(
        lambda: redescribed(path_name="weight_9"), "'weight': the record 'weight_9' is not", id="no such record"
    ),
    pytest.param(lambda: redescribed(use_pickle=1), "'weight': .* whether the record is a pickle", id="use_pickle 1"),
    pytest.param(lambda: redescribed(tensor_meta=None), "'weight': the description has no tensor_meta", id="no meta"),
    pytest.param(lambda: redescribed(dtype=0), "'weight': the dtype '0' is not known", id="unknown dtype"),
    pytest.param(lambda: redescribed(dtype="FLOAT"), "'weight': the dtype 'FLOAT'", id="a name for a dtype"),
    pytest.param(lambda: redescribed(dtype=True), "'weight': the dtype 'True'", id="true for a dtype"),
    pytest.param(lambda: redescribed(layout=99), "'weight': the layout '99'", id="unknown layout"),
    pytest.param(lambda: redescribed(sizes=None), "'weight': the sizes are not a list", id="no sizes"),
    pytest.param(lambda: redescribed(sizes=ints(2)), "'weight': 1 sizes and 2 strides", id="rank"),
    pytest.param(
        lambda: redescribed(sizes=ints(2, 4)), "'weight': the view ends at byte 28 .* has 24", id="beyond its record"
    ),
    pytest.param(lambda: redescribed(storage_offset={"as_int": 1}), "'weight': the view ends at byte 28", id="offset"),
    pytest.param(
        lambda: redescribed(storage_offset={"as_int": -1}), "'weight': .* in the storage_offset", id="offset -1"
    ),
    pytest.param(
        lambda: redescribed(strides=ints(3, -1)),
        "'weight': .* in the strides is not a valid size",
        id="a negative stride",
    ),
    pytest.param(lambda: redescribed(strides=ints(2**62, 1)), "'weight': the view ends at byte", id="a stride of 2^62"),
    pytest.param(lambda: redescribed(sizes=ints(2**63, 1)), "'weight': .* in the sizes is not a valid size", id="2^63"),
    pytest.param(lambda: redescribed(sizes=ints(2**62, 2**62)), "'weight': the shape .* overflows", id="overflow"),
    pytest.param(lambda: redescribed(sizes=ints(0, 2**62, 2**62)), "'weight': the shape .* overflows", id="zero first"),
    pytest.param(
        lambda: redescribed(sizes=ints(*[1] * 1025)), "'weight': the sizes are not a list of up to", id="dimensions"
    ),
    pytest.param(
        lambda: redescribed(sizes=[{"as_expr": {"expr_str": "s0", "hint": {"as_int": 2}}}, {"as_int": 3}]),
        "'weight': the sizes depend on the input of the program",
        id="a symbolic size",
    ),
    pytest.param(lambda: redescribed(sizes=[2, 3]), "'weight': '2' in the sizes is not a valid size", id="plain sizes"),
    pytest.param(
        lambda: redescribed(sizes=[{"as_int": True}, {"as_int": 3}]),
        "'weight': .* in the sizes is not a valid size",
        id="true for a size",
    ),
    pytest.param(
        lambda: changed(small(), **{"data/weights/weight_0": bytes(25)}),
        "'weight': .* 25 bytes, not a multiple",
        id="25",
    ),
    pytest.param(lambda: changed(small(), **{WEIGHTS: b"{}"}), "model_weights_config.json' has no config", id="empty"),
    pytest.param(lambda: changed(small(), **{WEIGHTS: b"[1"}), "config.json' is not JSON", id="no JSON"),
    pytest.param(lambda: changed(small(), **{WEIGHTS: b'{"config":{"w":1}}'}), "'w': the record name", id="a number"),
    pytest.param(
        lambda: changed(small(), **{WEIGHTS: b'{"config":{"w":1,"w":2}}'}), "names 'w' twice", id="a name twice"
    ),
    pytest.param(
        lambda: changed(small(), **{WEIGHTS: b'{"config":{"\\u001b[2J":1}}'}), r"'\\x1b\[2J': the record", id="escape"
    ),
    pytest.param(lambda: changed(small(), archive_format=b"pt3"), "an archive of the unknown kind 'pt3'", id="kind"),
    pytest.param(
        lambda: changed(small(), archive_format=b"x" * 2000), "archive_format' has 2000 bytes", id="long kind"
    ),
    pytest.param(lambda: changed(small(), archive_version=b"1"), "archive version '1' is newer", id="a newer version"),
    pytest.param(lambda: changed(small(), byteorder=b"big"), "written on a big-endian machine", id="big-endian"),
    pytest.param(lambda: changed(small(), byteorder=b"middle"), "its byte order is 'middle'", id="middle-endian"),
    pytest.param(lambda: changed(small(), **{"data.pkl": b"}."}), "two checkpoints in one", id="data.pkl beside it"),
    pytest.param(
        lambda: changed(small(), **{"../other/archive_format": b"pt2"}), "unsafe name", id="an entry that climbs"
    ),
    pytest.param(
        lambda: changed(small(), **{"data/weights/model.pt": b"}."}), "its weights are a pickle", id="the old form"
    ),
]


@pytest.mark.parametrize(("make", "reason"), HOSTILE)
def test_a_broken_archive_is_refused_with_the_name_and_the_numbers(
    tmp_path: Path, make: Callable[[], bytes], reason: str
) -> None:
    error = refused(tmp_path, make(), "x.pt2")
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason
    assert len(error.reason) < 500


def test_two_archives_in_one_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, rezip(small(), {"other/archive_format": b"pt2"}), "x.pt2")
    assert "2 entries called archive_format: several archives in one" in error.reason


def test_truncation_is_refused(tmp_path: Path) -> None:
    data = small()
    for size in range(4, len(data), 97):
        assert isinstance(refused(tmp_path, data[:size], "x.pt2"), FormatError)
