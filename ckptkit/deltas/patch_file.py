"""The file of a patch: safetensors with the packed bytes of each tensor, and an index of what they are."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.checkpoint.payload import HeldBytes
from ckptkit.core.checkpoint.provenance import DELTA
from ckptkit.core.config_files import parse_json
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.text import quoted
from ckptkit.deltas.patch import Patch, packed_key
from ckptkit.deltas.patch_index import Facts, index_of, patch_of
from ckptkit.deltas.patch_table import Table
from ckptkit.errors import FormatError, PlanError
from ckptkit.values.delta import COMPRESSIONS

__all__ = ["INDEX", "PatchContents", "is_patch", "patch_contents", "read_patch"]

INDEX: Final = "index"  # the key of the tensor that has the index, compressed JSON
VERSION: Final = 1
_BYTES: Final = "U8"
_LARGEST_INDEX: Final = 300_000_000  # bytes
_LARGEST_STORED_INDEX: Final = 100_000_000
_LARGEST_DOCUMENT: Final = 10_000  # characters
_LONGEST_NAME: Final = 1000
_SHA256: Final = "sha256:"
_HEX: Final = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class PatchContents:
    """What a safetensors file of a patch has: the tensors in their order, their bytes by key, and its metadata."""

    infos: Sequence[TensorInfo]
    payloads: Mapping[str, Payload]
    metadata: Mapping[str, str]


def is_patch(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is the file of a patch, also of one that is damaged."""
    return DELTA in checkpoint.metadata


def patch_contents(patch: Patch, packed: Mapping[str, Payload]) -> PatchContents:
    """Return what the file of a patch has; ``packed`` has the packed bytes of each key of ``patch.packed``.

    Raises ``PlanError`` for a key that is not Unicode text, and for more tensors than a patch can describe.
    """
    for key in (*patch.base.infos, *patch.result.infos):
        if not key.isascii() and key != key.encode("utf-8", "replace").decode():
            raise PlanError(f"a name is not Unicode text: {quoted(key)}", hint="rename it in both: ckpt remap")
    index = json.dumps(index_of(patch), separators=(",", ":"), ensure_ascii=False).encode()
    stored = zlib.compress(index, 6)
    if len(index) > _LARGEST_INDEX or len(stored) > _LARGEST_STORED_INDEX:
        raise PlanError(f"the index of the patch would have {len(index):,} bytes, more than {_LARGEST_INDEX:,}")
    document = {
        "version": VERSION,
        "library": patch.library[:_LONGEST_NAME],
        "compression": patch.compression,
        "base": patch.base.contents,
        "result": patch.result.contents,
        "index": len(index),
    }
    document["sha256"] = _checksum(document, index)
    payloads: dict[str, Payload] = {INDEX: HeldBytes(stored)}
    payloads |= {packed_key(key): packed[key] for key in patch.packed}
    infos = [TensorInfo(key, _BYTES, (payload.nbytes,)) for key, payload in payloads.items()]
    return PatchContents(infos, payloads, {DELTA: json.dumps(document)})


def read_patch(checkpoint: Checkpoint) -> Patch:
    """Return what the file of a patch says; only its index is read.

    Raises ``FormatError`` for a checkpoint that is not a patch, and for an unknown version. Also raises it for a file
    that is damaged or contradicts itself.
    """
    try:
        with pause_gc():
            return _read_patch(checkpoint)
    except FormatError as error:
        if error.path is None:
            error.path = checkpoint.path
        raise


def _read_patch(checkpoint: Checkpoint) -> Patch:
    text = checkpoint.metadata.get(DELTA)
    if text is None:
        raise FormatError(f"not a patch: its metadata has no {quoted(DELTA)}", hint="ckpt delta writes patches")
    if len(text) > _LARGEST_DOCUMENT:
        raise FormatError(f"the document of the patch has {len(text):,} characters")
    document = parse_json(text.encode("utf-8", "surrogatepass"), "the document of the patch")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise FormatError(f"a patch of version {str(version)[:20]}, and only {VERSION} is known", hint="update ckptkit")
    table = Table(document, "the document of the patch")
    index = _read_index(checkpoint, document, table.number("index", _LARGEST_INDEX + 1))
    compression = table.text("compression")
    if compression not in COMPRESSIONS:
        raise FormatError(f"the unknown compression {quoted(compression[:20])}", hint="update ckptkit")
    facts = Facts(_contents(table, "base"), _contents(table, "result"), compression, table.text("library"))
    patch = patch_of(Table(index, "the index of the patch"), facts)
    _refuse_other_tensors(checkpoint, patch)
    return patch


def _read_index(checkpoint: Checkpoint, document: Mapping[str, object], nbytes: int) -> dict[str, object]:
    """Return the index, once its checksum has shown that it and the document are whole."""
    info = checkpoint.get(INDEX)
    if info is None or info.dtype != _BYTES or info.nbytes > _LARGEST_STORED_INDEX:
        raise FormatError("the patch has no index")
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(checkpoint.read_bytes(INDEX), nbytes + 1)
    except zlib.error as error:
        raise FormatError(f"the index of the patch is damaged: {error}") from None
    if len(data) != nbytes or not unpacker.eof or unpacker.unused_data:
        raise FormatError(f"the index of the patch has not the {nbytes:,} bytes that it must have")
    if _checksum(document, data) != document.get("sha256"):
        raise FormatError("the index of the patch is damaged: its checksum differs")
    return parse_json(data, "the index of the patch")


def _checksum(document: Mapping[str, object], index: bytes) -> str:
    """Return the SHA-256 of the index and of all other fields of the document."""
    fields = json.dumps({name: value for name, value in document.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(index + fields.encode()).hexdigest()


def _contents(table: Table, name: str) -> str:
    digest = table.text(name)
    if not digest.startswith(_SHA256) or len(digest) != len(_SHA256) + 64 or not _HEX.issuperset(digest[-64:]):
        raise FormatError(f"the document of the patch has no digest of the {name}")
    return digest


def _refuse_other_tensors(checkpoint: Checkpoint, patch: Patch) -> None:
    """Raise ``FormatError`` where the file has other tensors than its index says."""
    expected = {packed_key(key) for key in patch.packed} | {INDEX}
    missing = next((key for key in expected if key not in checkpoint), None)
    if missing is not None:
        raise FormatError(f"the patch has no {quoted(missing)}, which its index names")
    for key, info in checkpoint.items():
        if key not in expected:
            raise FormatError(f"the patch has {quoted(key)}, which its index does not name")
        if info.dtype != _BYTES or len(info.shape) != 1:
            raise FormatError(f"{quoted(key)} is {info} in the patch, and not packed bytes")
