"""The digests of a checkpoint: one of each tensor, one of all contents, and one of names and shapes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import ClassVar, Final

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.result import Result
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.text import plural
from ckptkit.digests.hashing import hash_function, shape_text

__all__ = ["CONTENTS", "NAMES_AND_SHAPES", "Digests", "TensorDigest", "contents_digest", "digest_line", "key_text"]

CONTENTS: Final = "contents"  # what the last two lines have in place of a key, which is always in quotes
NAMES_AND_SHAPES: Final = "names and shapes"
_LINES_AT_ONCE: Final = 1000
_ENCODE: Final = json.JSONEncoder().encode  # json.dumps takes twice the time for a short text


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """The digest of one tensor.

    Attributes:
        info: The key, dtype and shape of the tensor.
        digest: The algorithm and the hash in hexadecimal, such as ``"sha256:9f86..."``. The key is not a part of it.
    """

    info: TensorInfo
    digest: str


@dataclass(frozen=True, repr=False)
class Digests(Result):
    """The digest of each tensor by key, in the order of the keys, and two fingerprints of the whole.

    Attributes:
        tensors: The digest of each tensor; tied tensors have equal digests.
        contents: The digest of all keys and digests. It is equal if and only if ``tensors`` is.
        names_and_shapes: The digest of all keys and shapes, which no dtype and no value changes.
        algorithm: ``"sha256"`` or ``"xxh3"``.
        skipped: Why a tensor was left out, by key; empty unless ``skip_unread`` was given.
        checkpoint: Path, format and size of the tensors that are listed.

    Example:
        >>> first = ckptkit.digest("fixtures/lenet_10class.pth")
        >>> first.contents == ckptkit.digest("fixtures/lenet_10class.safetensors").contents
        True
        >>> first.tensors["fc3.bias"].digest[:14]
        'sha256:877f59e'
    """

    _truth: ClassVar[str] = "compare .contents with that of another"

    tensors: Mapping[str, TensorDigest]
    contents: str
    names_and_shapes: str
    algorithm: str
    skipped: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    checkpoint: CheckpointSummary = NO_CHECKPOINT

    @classmethod
    def of(
        cls,
        tensors: Iterable[TensorDigest],
        algorithm: str,
        skipped: Mapping[str, str],
        checkpoint: CheckpointSummary = NO_CHECKPOINT,
    ) -> Digests:
        """Return the digests of tensors, with their fingerprints."""
        by_key = {tensor.info.key: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.info.key)}
        texts = [key_text(key) for key in by_key]
        lines = (f"{one.digest}  {text}\n" for text, one in zip(texts, by_key.values(), strict=True))
        shapes = (f"[{text},{shape_text(one.info.shape)}]\n" for text, one in zip(texts, by_key.values(), strict=True))
        return cls(by_key, _digest(lines, algorithm), _digest(shapes, algorithm), algorithm, skipped, checkpoint)

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        return f"{plural(len(self.tensors), 'tensor')}, contents {self.contents}"

    @property
    def lines(self) -> Iterator[str]:
        """The lines of a digest file: one for each key, then one for contents, and one for names and shapes."""
        for key, tensor in self.tensors.items():
            yield digest_line(tensor.digest, key)
        yield f"{self.contents}  {CONTENTS}"
        yield f"{self.names_and_shapes}  {NAMES_AND_SHAPES}"


def digest_line(digest: str, key: str) -> str:
    """Return the line of a tensor in a digest file; it is ASCII, whatever the key is."""
    return f"{digest}  {key_text(key)}"


def key_text(key: str) -> str:
    """Return a key as a JSON string that a terminal does not obey: ASCII, without control characters."""
    return _ENCODE(key).replace("\x7f", "\\u007f")


def contents_digest(digests: Mapping[str, str], algorithm: str) -> str:
    """Return the digest of the lines of all tensors, sorted by key."""
    return _digest((f"{digest_line(digests[key], key)}\n" for key in sorted(digests)), algorithm)


def _digest(lines: Iterator[str], algorithm: str) -> str:
    found = hash_function(algorithm)(b"")
    while some := "".join(islice(lines, _LINES_AT_ONCE)):
        found.update(some.encode())
    return f"{algorithm}:{found.hexdigest()}"
