"""Small valid files of every kind, written by their own libraries, for the fuzzing tests to damage."""

from __future__ import annotations

import io
import json
import pickle
import re
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.features import Shard, safetensors_knows
from tests.formats.patches import small_patch
from tests.helpers_dcp import metadata_of, save
from tests.helpers_export import small
from tests.helpers_formats import f32, rezip, safetensors_file, saved
from tests.helpers_gguf import written
from tests.helpers_ranks import save_dtensors, save_sharded_tensors
from tests.helpers_tar import parts, tar

# The file of each kind that is damaged; the other files of the directory stay whole.
PARTS = {
    "ranks": "model_world_size_2_rank_1.pt", "shards": "model_rank_1.pt", "llama": "consolidated.01.pth",
    "universal": "zero/w/fp32.pt",
}  # fmt: skip
BASE = torch.arange(12, dtype=torch.float32)
STATE = OrderedDict(
    [("a.weight", BASE.reshape(3, 4)), ("a.bias", BASE[4:8]), ("t", BASE.reshape(3, 4).T), ("n", torch.tensor(7))]
)
ARRAYS: tuple[dict[str, np.ndarray[Any, Any]], ...] = (
    {"w": np.arange(6, dtype="<f4").reshape(2, 3), "b": np.arange(4, dtype="|i1")},
    {"w": np.asfortranarray(np.arange(6, dtype=">f8").reshape(3, 2)), "n": np.array(7, dtype=">i2")},
    {"w": np.arange(3, dtype="<c16"), "odd": np.array([{}, None], dtype=object), "e": np.zeros((0, 2), dtype="|b1")},
)


def corpus(kind: str) -> list[bytes]:
    """Return small files of one kind, written by its own library."""
    if kind == "safetensors":
        packed = f32(0, 2, [4], "F4") if safetensors_knows("F4") else f32(0, 2, [2], "F8_E5M2")
        header = {"__metadata__": {"format": "pt"}, "w": f32(0, 24, [2, 3]), "b": f32(24, 26, [2], "U8")}
        plain = safetensors_file(header, bytes(range(26)))
        return [
            plain,
            safetensors_file({"x": f32(0, 0, [0, 3]), "y": packed, "z": f32(2, 4, [], "BF16")}, b"abcd"),
        ]
    if kind == "delta":
        return [small_patch()]
    if kind == "index":
        weight_map = {"w": "one.safetensors", "v": "two.safetensors"}
        return [json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}).encode()]
    if kind in ("npy", "npz"):
        return [_by_numpy(arrays, kind) for arrays in ARRAYS]
    if kind == "tar":
        tensors = (BASE.reshape(3, 4), BASE[4:8], torch.arange(5))
        return [tar(parts({"model": dict(zip("abn", tensors, strict=True)), "epoch": 3}, tensors))]
    if kind in PARTS:
        with tempfile.TemporaryDirectory() as directory:
            return [write_parts(kind, Path(directory)).read_bytes()]
    if kind == "torchscript":
        return [_scripted()]
    if kind == "dcp":
        return [_metadata(state) for state in (STATE, {"model": dict(STATE), "step": 3})]
    if kind == "pt2":
        return [small()]
    if kind == "gguf":
        return [written(_plain_gguf), written(_quantised_gguf)]
    nested = {
        "model": STATE,
        "epoch": 3,
        "lr": 0.5,
        "optimizer": {"state": {0: {"m": BASE}}, "param_groups": [{"params": [0]}]},
    }
    legacy = kind == "legacy"
    files = [saved(tree, legacy=legacy) for tree in (STATE, nested)]
    if legacy:
        files = [_with_stable_keys(data) for data in files]
    else:
        # Without checksums, damage reaches the pickle machine, which the fuzzing tests.
        set_crc32_options: Any = getattr(torch.serialization, "set_crc32_options", lambda _: None)
        set_crc32_options(False)
        files += [
            saved(tree)
            for tree in (STATE, nested, {"w": BASE.to(torch.float8_e5m2), "c": BASE.to(torch.complex64).conj()})
        ]
        set_crc32_options(True)
        files.append(rezip(files[0], method=8))
    return files


def _scripted() -> bytes:
    buffer = io.BytesIO()
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def items(directory: Path) -> None:
    """Write the items that the metadata of the distributed checkpoints names."""
    save(directory, {"model": dict(STATE), "step": 3})


def write_parts(kind: str, directory: Path) -> Path:
    """Write a checkpoint of several files into the directory, and return the path of the file to damage."""
    directory.mkdir(exist_ok=True)
    if kind == "ranks":
        rows, columns = (BASE.reshape(4, 3), "", (Shard(0),)), (BASE.reshape(3, 4), "", (Shard(1),))
        save_dtensors(directory, (2,), {"rows": rows, "columns": columns}, plain={"b": BASE[:2]})
    elif kind == "shards":
        save_sharded_tensors(directory, 2, {"w": BASE.reshape(4, 3), "b": BASE[:2]})
    elif kind == "llama":
        for rank in range(2):
            square = BASE[:8].reshape(2, 4)
            state = {"tok_embeddings.weight": BASE[:8].reshape(4, 2), "norm.weight": BASE[:4], "output.weight": square}
            state |= {"layers.0.attention.wq.weight": square, "layers.0.attention.wo.weight": square.reshape(4, 2)}
            torch.save(state, directory / f"consolidated.{rank:02}.pth")
    else:
        for name in ("w", "v"):
            (directory / "zero" / name).mkdir(parents=True, exist_ok=True)
            torch.save({"param": BASE.reshape(3, 4), "cat_dim": 0}, directory / "zero" / name / "fp32.pt")
    return directory / PARTS[kind]


def _metadata(state: Any) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        metadata = metadata_of(save(Path(directory) / "saved", state))
    metadata.storage_meta = None  # it differs from run to run
    return pickle.dumps(metadata, 4)


def _by_numpy(arrays: dict[str, Any], kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, arrays["w"], allow_pickle=True)
    elif "odd" in arrays:
        np.savez_compressed(buffer, **arrays)
    else:
        np.savez(buffer, **arrays)
    return buffer.getvalue()


def _plain_gguf(writer: gguf.GGUFWriter) -> None:
    writer.add_custom_alignment(8)
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b", np.arange(4, dtype=np.int8))
    writer.add_tensor("h", np.arange(2, dtype=np.float16))


def _quantised_gguf(writer: gguf.GGUFWriter) -> None:
    writer.add_token_list([f"t{index}" for index in range(20)])
    writer.add_array("few", [1, 2, 3])
    writer.add_tensor("q", np.zeros((2, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("n", np.arange(3, dtype=np.int64))


def _with_stable_keys(data: bytes) -> bytes:
    # torch names a legacy storage by its address, which differs between runs; the order of the names is kept.
    for number, key in enumerate(sorted(set(re.findall(rb"\d{12,}", data)))):
        data = data.replace(key, b"%0*d" % (len(key), number))
    return data
