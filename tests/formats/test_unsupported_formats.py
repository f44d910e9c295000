"""Files of formats that ckptkit does not read are recognised by their bytes, and the hint names a reader."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.foreign import is_flax, is_onnx
from tests.features import has_module
from tests.helpers_dcp import save as save_distributed
from tests.helpers_export import small
from tests.helpers_formats import refusal, safetensors_file, zip_of

# Written by onnx 1.23 (IR 14): a graph of one Add with one initializer, with and without a producer.
GRAPH = bytes.fromhex(
    "0a0e0a01780a017712017922034164641201672a1108021001420177"
    "4a080000803f0000803f5a0f0a0178120a0a08080112040a020802620f0a0179120a0a08080112040a020802"
)
PLAIN_ONNX = b"\x08\x0e\x3a" + bytes([len(GRAPH)]) + GRAPH + bytes.fromhex("4202101c")
TORCH_ONNX = b"\x08\x09\x12\x07pytorch\x1a\x062.13.0" + PLAIN_ONNX[2:]
LONG_ONNX = b"\x08\x0e\x22\x07ai.onnx\x28\x03\x32\xac\x02" + b"a" * 300 + PLAIN_ONNX[2:]
# Written by msgpack 1.2 as flax packs its arrays.
FLAX = bytes.fromhex("81a6706172616d7381a744656e73655f3081a66b65726e656cc7260193920302a7666c6f61743332c418") + bytes(24)
FLAX_STATE = bytes.fromhex(
    "84a47374657003a26c72cb3fe0000000000000a36f7074c0a6706172616d7381a177c8097001939203ccc8a7666c6f61743332c50960"
) + bytes(2400)  # fmt: skip
# Written by h5py 3.16.
HDF5 = bytes.fromhex("894844460d0a1a0a00000000000808000400100000000000") + bytes(2000)
TENSORFLOW_TABLE = b"\0\x00\x08\x08\x01\x1a\x02\x08\x01" + bytes(64) + bytes.fromhex("57fb808b247547db")

FILES: dict[str, tuple[str, bytes, str, str]] = {
    "HDF5": ("x.h5", HDF5, "an HDF5 file", "h5py"),
    "ONNX": ("x.onnx", PLAIN_ONNX, "an ONNX model", "onnx.load"),
    "ONNX of torch": ("x.onnx", TORCH_ONNX, "an ONNX model", "onnx.load"),
    "ONNX with documentation": ("x.bin", LONG_ONNX, "an ONNX model", "onnx.load"),
    "flax": ("flax_model.msgpack", FLAX, "a msgpack file of flax", "flax.serialization"),
    "flax with a step": ("checkpoint_3", FLAX_STATE, "a msgpack file of flax", "flax.serialization"),
    "TensorFlow Lite": ("x.tflite", b"\x1c\0\0\0TFL3" + bytes(20), "a TensorFlow Lite model", "tf.lite"),
    "Core ML": ("model.mlmodel", b"\x08\x06\x12\xda\x01\x0a\x18\x0a\x07", "a Core ML model", "coremltools"),
    "SavedModel": ("saved_model.pb", b"\x08\x01\x12\xe6\x95B\x0a\xc8\x0c", "a SavedModel", "tf.saved_model"),
    "an index of TensorFlow": ("ckpt-1.index", TENSORFLOW_TABLE, "a file of a TensorFlow checkpoint", "tf.train"),
    "a shard of TensorFlow": ("ckpt-1.data-00000-of-00001", b"\x01\x02" * 99, "a file of a Tens", "tf.train"),
    "the state of TensorFlow": (
        "checkpoint", b'model_checkpoint_path: "ckpt-1"\nall_model_checkpoint_paths: "ckpt-1"\n',
        "the state of a TensorFlow checkpoint", "tf.train"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_an_unsupported_file_is_named(tmp_path: Path, case: str) -> None:
    name, data, what, reader = FILES[case]
    (tmp_path / name).write_bytes(data)
    error = refusal(str(tmp_path / name))
    assert isinstance(error, FormatError)
    assert error.reason.startswith(what)
    assert error.reason.endswith("which is not read")
    assert error.hint
    assert reader in error.hint


def test_an_archive_of_keras_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        for name, data in (("metadata.json", b"{}"), ("config.json", b"{}"), ("model.weights.h5", HDF5)):
            archive.writestr(name, data)
    error = refusal(str(tmp_path / "x.keras"))
    assert (error.reason, error.hint) == ("a Keras archive, which is not read", "keras.saving.load_model reads it")


def test_an_exported_program_of_an_older_torch_is_named(tmp_path: Path) -> None:
    """Where torch writes the older layout, the file is its own; elsewhere it has the same entries."""
    data = b"" if has_module("torch.export.pt2_archive") else small()
    if not data:
        names = ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt", "version")
        data = zip_of([(name, b"{}") for name in names], zipfile.ZIP_STORED)
    (tmp_path / "x.pt2").write_bytes(data)
    error = refusal(str(tmp_path / "x.pt2"))
    assert error.reason == "an archive of torch.export in the layout of an older torch, which is not read"
    assert "torch.export.load reads it" in str(error.hint)


ARCHIVES = {
    "a wheel": (
        ["net-1.dist-info/WHEEL", "net/__init__.py", "net/a.pth", "net/B.SAFETENSORS"],
        "a Python wheel, which holds 2 files of weights: 'net/a.pth', 'net/B.SAFETENSORS'",
    ),
    "a wheel without weights": (
        ["net-1.dist-info/WHEEL", "net/__init__.py"],
        "a Python wheel, which holds no file of weights",
    ),
    "another archive": (
        ["a/model.pt", "a/config.json"],
        "a zip archive of other files, which holds 1 file of weights: 'a/model.pt'",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_of_files_is_unpacked_by_its_hint(tmp_path: Path, case: str) -> None:
    names, what = ARCHIVES[case]
    (tmp_path / "my net.zip").write_bytes(zip_of([(name, b"x") for name in names], zipfile.ZIP_STORED))
    error = refusal(str(tmp_path / "my net.zip"))
    assert error.reason.startswith(what)
    if error.hint is None:
        assert "no file of weights" in what
        return
    *_, archive, folder = shlex.split(error.hint)
    assert error.hint.startswith("unpack it first: python -m zipfile -e '")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", archive, folder], cwd=tmp_path, check=True)
    assert [name for name in names if (tmp_path / "my net" / name).read_bytes() == b"x"] == names


def test_torchscript_beside_other_weights_is_not_overlooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of silero-vad has one model in safetensors and two in TorchScript."""
    (tmp_path / "a.safetensors").write_bytes(safetensors_file({}, b""))
    (tmp_path / "b.jit").write_bytes(zip_of([("m/data.pkl", b"}."), ("m/constants.pkl", b").")]))
    (tmp_path / "__pycache__").mkdir()
    error = refusal(str(tmp_path))
    assert error.reason.endswith("2 files of weights and no index: a.safetensors, b.jit")
    all_of_them = f"ckpt show '{tmp_path}'/*.jit '{tmp_path}'/*.safetensors lists all of them"
    assert error.hint == f"give the path of one file; {all_of_them}"
    (tmp_path / "b.jit").unlink()
    (tmp_path / "c.safetensors").write_bytes(b"")
    assert str(refusal(str(tmp_path)).hint).endswith(f"ckpt show '{tmp_path}'/*.safetensors lists all of them")
    monkeypatch.chdir(tmp_path)
    assert str(refusal(".").hint).endswith("; ckpt show *.safetensors lists all of them")


