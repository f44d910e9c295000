"""Shards are split by size, named as Hugging Face libraries name them, and listed in an index."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.formats.sharded import is_output_shard_name, split_into_shards, weight_index


def sized(*sizes: int) -> list[TensorInfo]:
    return [TensorInfo(f"t{number}", "U8", (size,)) for number, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_every_tensor_is_in_one_shard_in_order(sizes: list[int], limit: int) -> None:
    """A shard is within the limit unless it is one large tensor, and no shard has room for the next tensor."""
    infos = sized(*sizes)
    shards = split_into_shards(infos, limit)
    assert [info for shard in shards for info in shard.infos] == infos
    totals = [sum(info.nbytes for info in shard.infos) for shard in shards]
    for number, (shard, total) in enumerate(zip(shards, totals, strict=True)):
        assert total <= limit or sum(1 for info in shard.infos if info.nbytes) == 1
        if number + 1 < len(shards):
            assert total + shards[number + 1].infos[0].nbytes > limit


@pytest.mark.parametrize(
    ("sizes", "limit", "names"),
    [
        ((), 10, ["model.safetensors"]),
        ((4, 6), 10, ["model.safetensors"]),
        ((99,), 10, ["model.safetensors"]),
        ((6, 6), 10, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ((1, 99, 1), 10, [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]),
    ],
    ids=["none", "fits", "one too large", "two", "large one in the middle"],
)
def test_shards_have_the_names_of_hugging_face(sizes: tuple[int, ...], limit: int, names: list[str]) -> None:
    """A single shard has the plain name; several are numbered from 1."""
    assert [shard.name for shard in split_into_shards(sized(*sizes), limit)] == names


def test_the_index_maps_every_key_to_its_shard() -> None:
    """The index has the total size and every key, and unusual keys survive JSON."""
    infos = [TensorInfo("ü\n\ud800", "F32", (2,)), TensorInfo("b", "BF16", (3,))]
    shards = split_into_shards(infos, 8)
    name, data = weight_index(shards)
    assert name == "model.safetensors.index.json"
    assert json.loads(data) == {
        "metadata": {"total_size": 14},
        "weight_map": {"ü\n\ud800": shards[0].name, "b": shards[1].name},
    }


@pytest.mark.parametrize(
    ("name", "stale"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("pytorch_model-00003-of-00003.bin", False),
        ("model.safetensors", True),
        ("pytorch_model.bin", False),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin.index.json", False),
        ("config.json", False),
        ("tokenizer.model", False),
        ("optimizer.pt", False),
        ("training_args.bin", False),
        ("adapter_model.safetensors", False),
        ("model-1-of-2.safetensors", False),
        ("model-00001-of-00002.safetensors.bak", False),
        ("index.json", False),
    ],
)
def test_only_shards_and_indexes_of_a_model_are_stale(name: str, *, stale: bool) -> None:
    """A stale file would be read or refused beside new shards; every other file of a directory is kept."""
    assert is_output_shard_name(name) is stale
