"""The file of a patch says what it holds, and is refused with one line where it contradicts itself."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from ckptkit import TensorInfo
from ckptkit.core.checkpoint.payload import HeldBytes
from ckptkit.core.checkpoint.provenance import DELTA
from ckptkit.deltas.patch import Patch, Side, contents_of, packed_key
from ckptkit.deltas.patch_file import INDEX, is_patch, patch_contents, read_patch
from ckptkit.deltas.patch_index import index_of
from ckptkit.errors import FormatError, PlanError
from ckptkit.formats import open_checkpoint
from tests.formats.mutate import mutate
from tests.helpers_formats import safetensors_file


def side(name: str, **tensors: tuple[str, tuple[int, ...]]) -> Side:
    """Return a side whose digests follow from ``name``, the keys and the dtypes."""
    infos = {key: TensorInfo(key, *look) for key, look in tensors.items()}
    digests = {key: _sha(f"{name} {key}") for key in infos}
    return Side(infos, digests, contents_of(digests))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


BASE = side("base", same=("F32", (2, 3)), w=("F32", (4,)), old=("I64", ()), emb=("BF16", (3, 2)), t=("F32", (1,)))
NEW = side(
    "new",
    w=("F32", (4,)),
    same=("F32", (2, 3)),
    emb=("BF16", (5, 2)),
    t=("F16", (1,)),
    tie=("F32", (4,)),
    moved=("I64", ()),
)
DIGESTS = {**NEW.digests, "same": BASE.digests["same"], "tie": NEW.digests["w"], "moved": BASE.digests["old"]}
PATCH = Patch(
    BASE,
    replace(NEW, digests=DIGESTS, contents=contents_of(DIGESTS)),
    frozenset(("w", "emb")),
    frozenset(("t",)),
    (("w", "tie"),),
    {"format": "pt", "name": "ä\x00"},
    "zlib",
    "ckptkit 1.0",
    {"moved": "old"},
    {"": 1, "bn.": 2},
    "base.pt",
    "safetensors",
)


def file_of(patch: Patch, change: Callable[[dict[str, Any]], None] | None = None) -> bytes:
    """Return the file of a patch. ``change`` may edit its document, its index and its tensors.

    The size and the checksum of the index follow, unless they are edited.
    """
    contents = patch_contents(patch, {key: HeldBytes(bytearray(key.encode())) for key in patch.packed})
    tensors = {key: b"".join(map(bytes, payload.chunks())) for key, payload in contents.payloads.items()}
    document = json.loads(contents.metadata[DELTA])
    if change is not None:
        before = dict(document)
        parts: dict[str, Any] = {
            "document": document,
            "index": json.loads(zlib.decompress(tensors[INDEX])),
            "tensors": tensors,
        }
        parts["parts"] = parts
        change(parts)
        index = parts["index"] if isinstance(parts["index"], bytes) else json.dumps(parts["index"]).encode()
        if INDEX in tensors:
            tensors[INDEX] = zlib.compress(index)
        if document["index"] == before["index"]:
            document["index"] = len(index)
        if document["sha256"] == before["sha256"]:
            fields = {name: value for name, value in document.items() if name != "sha256"}
            document["sha256"] = hashlib.sha256(index + json.dumps(fields, sort_keys=True).encode()).hexdigest()
    header: dict[str, Any] = {"__metadata__": {DELTA: json.dumps(document)}}
    at = 0
    for key, data in tensors.items():
        header[key] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    return safetensors_file(header, b"".join(tensors.values()))


def read(data: bytes, directory: Path) -> Patch:
    path = directory / "patch.safetensors"
    path.write_bytes(data)
    with open_checkpoint(str(path)) as checkpoint:
        assert is_patch(checkpoint)
        return read_patch(checkpoint)


def test_a_patch_comes_back_with_everything_that_it_says(tmp_path: Path) -> None:
    """Keys in their order, dtypes, shapes, digests, ties, metadata; and safetensors reads the packed bytes."""
    found = read(file_of(PATCH), tmp_path)
    assert found == PATCH
    assert list(found.result.infos) == list(PATCH.result.infos)
    assert list(found.packed) == ["w", "emb", "t"]
    with safe_open(tmp_path / "patch.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted([INDEX, *map(packed_key, found.packed)])
        assert bytes(file.get_tensor(packed_key("w"))) == b"w"


def test_equal_tensors_are_in_the_index_once(tmp_path: Path) -> None:
    """Ten thousand equal tensors take no tensor of the file, and fewer than forty bytes each."""
    many = side("many", **{f"layers.{number}.weight": ("BF16", (8, 1 + number % 7)) for number in range(10_000)})
    data = file_of(Patch(many, many))
    assert len(data) < 400_000
    assert read(data, tmp_path) == Patch(many, many)


def test_a_checkpoint_that_is_not_a_patch_is_refused(tmp_path: Path) -> None:
    """The error says what is missing."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_file({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"1"))
    with open_checkpoint(str(path)) as checkpoint, pytest.raises(FormatError, match="not a patch"):
        read_patch(checkpoint)


