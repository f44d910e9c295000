"""The file of a patch: safetensors with the packed bytes of each tensor, and an index of what they are."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ckptkit.core.checkpoint import MOST_TENSORS, Checkpoint, Payload, TensorInfo
from ckptkit.core.checkpoint.provenance import DELTA
from ckptkit.core.config_files import parse_json
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.text import quoted
from ckptkit.deltas.patch import DIGEST_DIGITS, Patch, Side, packed_key
from ckptkit.errors import FormatError

__all__ = ["INDEX", "PatchContents", "is_patch", "patch_contents", "read_patch"]

INDEX: Final = "index"  # the key of the tensor that has the index, compressed JSON
VERSION: Final = 1
_BYTES: Final = "U8"
_LARGEST_INDEX: Final = 300_000_000  # bytes
_DIGEST_BYTES: Final = DIGEST_DIGITS // 2
_SHA256: Final = "sha256:"
_LONGEST_NAME: Final = 1000  # characters


@dataclass(frozen=True, slots=True)
class PatchContents:
    """What a safetensors file of a patch has: the tensors in their order, their bytes by key, and its metadata."""

    infos: Sequence[TensorInfo]
    payloads: Mapping[str, Payload]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Held:
    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterable[bytes]:
        yield self.data


def is_patch(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is the file of a patch, also of one that is damaged."""
    return DELTA in checkpoint.metadata


