"""Open files that each hold a part of one model, and join the pieces of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, Record, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import same_bytes
from ckptkit.core.files.places import parent_of
from ckptkit.core.files.pool import FilePool
from ckptkit.core.text import plural, printable, quoted, shell_word
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats import codes
from ckptkit.formats.detect import read_torch
from ckptkit.formats.layout import Block, BlockTensor
from ckptkit.formats.torch.checkpoint import LARGEST_PICKLE, TorchFile, build_checkpoint
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = [
    "JoinedTensor",
    "Part",
    "check_same_keys",
    "checksum_of",
    "copy_of_equals",
    "join_blocks",
    "joined_checkpoint",
    "open_part",
]


@dataclass(frozen=True, slots=True)
class Part:
    """One file of several: its name, its parsed pickle, and the Checkpoint of the tensors in the file."""

    name: str
    file: TorchFile
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """A tensor that is made of pieces in several files, and a function that opens its bytes."""

    info: TensorInfo
    open: Callable[[], Payload]


def open_part(pool: FilePool, name: str, selection: Selection = WEIGHTS) -> Part:
    """Return the part in the file ``name`` of the pool. Raises ``FormatError`` if torch did not save the file."""
    file = pool.get(name)
    try:
        saved = read_torch(file, largest=LARGEST_PICKLE)
        return Part(name, saved, build_checkpoint(saved, path=file.path, selection=selection))
    except CkptkitError as error:
        error.path = error.path or file.path
        raise


def check_same_keys(parts: Sequence[Part]) -> None:
    """Raise ``FormatError`` unless all parts have the same keys, with the same dtypes. The error names a key."""
    first = parts[0]
    for part in parts[1:]:
        absent = next((key for key in first.checkpoint if key not in part.checkpoint), None)
        extra = next((key for key in part.checkpoint if key not in first.checkpoint), None)
        if absent is not None and not first.checkpoint.keys() & part.checkpoint.keys():
            raise FormatError(
                f"{first.name} and {part.name} have no key in common, so each holds a part of the layers",
                hint=f"join them: ckpt merge {shell_word(first.checkpoint.path)} {shell_word(part.checkpoint.path)} "
                "--on-unexpected add -o OUT",
            )
        if absent is not None or extra is not None:
            key, holder, other = (absent, first, part) if absent is not None else (extra, part, first)
            raise FormatError(
                f"{quoted(str(key))} is in {holder.name}, but not in {other.name}: parts of different saves?",
                hint="copy the whole directory again, or give the path of one file",
            )
        for key, info in first.checkpoint.items():
            if (found := part.checkpoint[key]).dtype != info.dtype:
                raise FormatError(
                    f"{quoted(key)} is {info.dtype} in {first.name}, but {found.dtype} in {part.name}",
                    hint="the directory holds files of two saves",
                )


def join_blocks(info: TensorInfo, blocks: Iterable[Block]) -> JoinedTensor:
    """Return a tensor that is made of these blocks, which the caller has checked; empty blocks are left out."""
    filled = tuple(block for block in blocks if 0 not in block.box.sizes)
    if len(filled) == 1:
        return JoinedTensor(info, filled[0].open)
    tensor = BlockTensor(info.shape, DTYPES[info.dtype].bits // 8, filled)
    return JoinedTensor(info, lambda: tensor)


@dataclass(frozen=True, slots=True)
class _EqualCopies:
    """The bytes of a tensor that several files hold. Reading compares the copies."""

    key: str
    directory: str
    names: tuple[str, ...]
    copies: tuple[Payload, ...]

    @property
    def nbytes(self) -> int:
        return self.copies[0].nbytes

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        """Yield the bytes. Raises ``FormatError`` if two copies differ."""
        for name, copy in zip(self.names[1:], self.copies[1:], strict=True):
            if not same_bytes(self.copies[0], copy):
                raise _different_copies_error(self.key, self.names[0], name, self.directory)
        yield from self.copies[0].chunks()


def _different_copies_error(key: str, first: str, second: str, directory: str) -> FormatError:
    return FormatError(
        f"{quoted(key)} must be equal in all parts, but {first} and {second} hold different values",
        hint="the directory holds files of two saves",
        path=directory,
    )


def copy_of_equals(key: str, parts: Sequence[Part]) -> JoinedTensor:
    """Return a tensor that must be equal in all parts.

    Raises ``FormatError`` if shapes or checksums differ. Reading the tensor compares the bytes.
    """
    first = parts[0]
    directory = parent_of(first.checkpoint.path)
    info = first.checkpoint[key]
    crc = checksum_of(first, key)
    for part in parts[1:]:
        found = part.checkpoint[key]
        if found.shape != info.shape:
            raise FormatError(f"{quoted(key)} is {info} in {first.name}, but {found} in {part.name}")
        other = checksum_of(part, key)
        if crc is not None and other is not None and crc != other:
            raise _different_copies_error(key, first.name, part.name, directory)
    names = tuple(part.name for part in parts)

    def open_copies() -> Payload:
        return _EqualCopies(key, directory, names, tuple(part.checkpoint.payload(key) for part in parts))

    return JoinedTensor(replace(info, view=None), open_copies)


def checksum_of(part: Part, key: str) -> int | None:
    """Return the CRC-32 that the file stores for the bytes of a tensor, or None if there is none."""
    return getattr(part.checkpoint.payload(key), "crc", None)


def joined_checkpoint(
    pool: FilePool, parts: Sequence[Part], tensors: Mapping[str, JoinedTensor], form: str, *warnings: str
) -> Checkpoint:
    """Return the Checkpoint of the joined tensors, which closes the pool; ``form`` names what the parts are."""
    first = parts[0].checkpoint
    held = [part.checkpoint for part in parts]

    def records() -> Iterable[Record]:
        return chain.from_iterable(checkpoint.records() for checkpoint in held)

    def payload(info: TensorInfo) -> Payload:
        return tensors[info.key].open()

    inherited = dict.fromkeys(
        text
        for checkpoint in held
        for text in checkpoint.warnings
        if getattr(text, "code", None) is not codes.PART_OF_SEVERAL
    )
    return Checkpoint(
        {key: tensor.info for key, tensor in tensors.items()},
        Access(payload, payload, records, check=pool.check_unchanged, close=pool.close),
        Description(
            pool.folder.path,
            f"{printable(form)} ({plural(len(parts), 'file')})",
            files=[file.path for file in pool.files.values()],
            envelope=first.envelope,
            entries=first.entries,
            versions=first.versions,
            ambiguous={key: dotted for key, dotted in first.ambiguous.items() if key in tensors},
            warnings=[*warnings, *inherited],
            references=list(dict.fromkeys(name for checkpoint in held for name in checkpoint.references)),
            suspicious=any(checkpoint.suspicious for checkpoint in held),
        ),
    )