NOT_ONNX = {
    "no graph": b"\x08\x0e",
    "a graph longer than the file": PLAIN_ONNX[:-8],
    "a graph to the end": PLAIN_ONNX[:-4],
    "fields out of order": b"\x08\x0e\x1a\x01a\x12\x01a" + bytes(40),
    "a version of the future": b"\x08\x7f" + PLAIN_ONNX[2:],
    "a producer that is no text": b"\x08\x07\x12\x04\x00\xff\x00\xff" + bytes(40),
    "a message of its own": b"\x08\x01\x10\x02\x1a\x03abc" + bytes(40),
}
NOT_FLAX = {
    "plain msgpack": bytes.fromhex("82a16101a162920102"),
    "another extension": FLAX.replace(b"\xc7\x26\x01", b"\xc7\x26\x05"),
    "a key that is no text": b"\x81\x01\xc7\x26\x01\x93",
    "an extension at the top": b"\xc7\x26\x01\x93\x92",
    "cut off before the first array": FLAX[:20],
    "an empty mapping": b"\x80\x80\x80",
    "a bare pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "mappings without end": b"\x81\xa1a" * 200,
}


@pytest.mark.parametrize("data", [*NOT_ONNX.values(), *NOT_FLAX.values()], ids=[*NOT_ONNX, *NOT_FLAX])
def test_similar_bytes_are_not_recognised(data: bytes) -> None:
    assert not is_onnx(data[:512], len(data), lambda at, count: data[at : at + count])
    assert not is_flax(data[:512])


