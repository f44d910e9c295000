"""Table H: directories of shards, distributed checkpoints, and other files in such directories."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from tests.helpers_dcp import Cut, metadata_of, put_metadata, write_cut
from tests.helpers_dcp import edit as edit_metadata
from tests.helpers_dcp import save as save_distributed
from tests.helpers_formats import refusal
from tests.helpers_outputs import scratch
from tests.helpers_shards import NAMES, STATE, edit, save, shard
from tests.hostile.contract import (
    Accepted,
    MakeInput,
    Refused,
    assert_accepted,
    assert_refused,
    one_of_each_row,
    run_limited,
)

FIRST, SECOND, INDEX = NAMES["safetensors"]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
PIECE = "shard-{:05}-model-00001-of-00001.safetensors"


class Attack:
    """Creates a file in the current directory when pickle loads it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def shards(change: Callable[[Path], object]) -> MakeInput:
    """Return a function that writes two shards and their index, and changes them."""

    def make(directory: Path) -> Path:
        change(shard(directory / "shards"))
        return directory / "shards"

    return make


def second(change: Callable[[Path], object]) -> MakeInput:
    """Return a function that writes two shards and their index, and changes the second shard."""

    def damage(index: Path) -> None:
        (index.parent / SECOND).unlink()
        change(index.parent / SECOND)

    return shards(damage)


def index_of(text: str | bytes) -> MakeInput:
    return shards(lambda index: index.write_bytes(text.encode() if isinstance(text, str) else text))


def outside(path: Path) -> None:
    """Replace a file by a link to the cache of a hub."""
    (path.parent.parent / "blobs").mkdir()
    save({"c.w": STATE["c.w"]}, path.parent.parent / "blobs" / "0a1b.safetensors")
    path.symlink_to("../blobs/0a1b.safetensors")


def in_two_shards(index: Path) -> None:
    save({"c.w": STATE["c.w"], "a.w": STATE["a.w"]}, index.parent / SECOND)


def third(index: Path) -> None:
    save({"z": torch.ones(1)}, index.parent / "model-00003-of-00003.safetensors")


def beside(name: str) -> MakeInput:
    return shards(lambda index: save({"other": torch.ones(1)}, index.parent / name))


def both_kinds(directory: Path) -> Path:
    shard(directory / "shards", "bin")
    return shard(directory / "shards").parent