def test_a_name_that_is_not_text_is_refused_when_it_is_written() -> None:
    """Half of a surrogate pair cannot be in a safetensors file."""
    odd = side("odd", **{"a\ud800": ("F32", (1,))})
    with pytest.raises(PlanError, match="not Unicode text"):
        patch_contents(Patch(odd, odd), {})


def setting(part: str, *path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    """Return the change that sets one value."""

    def change(parts: dict[str, Any]) -> None:
        table = parts[part]
        for name in path[:-1]:
            table = table[name]
        table[path[-1]] = to

    return change


def without(part: str, name: str) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        del parts[part][name]

    return change


SHA = f"sha256:{'0' * 64}"
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a later version": (setting("document", "version", to=2), "version 2, and only 1 is known"),
    "no version": (without("document", "version"), "version None"),
    "a true version": (setting("document", "version", to=True), "version True"),
    "no base": (without("document", "base"), "no valid 'base'"),
    "another kind of digest": (setting("document", "result", to="xxh3:" + "0" * 32), "no digest of the result"),
    "a digest of other digits": (setting("document", "result", to="sha256:" + "x" * 64), "no digest of the result"),
    "a digest of another base": (setting("document", "base", to=SHA), "another digest of the base than follows"),
    "a digest of another result": (setting("document", "result", to=SHA), "another digest of the result than"),
    "an unknown compression": (setting("document", "compression", to="lzma"), "unknown compression 'lzma'"),
    "a long document": (setting("document", "x", to="x" * 20_000), "characters"),
    "a bomb of an index": (setting("document", "index", to=10**12), "no valid 'index'"),
    "another checksum": (setting("document", "sha256", to="0" * 64), "its checksum differs"),
    "no index": (without("tensors", INDEX), "the patch has no index"),
    "an index that is a list": (setting("index", "base", to=[]), "no valid 'base'"),
    "not JSON": (lambda parts: parts.update(index=b"{"), "not JSON"),
    "a key twice": (setting("index", "base", "keys", 1, to="same"), "no valid 'keys'"),
    "a key that is a number": (setting("index", "base", "keys", 1, to=1), "no valid 'keys'"),
    "a key of the result twice": (setting("index", "result", "keys", 0, to="same"), "no valid 'keys'"),
    "a key beyond the base": (setting("index", "result", "keys", 0, to=5), "no valid 'keys'"),
    "a new key without a dtype": (setting("index", "result", "keys", 1, to="x"), "no dtype and shape of 'x'"),
    "too few dtypes": (setting("index", "base", "looks", to=[0]), "no valid 'looks'"),
    "a dtype beyond the table": (setting("index", "base", "looks", 0, to=99), "no valid 'looks'"),
    "a negative dtype": (setting("index", "base", "looks", 0, to=-1), "no valid 'looks'"),
    "an unknown dtype": (setting("index", "looks", 0, 0, to="F3"), "no valid 'looks'"),
    "a dtype that is a list": (setting("index", "looks", 0, 0, to=[]), "no valid 'looks'"),
    "a size that overflows": (setting("index", "looks", 0, 1, to=[2**62, 2**62]), "no valid 'looks'"),
    "too many dimensions": (setting("index", "looks", 0, 1, to=[1] * 2000), "no valid 'looks'"),
    "shapes of too many sizes": (
        lambda parts: parts["index"].update(
            base={"keys": [str(number) for number in range(4000)], "looks": [0] * 4000, "digests": ""},
            looks=[["F32", [1] * 1024]],
        ),
        "more than 4,000,000 sizes",
    ),
    "not base 64": (setting("index", "base", "digests", to="?"), "no valid 'digests'"),
    "too few digests": (setting("index", "base", "digests", to=""), "no valid 'digests'"),
    "twice in a list": (setting("index", "changed", to=[0, 0, 2]), "says of a tensor twice"),
    "changed and whole": (setting("index", "whole", to=[0, 3]), "says of a tensor twice"),
    "changed without a base": (setting("index", "changed", to=[0, 2, 4]), "says of a tensor twice"),
    "changed to another dtype": (
        lambda parts: parts["index"].update(changed=[0, 2, 3], whole=[]), "does not say how 't' is made",
    ),
    "not changed, and other values": (setting("index", "changed", to=[0]), "does not say how 'emb' is made"),
    "an empty tensor of another shape": (setting("index", "looks", 1, 1, to=[0]), "the digest of another tensor"),
    "a tie of one key": (setting("index", "ties", to=[[4]]), "says of a tensor twice"),
    "a tie of other tensors": (setting("index", "ties", to=[[1, 4]]), "does not say how 'tie' is made"),
    "a key in two ties": (setting("index", "ties", to=[[0, 4], [1, 4]]), "no valid 'ties'"),
    "renamed from another tensor": (setting("index", "renamed", to=[[5, 0]]), "does not say how 'moved' is made"),
    "renamed from nothing": (setting("index", "renamed", to=[[5, 99]]), "no valid 'renamed'"),
    "metadata of numbers": (setting("index", "metadata", to={"a": 1}), "no valid 'metadata'"),
    "a patch of a patch": (setting("index", "metadata", to={DELTA: "{}"}), "would make a patch"),
    "a version below zero": (setting("index", "versions", to={"": -1}), "no valid 'versions'"),
    "no name of the base": (without("index", "base_name"), "no valid 'base_name'"),
    "packed bytes that are missing": (without("tensors", "delta/w"), "no 'delta/w', which its index names"),
    "packed bytes too many": (setting("tensors", "delta/x", to=b"1"), "has 'delta/x', which its index does not name"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_patch_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    """One line says what is wrong, and names the file; checksums that agree do not help."""
    change, reason = BROKEN[name]
    with pytest.raises(FormatError) as caught:
        read(file_of(PATCH, change), tmp_path)
    assert reason in caught.value.reason
    assert caught.value.path == str(tmp_path / "patch.safetensors")
    assert "\n" not in str(caught.value)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    """Each byte of the index that changes is noticed; so is an index that unpacks to more than the document says."""
    good = file_of(PATCH)
    start = good.index(b"x\x9c")
    for at in range(start, start + 200, 9):
        damaged = bytearray(good)
        damaged[at] ^= 4
        with pytest.raises(FormatError):
            read(bytes(damaged), tmp_path)
    with pytest.raises(FormatError, match="bytes that it must have"):
        read(file_of(PATCH, _bomb), tmp_path)


def test_a_forged_index_is_read_or_refused(tmp_path: Path) -> None:
    """An index that is damaged before its checksum is made gives a FormatError of one line, or a patch."""
    rng = random.Random(5)  # noqa: S311 - the sequence must be repeatable
    text = json.dumps(index_of(PATCH)).encode()
    refusals = []
    for _ in range(100):
        damaged = mutate(text, [text], rng)
        try:
            read(file_of(PATCH, setting("parts", "index", to=damaged)), tmp_path)
        except FormatError as error:
            refusals.append(str(error))
    assert 50 < len(refusals) < 100
    assert not any("\n" in refusal for refusal in refusals)


def _bomb(parts: dict[str, Any]) -> None:
    parts["document"].update(index=100, sha256="0" * 64)
    parts["index"] = b" " * 5_000_000 + b"{}"