def test_random_bytes_are_not_recognised() -> None:
    chance = random.Random(0)  # noqa: S311 - the same bytes every time
    for first in (b"", b"\x08", b"\x08\x07", b"\x81", b"\x81\xa6params"):
        for _ in range(4000):
            data = first + chance.randbytes(100)
            assert not is_onnx(data, len(data), lambda at, count, data=data: data[at : at + count])  # type: ignore[misc]
            assert not is_flax(data)


DIRECTORIES = {
    "SavedModel": (["saved_model.pb", "variables/variables.index"], "a SavedModel of TensorFlow", "tf.saved_model"),
    "Core ML": (["Manifest.json", "Data/weight.bin"], "a Core ML model", "coremltools"),
    "TensorFlow": (["checkpoint", "a.index", "a.data-00000-of-00001"], "a checkpoint of TensorFlow", "tf.train"),
    "Orbax": (["_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "d/0"], "a checkpoint of Orbax", "orbax"),
    "zarr 2": ([".zgroup", "w/.zarray"], "a directory of zarr arrays", "zarr reads"),
    "zarr 3": (["zarr.json", "w/zarr.json"], "a directory of zarr arrays", "zarr reads"),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_an_unsupported_directory_is_named(tmp_path: Path, case: str) -> None:
    names, what, reader = DIRECTORIES[case]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    error = refusal(str(tmp_path))
    assert error.reason.startswith(what)
    assert error.hint
    assert reader in error.hint


def test_megatron_in_zarr_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "common_backend": "torch"}))
    torch.save({"iteration": 3}, tmp_path / "common.pt")
    error = refusal(str(tmp_path))
    assert error.reason == "a checkpoint of Megatron in the format 'zarr', which is not read"
    assert error.hint == "save it with --dist-ckpt-format torch_dist"


def test_megatron_in_torch_dist_is_a_distributed_checkpoint(tmp_path: Path) -> None:
    """The file of common values is an entry."""
    directory = Path(save_distributed(tmp_path / "iter_0000003", {"model": {"w": torch.ones(2, 3)}}))
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "common_backend": "torch"}))
    torch.save({"iteration": 3, "checkpoint_version": 3.0}, directory / "common.pt")
    with open_checkpoint(directory) as checkpoint:
        assert {key: info.shape for key, info in checkpoint.items()} == {"w": (2, 3)}
        assert {entry.path: entry.value for entry in checkpoint.entries if entry.is_file} == {
            "common.pt": {"iteration": 3, "checkpoint_version": 3.0},
            "metadata.json": {"sharded_backend": "torch_dist", "common_backend": "torch"},
        }


@pytest.mark.parametrize(
    "names", [["checkpoint-2", "checkpoint-4"], ["unet", "vae", "text_encoder", "scheduler", "tokenizer"]]
)
def test_the_hint_names_the_directories_inside(tmp_path: Path, names: list[str]) -> None:
    """The checkpoints of a run or a pipeline are one level down, and the user must choose one."""
    for name in names:
        (tmp_path / name).mkdir()
    error = refusal(str(tmp_path))
    assert error.reason == "a directory without a checkpoint"
    listed = ", ".join(sorted(names)[:4]) + (" and 1 more" if len(names) > 4 else "")
    assert error.hint == f"give one of the directories inside: {listed}"