def case_alone(directory: Path) -> Path:
    """Write two shards whose names differ only in case: on some systems one file overwrites the other."""
    path = directory / "shards"
    path.mkdir()
    save({"a": torch.ones(1)}, path / "Model-00001-of-00002.safetensors")
    save({"b": torch.ones(1)}, path / "model-00001-of-00002.safetensors")
    weight_map = {"a": "Model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def distributed(change: Callable[[str], object]) -> MakeInput:
    def make(directory: Path) -> Path:
        state = {"w": torch.arange(21.0).reshape(7, 3), "v": torch.ones(2)}
        cuts: dict[str, tuple[torch.Tensor, list[Cut]]] = {
            "w": (state["w"], [((0, 0), (4, 3)), ((4, 0), (3, 3))]),
            "v": (state["v"], [((0,), (2,))]),
        }
        change(write_cut(directory / "run", cuts))
        return directory / "run"

    return make


def metadata(change: Callable[[Any], object]) -> MakeInput:
    return distributed(lambda path: edit_metadata(path, change))


def moved(**fields: Any) -> MakeInput:
    """Return a function that changes the place of the second chunk."""

    def change(found: Any) -> None:
        place = MetadataIndex("w", (4, 0))
        found.storage_data[place] = dataclasses.replace(found.storage_data[place], **fields)

    return metadata(change)


def without_second_chunk(found: Any) -> None:
    chunk = found.state_dict_metadata["w"].chunks.pop()
    del found.storage_data[MetadataIndex("w", chunk.offsets)]


def second_chunk(offsets: tuple[int, int], sizes: tuple[int, int]) -> MakeInput:
    def change(found: Any) -> None:
        chunk = found.state_dict_metadata["w"].chunks[1]
        place = found.storage_data.pop(MetadataIndex("w", chunk.offsets))
        chunk.offsets, chunk.sizes = torch.Size(offsets), torch.Size(sizes)
        found.storage_data[MetadataIndex("w", offsets)] = place

    return metadata(change)


def code_beside(path: str) -> None:
    found = metadata_of(path)
    found.planner_data["more"] = Attack()
    put_metadata(path, found)


def code_as_item(directory: Path) -> Path:
    return Path(save_distributed(directory / "run", {"model": {"w": torch.ones(2)}, "x": Attack()}))


def pieces(missing: int) -> MakeInput:
    """Return a function that writes the safetensors form of DCP for three ranks without one of the files."""

    def make(directory: Path) -> Path:
        for number in {1, 2, 3} - {missing}:
            info = json.dumps({"w": {"saved_offsets": [3 * (number - 1), 0]}})
            save_file({"w": torch.ones(3, 2)}, directory / PIECE.format(number), {"DCP_SHARDING_INFO": info})
        return directory

    return make


def configuration(directory: Path) -> Path:
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    return directory


def adapter(directory: Path) -> Path:
    save({"base_model.model.q.lora_A.weight": torch.ones(2, 4)}, directory / "adapter_model.safetensors")
    return directory


def of_another_rank(directory: Path) -> Path:
    configuration(directory)
    return adapter(directory)


def adapter_and_model(directory: Path) -> Path:
    save(STATE, directory / "model.safetensors")
    return adapter(directory)


def without_weights(directory: Path) -> Path:
    """Write the model_states of a rank of ZeRO-3: names and shapes without weights."""
    state = {"module": {"w": torch.empty(0)}, "param_shapes": [{"w": torch.Size((2, 3))}]}
    torch.save(state, directory / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return directory / "zero_pp_rank_0_mp_rank_00_model_states.pt"


REFUSED: dict[str, Refused] = {
    "H1 climbs": Refused(shards(lambda at: edit(at, **{"a.w": "../x.safetensors"})), "unsafe shard '../x.safetensors'"),
    "H1 absolute": Refused(shards(lambda at: edit(at, **{"a.w": "/etc/passwd"})), "unsafe shard '/etc/passwd'"),
    "H1 Windows": Refused(shards(lambda at: edit(at, **{"a.w": "C:\\x"})), "unsafe shard 'C:"),
    "H2 a link to no checkpoint": Refused(second(lambda at: at.symlink_to("/etc/passwd")), "should hold 'c.w'"),
    "H2 a link to a device": Refused(second(lambda at: at.symlink_to("/dev/zero")), "not a regular file"),
    "H3 missing": Refused(second(lambda _: None), "no such file or directory (a shard that should hold 'c.w')"),
    "H3 empty": Refused(second(lambda at: at.touch()), "the file is empty (a shard that should hold 'c.w')"),
    "H3 a pointer": Refused(second(lambda at: at.write_bytes(LFS)), "git-lfs pointer"),
    "H3 truncated": Refused(
        shards(lambda at: os.truncate(at.parent / SECOND, os.path.getsize(at.parent / SECOND) - 1)), "truncated: 1 of"
    ),
    "H3 a directory": Refused(second(lambda at: at.mkdir()), "not a regular file (a shard that should hold"),
    "H3 a dangling link": Refused(
        second(lambda at: at.symlink_to("gone")), "a symbolic link to 'gone', which does not"
    ),
    "H4 in the index only": Refused(
        shards(lambda at: edit(at, x=FIRST)), "the index places 'x' in this shard, but the shard has no such tensor"
    ),
    "H4 in the wrong shard": Refused(
        shards(lambda at: edit(at, **{"a.w": SECOND})), "places 'a.w' in this shard, but the shard"
    ),
    "H4 in the shard only": Refused(
        shards(lambda at: edit(at, **{"a.b": ""})),
        "this shard holds 'a.b', but the index does not place the tensor here",
    ),
    "H4 in two shards": Refused(shards(in_two_shards), "this shard holds 'a.w', but the index does not"),
    "H4 a third shard": Refused(
        shards(third),
        "the index does not name shard 'model-00003-of-00003.safetensors' in its directory",
    ),
    "H5 names of 300,000 tensors": Refused(
        index_of('{"weight_map":{' + ",".join(f'"{number}":"{FIRST}"' for number in range(300_000)) + "}}"),
        "the index names more than 250,000 tensors",
    ),
    "H5 not JSON": Refused(index_of("{"), "the index is not JSON"),
    "H5 empty": Refused(index_of(""), "the index is not JSON"),
    "H5 a list": Refused(index_of("[]"), "the index is a JSON list"),
    "H5 not UTF-8": Refused(index_of(b'{"\xff":1}'), "the index is not UTF-8"),
    "H5 nested": Refused(index_of("[" * 10**5), "the index is nested too deeply"),
    "H5 no map": Refused(index_of("{}"), "the index has no weight_map"),
    "H5 an empty map": Refused(index_of('{"weight_map":{}}'), "the index has no weight_map"),
    "H5 a list as map": Refused(index_of('{"weight_map":[1]}'), "the index has no weight_map"),
    "H5 a number": Refused(shards(lambda at: edit(at, **{"a.w": 1})), "maps 'a.w' to an int, not to a file name"),
    "H5 an object": Refused(shards(lambda at: edit(at, **{"a.w": {"file": FIRST}})), "maps 'a.w' to a dict, not"),
    "H5 null": Refused(shards(lambda at: edit(at, **{"a.w": None})), "maps 'a.w' to null, not to a file"),
    "H5 twice": Refused(index_of('{"weight_map":{"a":"x","a":"y"}}'), "the index names 'a' twice"),
    "H5 300 MB": Refused(
        shards(lambda at: os.truncate(at, 300 << 20)), "the index has 314,572,800 bytes, more than the"
    ),
    "H7 a pickle": Refused(shards(lambda at: edit(at, **{"a.w": "x.bin"})), "of safetensors shards names 'x.bin'"),
    "H10 code instead of metadata": Refused(
        distributed(lambda path: put_metadata(path, Attack())), "the pickle is a 'posix.system', not a Metadata of DCP"
    ),
    "H11 no metadata": Refused(
        distributed(lambda path: os.remove(f"{path}/.metadata")), "no .metadata, which is written last: an interrupted"
    ),
    "H12 missing": Refused(
        distributed(lambda path: os.remove(f"{path}/__1_0.distcp")), "no such file or directory (the"
    ),
    "H12 truncated": Refused(distributed(lambda path: os.truncate(f"{path}/__1_0.distcp", 100)), "truncated?"),
    "H12 climbs": Refused(moved(relative_path="../outside.distcp"), "the unsafe file '../outside.distcp'"),
    "H12 offset past the end": Refused(moved(offset=10**9), "places the chunk at [4, 0] at bytes 1,000,000,000"),
    "H13 hole": Refused(metadata(without_second_chunk), "'w': rows 4-6 are covered by no chunk"),
    "H13 overlap": Refused(second_chunk((3, 0), (4, 3)), "'w': row 3 is covered by 2 chunks"),
    "H13 outside": Refused(second_chunk((5, 0), (3, 3)), "'w': a chunk at [5, 0] of size [3, 3] reaches outside"),
    "H14 the first shard": Refused(pieces(1), "'w': rows 0-2 are covered by no chunk"),
    "H14 the middle shard": Refused(pieces(2), "'w': rows 3-5 are covered by no chunk"),
    "H16 an adapter beside a whole model": Refused(adapter_and_model, "holds a whole model and an adapter"),
    "H16 a configuration without its adapter": Refused(configuration, "holds adapter_config.json, but not the weights"),
}
ACCEPTED: dict[str, Accepted] = {
    "H2 a link as in a cache": Accepted(second(outside), "", "3 tensors"),
    "H6 a wrong total": Accepted(
        lambda directory: shard(directory, total=5).parent,
        "total size of 5 bytes, but the tensors have 60",
        "c.w",
    ),
    "H8 an index and a single file": Accepted(
        beside("model.safetensors"), "'model.safetensors' is not read; only the index", "3 tensors"
    ),
    "H8 two kinds of index": Accepted(
        both_kinds, "'pytorch_model.bin.index.json' is not read; only the index", "3 tensors"
    ),
    "H8 distributed and a single file": Accepted(
        distributed(lambda path: save(STATE, Path(path) / "model.safetensors")),
        "'model.safetensors' is not read; only the distributed checkpoint",
        "w",
    ),
    "H9 names that differ in case": Accepted(case_alone, "differ only in case", "2 tensors"),
    "H10 code in the metadata": Accepted(
        distributed(code_beside), "looks malicious: it asks to call posix.system", "[7, 3]"
    ),
    "H10 code as an item": Accepted(code_as_item, "looks malicious: it asks to call posix.system", "posix.system"),
    "H15 the model_states of ZeRO-3 alone": Accepted(
        without_weights, "empty: ZeRO-3 stores the elements in the optim_states files", "w"
    ),
    "H16 an adapter without its configuration": Accepted(
        adapter, "no adapter_config.json in the directory of the weights: the scale", "lora_A"
    ),
    "H16 another rank than the configuration gives": Accepted(
        of_another_rank, "has rank 2, but adapter_config.json", "q.lora"
    ),
    "H14 the last shard": Accepted(pieces(3), "2 shards joined; a missing last shard cannot be noticed", "[6, 2]"),
}
OTHER = ("H13 another dtype", "H17 a hundred thousand files")


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_given(name: str, tmp_path: Path) -> None:
    assert REFUSED[name].reason in refusal(str(REFUSED[name].make(tmp_path))).reason


@pytest.mark.parametrize("name", one_of_each_row(REFUSED))
def test_it_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_read_with_a_warning(name: str, tmp_path: Path) -> None:
    assert_accepted(tmp_path, ACCEPTED[name])


def test_h13_a_chunk_of_another_dtype_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    """The header of a chunk is read with its bytes; the unfinished output is removed."""

    def other(found: Any) -> None:
        found.state_dict_metadata["w"].properties = TensorProperties(dtype=torch.int32)

    case = Refused(metadata(other), "holds F32 [4, 3], but the metadata says I32 [4, 3]")
    assert_refused(tmp_path, case, command="convert")


def test_h17_many_files_and_a_closed_directory_are_handled() -> None:
    with scratch() as name:
        for number in range(30_000):
            os.mknod(f"{name}/{number}.txt")
        os.mkdir(f"{name}/closed", 0)
        save(STATE, Path(name) / "model.safetensors")
        ran = run_limited("show", name)
        assert (ran.code, ran.err) == (0, "")
        assert "3 tensors" in ran.out