def patch_contents(patch: Patch, packed: Mapping[str, Payload]) -> PatchContents:
    """Return what the file of a patch has; ``packed`` has the packed bytes of each key of ``patch.packed``."""
    index = json.dumps(_index(patch), separators=(",", ":")).encode()
    stored = zlib.compress(index, 6)
    document = {
        "version": VERSION,
        "library": patch.library,
        "compression": patch.compression,
        "base": patch.base.contents,
        "result": patch.result.contents,
        "index": {"nbytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
    }
    payloads: dict[str, Payload] = {INDEX: _Held(stored)}  # type: ignore[dict-item]
    payloads |= {packed_key(key): packed[key] for key in patch.packed}
    infos = [TensorInfo(key, _BYTES, (payload.nbytes,)) for key, payload in payloads.items()]
    return PatchContents(infos, payloads, {DELTA: json.dumps(document)})


def read_patch(checkpoint: Checkpoint) -> Patch:
    """Return what the file of a patch says; only its index is read.

    Raises ``FormatError`` for a checkpoint that is not a patch, for a version that is not known, and for a file that
    is damaged or contradicts itself.
    """
    try:
        return _read_patch(checkpoint)
    except FormatError as error:
        if error.path is None:
            error.path = checkpoint.path
        raise


def _index(patch: Patch) -> dict[str, object]:
    looks: dict[tuple[str, tuple[int, ...]], int] = {}

    def look(info: TensorInfo) -> int:
        return looks.setdefault((info.dtype, info.shape), len(looks))

    base, result = patch.base, patch.result
    place_in_base = {key: number for number, key in enumerate(base.infos)}
    place = {key: number for number, key in enumerate(result.infos)}
    is_same_order = list(base.infos) == list(result.infos)
    new = [
        key
        for key, info in result.infos.items()
        if key not in base.infos or (base.digests[key], look(base.infos[key])) != (result.digests[key], look(info))
    ]
    base_looks = [look(info) for info in base.infos.values()]
    new_looks = [look(result.infos[key]) for key in new]
    return {
        "base": {"keys": list(base.infos), "looks": base_looks, "digests": _joined(base.digests, base.infos)},
        "result": {
            "keys": None if is_same_order else [place_in_base.get(key, key) for key in result.infos],
            "new": [place[key] for key in new],
            "looks": new_looks,
            "digests": _joined(result.digests, new),
        },
        "changed": sorted(place[key] for key in patch.changed),
        "whole": sorted(place[key] for key in patch.whole),
        "ties": [[place[key] for key in group] for group in patch.ties],
        "renamed": [[place[key], place_in_base[old]] for key, old in patch.renamed.items()],
        "metadata": dict(patch.metadata),
        "versions": dict(patch.versions),
        "base_name": patch.base_name[:_LONGEST_NAME],
        "result_format": patch.result_format[:_LONGEST_NAME],
        "looks": [[dtype, list(shape)] for dtype, shape in looks],
    }


def _joined(digests: Mapping[str, str], keys: Iterable[str]) -> str:
    return base64.b64encode(bytes.fromhex("".join(digests[key] for key in keys))).decode()


def _read_patch(checkpoint: Checkpoint) -> Patch:
    text = checkpoint.metadata.get(DELTA)
    if text is None:
        raise FormatError("not a patch: its metadata has no 'ckptkit.delta'", hint="ckpt delta writes patches")
    document = parse_json(text.encode("utf-8", "surrogatepass"), "the document of the patch")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise FormatError(f"a patch of version {str(version)[:20]}, and only {VERSION} is known", hint="update ckptkit")
    index = _Reader(_read_index(checkpoint, document), "the index of the patch")
    looks = index.looks()
    base_part, result_part = index.part("base"), index.part("result")
    base_keys = base_part.texts("keys")
    base = _side(base_keys, base_part.numbers("looks", len(looks)), looks, base_part.digests("digests", len(base_keys)))
    return _patch(document, index, result_part, Side(*base, _contents(document, "base")), looks)


def _patch(
    document: Mapping[str, object],
    index: _Reader,
    part: _Reader,
    base: Side,
    looks: Sequence[tuple[str, tuple[int, ...]]],
) -> Patch:
    keys = part.keys("keys", list(base.infos))
    new = part.numbers("new", len(keys))
    names = [keys[number] for number in new]
    infos, digests = _side(names, part.numbers("looks", len(looks)), looks, part.digests("digests", len(new)))
    missing = next((key for key in keys if key not in infos and key not in base.infos), None)
    if missing is not None:
        raise FormatError(f"the index of the patch has no dtype and shape of {quoted(missing)}")
    result = Side(
        {key: infos.get(key) or base.infos[key] for key in keys},
        {key: digests.get(key) or base.digests[key] for key in keys},
        _contents(document, "result"),
    )
    changed, whole = (
        frozenset(keys[number] for number in index.numbers(name, len(keys))) for name in ("changed", "whole")
    )
    ties = tuple(tuple(keys[number] for number in group) for group in index.groups("ties", len(keys)))
    base_keys = list(base.infos)
    renamed = {keys[new]: base_keys[old] for new, old in index.moves("renamed", len(keys), len(base_keys))}
    reader = _Reader(document, "the document of the patch")
    return Patch(
        base,
        result,
        changed,
        whole,
        ties,
        index.texts_by_name("metadata"),
        reader.text("compression"),
        reader.text("library"),
        renamed,
        index.numbers_by_name("versions"),
        index.text("base_name")[:_LONGEST_NAME],
        index.text("result_format")[:_LONGEST_NAME],
    )


def _read_index(checkpoint: Checkpoint, document: Mapping[str, object]) -> dict[str, object]:
    facts = document.get("index")
    nbytes = facts.get("nbytes") if isinstance(facts, dict) else None
    if type(nbytes) is not int or not 0 < nbytes <= _LARGEST_INDEX:
        raise FormatError("the document of the patch does not say how large its index is")
    if INDEX not in checkpoint:
        raise FormatError("the patch has no index")
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(checkpoint.read_bytes(INDEX), nbytes + 1)
    except zlib.error as error:
        raise FormatError(f"the index of the patch is damaged: {error}") from None
    assert isinstance(facts, dict)  # noqa: S101 - nbytes is from it
    if len(data) != nbytes or not unpacker.eof or hashlib.sha256(data).hexdigest() != facts.get("sha256"):
        raise FormatError("the index of the patch is damaged")
    return parse_json(data, "the index of the patch")


def _contents(document: Mapping[str, object], name: str) -> str:
    digest = document.get(name)
    if not isinstance(digest, str) or not digest.startswith(_SHA256) or len(digest) != len(_SHA256) + 64:
        raise FormatError(f"the document of the patch has no digest of the {name}")
    return digest


def _side(
    keys: Sequence[str],
    places: Sequence[int],
    looks: Sequence[tuple[str, tuple[int, ...]]],
    digests: Sequence[str],
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if len(places) != len(keys):
        raise FormatError(f"the index of the patch has {len(places):,} dtypes for {len(keys):,} keys")
    infos = {key: TensorInfo(key, *looks[place]) for key, place in zip(keys, places, strict=True)}
    return infos, dict(zip(keys, digests, strict=True))


@dataclass(frozen=True, slots=True)
class _Reader:
    """A table of JSON, each value of which is checked before it is used."""

    table: Mapping[str, Any]
    where: str

    def part(self, name: str) -> _Reader:
        value = self.table.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name)
        return _Reader(value, self.where)

    def text(self, name: str) -> str:
        value = self.table.get(name)
        if not isinstance(value, str):
            raise self._wrong(name)
        return value

    def list_of(self, name: str) -> list[Any]:
        value = self.table.get(name)
        if not isinstance(value, list) or len(value) > MOST_TENSORS:
            raise self._wrong(name)
        return value

    def texts(self, name: str) -> list[str]:
        values = self.list_of(name)
        if not all(isinstance(value, str) for value in values) or len(set(values)) != len(values):
            raise self._wrong(name)
        return values

    def numbers(self, name: str, end: int) -> list[int]:
        """Return the integers from 0 to ``end``, exclusive, of a list."""
        return self._numbers(name, self.list_of(name), end)

    def _numbers(self, name: str, values: object, end: int) -> list[int]:
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < end for value in values):
            raise self._wrong(name)
        return values

    def groups(self, name: str, end: int) -> list[list[int]]:
        return [self._numbers(name, group, end) for group in self.list_of(name)]

    def keys(self, name: str, base: Sequence[str]) -> list[str]:
        """Return the keys of the result: texts, or numbers of keys of the base; null means all of these."""
        if self.table.get(name, "") is None:
            return list(base)
        keys = []
        for value in self.list_of(name):
            if type(value) is int and 0 <= value < len(base):
                keys.append(base[value])
            elif isinstance(value, str):
                keys.append(value)
            else:
                raise self._wrong(name)
        if len(set(keys)) != len(keys):
            raise self._wrong(name)
        return keys

    def digests(self, name: str, count: int) -> list[str]:
        try:
            data = base64.b64decode(self.text(name), validate=True)
        except (binascii.Error, ValueError):
            raise self._wrong(name) from None
        if len(data) != count * _DIGEST_BYTES:
            raise self._wrong(name)
        digits = data.hex()
        return [digits[at : at + DIGEST_DIGITS] for at in range(0, len(digits), DIGEST_DIGITS)]

    def looks(self) -> list[tuple[str, tuple[int, ...]]]:
        looks = []
        for value in self.list_of("looks"):
            if not isinstance(value, list) or len(value) != 2 or value[0] not in DTYPES:
                raise self._wrong("looks")
            looks.append((value[0], tuple(self._numbers("looks", value[1], 1 << 63))))
        return looks

    def moves(self, name: str, end: int, base_end: int) -> list[tuple[int, int]]:
        """Return pairs of a number below ``end`` and one below ``base_end``."""
        pairs = []
        for pair in self.list_of(name):
            if not isinstance(pair, list) or len(pair) != 2:
                raise self._wrong(name)
            pairs.append((self._numbers(name, pair[:1], end)[0], self._numbers(name, pair[1:], base_end)[0]))
        return pairs

    def texts_by_name(self, name: str) -> dict[str, str]:
        value = self.table.get(name)
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise self._wrong(name)
        return value

    def numbers_by_name(self, name: str) -> dict[str, int]:
        value = self.table.get(name)
        if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
            raise self._wrong(name)
        return value

    def _wrong(self, name: str) -> FormatError:
        return FormatError(f"{self.where} has no valid {quoted(name)}")
