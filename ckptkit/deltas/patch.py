"""What a patch file says: the tensors of its base and of its result, and which of them it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.digests.model import contents_digest

__all__ = ["PREFIX", "Patch", "Side", "contents_of", "packed_key"]

PREFIX: Final = "delta/"  # of the key of a packed tensor in the patch file
_ALGORITHM: Final = "sha256"


@dataclass(frozen=True, slots=True)
class Side:
    """The tensors of the base or of the result, in the order of the checkpoint.

    Attributes:
        infos: The dtype and the shape of each tensor by its key.
        digests: The SHA-256 of each tensor in hexadecimal by its key, as ``ckpt digest`` prints it.
        contents: The digest of all contents, as ``ckpt digest`` prints it: ``"sha256:"`` and 64 digits.
    """

    infos: Mapping[str, TensorInfo]
    digests: Mapping[str, str]
    contents: str


@dataclass(frozen=True, slots=True)
class Patch:
    """Which tensors a patch holds, and how the result is made of the base.

    A tensor of the result that is neither in ``changed``, ``whole`` or ``renamed`` nor a later key of ``ties`` is that
    of the base under the same key.

    Attributes:
        base: The tensors of the base.
        result: The tensors of the result.
        changed: Keys of packed bytes that were made with the tensor of the base under the same key.
        whole: Keys of packed bytes that need no base: the tensor is new, or has another dtype or shape.
        ties: Groups of keys of the result that are one tensor, which is that of the first key of the group.
        metadata: The metadata of the result.
        renamed: Keys of the result whose tensor is that of the base under another key, which is the value.
        versions: The version of each module of the result by its prefix, as in the ``_metadata`` of a state_dict.
        base_name: What messages call the base: the last part of its path, or empty.
        result_format: The format of the checkpoint that became the result.
        compression: ``"zlib"`` or ``"zstd"``.
        library: What wrote the patch, such as ``"ckptkit 0.2.0"``.
    """

    base: Side
    result: Side
    changed: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    ties: Sequence[Sequence[str]] = ()
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    compression: str = "zlib"
    library: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    base_name: str = ""
    result_format: str = ""

    @property
    def packed(self) -> Iterator[str]:
        """The keys of the packed bytes that the patch holds, in the order of the result."""
        return (key for key in self.result.infos if key in self.changed or key in self.whole)


def packed_key(key: str) -> str:
    """Return the key of the packed bytes of a tensor in the patch file."""
    return f"{PREFIX}{key}"


def contents_of(digests: Mapping[str, str]) -> str:
    """Return the digest of all contents for the SHA-256 of each tensor in hexadecimal."""
    return contents_digest({key: f"{_ALGORITHM}:{digits}" for key, digits in digests.items()}, _ALGORITHM)
