"""A small patch for the fuzzing tests to damage, the checkpoint that it makes, and its reading by ckptkit."""

from __future__ import annotations

import hashlib

import numpy as np

from ckptkit import TensorInfo
from ckptkit.core.checkpoint.payload import HeldBytes
from ckptkit.deltas.patch import Patch, Side, contents_of, packed_key
from ckptkit.deltas.patch_file import patch_contents, read_patch
from ckptkit.digests.hashing import header_of
from ckptkit.errors import CkptkitError
from ckptkit.formats import open_checkpoint
from ckptkit.values.delta import Change, PatchedPayload, Spool, pack_changes
from ckptkit.values.workers import Workers
from tests.formats.oracles import Seen
from tests.helpers_formats import safetensors_file

_RNG = np.random.default_rng(1)
_WEIGHTS = _RNG.standard_normal(200).astype(np.float32)
BASE: dict[str, tuple[str, tuple[int, ...], bytes]] = {
    "same": ("F32", (2,), bytes(range(8))),
    "w": ("F32", (10, 20), _WEIGHTS.tobytes()),
    "n": ("I64", (), (7).to_bytes(8, "little")),
    "few": ("U8", (100,), bytes(range(100))),
}
_NEW = BASE | {
    "w": ("F32", (10, 20), (_WEIGHTS + np.float32(1e-4)).tobytes()),
    "n": ("I64", (), (9).to_bytes(8, "little")),
    "few": ("U8", (100,), bytes(50) + bytes(range(50, 100))),
    "new": ("F16", (3, 30), bytes(180)),
}


def patched() -> Seen:
    """Return the keys, dtypes, shapes and bytes that the patch gives."""
    return dict(_NEW)


def small_patch() -> bytes:
    """Return the file of a patch from ``BASE``."""
    infos = {key: TensorInfo(key, code, shape) for key, (code, shape, _) in _NEW.items()}
    with Workers(1) as workers, Spool() as spool:
        changes = [Change(infos[key], _held(key, BASE), HeldBytes(bytearray(_NEW[key][2]))) for key in _NEW]
        packed = {
            change.info.key: HeldBytes(bytearray(b"".join(one.chunks())))
            for change, one in pack_changes(changes, spool, workers)
            if one is not None
        }
    patch = Patch(_side(BASE), _side(_NEW), frozenset(packed) - {"new"}, frozenset(("new",)), metadata={"format": "pt"})
    contents = patch_contents(patch, packed)
    data = b"".join(bytes(chunk) for payload in contents.payloads.values() for chunk in payload.chunks())
    header: dict[str, object] = {"__metadata__": dict(contents.metadata)}
    at = 0
    for info in contents.infos:
        header[info.key] = {"dtype": "U8", "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    return safetensors_file(header, data)


def by_patch(path: str) -> Seen | None:
    """Return what ckptkit makes of ``BASE`` and of a patch, or None where it refuses the patch.

    Other errors are raised.
    """
    try:
        with open_checkpoint(path) as checkpoint, Workers(1) as workers:
            patch = read_patch(checkpoint)
            seen: Seen = {}
            for key, info in patch.result.infos.items():
                if key in patch.changed or key in patch.whole:
                    base = _held(key, BASE) if key in patch.changed else None
                    payload = PatchedPayload(base, checkpoint.payload(packed_key(key)), info, workers)
                    data = b"".join(bytes(chunk) for chunk in payload.chunks())
                else:
                    data = BASE[key][2]
                assert patch.result.digests[key] == _digest(info, data)
                seen[key] = info.dtype, info.shape, data
            return seen
    except CkptkitError as error:
        if not error.path or "\n" in f"{error.reason} {error.hint}":
            raise AssertionError(f"an error without a path, or of several lines: {error}") from error
        return None


def _held(key: str, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> HeldBytes | None:
    return HeldBytes(bytearray(tensors[key][2])) if key in tensors else None


def _digest(info: TensorInfo, data: bytes) -> str:
    return hashlib.sha256(header_of(info.dtype, info.shape) + data).hexdigest()


def _side(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Side:
    infos = {key: TensorInfo(key, code, shape) for key, (code, shape, _) in tensors.items()}
    digests = {key: _digest(info, tensors[key][2]) for key, info in infos.items()}
    return Side(infos, digests, contents_of(digests))
