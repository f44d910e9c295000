"""Read torch's zip format (torch 1.6 and later): ``ROOT/data.pkl``, and one uncompressed record for each storage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckptkit.core.checkpoint import Checkpoint, Payload, Record
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import ByteSwapped, Region
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.pickle.machine import parse_pickle
from ckptkit.formats.torch.checkpoint import LARGEST_PICKLE, TorchFile, build_file_checkpoint, refuse_many_tensors
from ckptkit.formats.torch.objects import StorageRef, TensorRef, TorchObjects
from ckptkit.formats.zip_archive import ZipDirectory
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["archive_root", "open_torch_zip", "read_pickles", "read_torch_zip"]

_NEWEST_VERSION = 10
_MOST_COMPRESSION = 20  # pickles of weights shrink four- to sixfold, and a byte can take a hundred in memory
# Every writer makes these records itself; the serialization id belongs to the contents of one file.
_REWRITTEN = re.compile(
    r"data\.pkl|byteorder|data/.*|\.format_version|\.storage_alignment|\.data/serialization_id", re.DOTALL
)
_UNTYPED = "it was written on a big-endian machine, and does not say how wide all its numbers are"


def open_torch_zip(archive: ZipDirectory, selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint in a torch zip archive; the Checkpoint closes the file.

    Raises ``FormatError`` for an archive that is not a torch checkpoint, contradicts itself, or lacks a record that
    its pickle names.
    """
    file = archive.file
    return build_file_checkpoint(read_torch_zip(archive), file, "torch-zip", selection)


def read_torch_zip(archive: ZipDirectory, *, largest: int = LARGEST_PICKLE) -> TorchFile:
    """Return the parsed pickle of a torch zip archive.

    Raises ``FormatError`` as ``open_torch_zip`` does, and for a pickle of more than ``largest`` bytes.
    """
    root = archive_root(archive)
    if f"{root}constants.pkl" in archive.entries:
        raise FormatError(
            "a TorchScript archive", hint="save the state_dict() of the module that torch.jit.load returns"
        )
    return read_pickles(archive, root, largest=largest)[1]


def read_pickles(
    archive: ZipDirectory, root: str, others: Sequence[str] = (), *, largest: int = LARGEST_PICKLE
) -> tuple[list[object], TorchFile]:
    """Return the trees of ``data.pkl`` and of ``NAME.pkl`` for each of ``others``, and the file with the first tree.

    The storages of ``NAME.pkl`` are the records below ``NAME/``, and their keys begin with ``NAME/``.
    """
    warnings = _check_records(archive, root)
    big = _byte_order(archive, root) == "big"
    if big:
        warnings.append("written on a big-endian machine: the bytes of each number are swapped while reading")
    objects = TorchObjects()
    trees: list[object] = []
    size = 0
    prefixes = tuple(f"{folder}/" for folder in others)
    for folder in ("data", *others):
        objects.prefix = "" if folder == "data" else f"{folder}/"
        data = archive.read(f"{root}{folder}.pkl", largest, ratio=_MOST_COMPRESSION)
        refuse_many_tensors(data)
        tree, end = parse_pickle(data, objects.interpreter)
        if end != len(data):
            warnings.append(f"{len(data) - end} bytes follow the pickle in {folder}.pkl")
        trees.append(tree)
        size += len(data)
        if folder == "data" and any(key.startswith(prefixes) for key in objects.storages):
            raise FormatError("data.pkl names storages that belong to another pickle")

    def record(key: str) -> str:
        return f"{root}{key}" if key.startswith(prefixes) else f"{root}data/{key}"

    def swapped_width(key: str) -> int:
        # As in torch, the first type that the pickle gives to a storage counts; untyped storages are not swapped.
        dtype = objects.storages[key].dtype
        return DTYPES[dtype].part_bytes if dtype else 1

    def has_unknown_byte_order(tensor: TensorRef) -> bool:
        width = DTYPES[tensor.dtype].part_bytes
        return big and tensor.storage is not None and width != swapped_width(tensor.storage.key)

    def find(storage: StorageRef) -> str:
        name = record(storage.key)
        entry = archive.entries.get(name)
        if entry is None:
            raise FormatError(f"storage {quoted(storage.key)} is not in the archive")
        if entry.size != storage.nbytes:
            raise FormatError(
                f"storage {quoted(storage.key)}: the pickle says {storage.nbytes} bytes, the archive has {entry.size}",
                hint="the file is damaged, or its writer has a bug",
            )
        return name

    def locate(storage: StorageRef) -> Region:
        region, width = archive.region(find(storage)), swapped_width(storage.key)
        return ByteSwapped(region, width) if big and width > 1 else region

    used = set(map(record, objects.storages))
    unused = [name for name in archive.entries if name.startswith(_storage_folders(root)) and name not in used]
    if unused:
        text = f"no tensor uses {plural(len(unused), 'stored record')}, such as {quoted(unused[0])}"
        warnings.append(ReaderWarning(text, codes.UNUSED_RECORD))

    def records(keys: Mapping[str, Sequence[str]]) -> Iterator[Record]:
        return archive.records({record(key): named for key, named in keys.items()})

    def pickle() -> bytes:
        return archive.read(f"{root}data.pkl", largest)

    def other_records() -> list[tuple[str, Payload]]:
        names = [name.removeprefix(root) for name in archive.entries if name.startswith(root)]
        return [(name, archive.region(root + name)) for name in names if not _REWRITTEN.fullmatch(name)]

    unwritable = _UNTYPED if big and any(not storage.dtype for storage in objects.storages.values()) else ""
    file = TorchFile(
        trees[0],
        objects,
        size,
        locate,
        records,
        tuple(warnings),
        has_unknown_byte_order,
        find=find if archive.file.is_remote else None,
    )
    return trees, file if others else replace(file, pickle=pickle, unwritable=unwritable, other_records=other_records)


def archive_root(archive: ZipDirectory) -> str:
    """Return the common prefix of all record names; raises ``FormatError`` unless there is exactly one ``data.pkl``."""
    # Users rename files, so the prefix need not be the name of the file.
    roots = archive.roots("data.pkl")
    if len(roots) != 1:
        count = f"{len(roots)} entries called" if roots else "no"
        raise FormatError(f"a zip archive with {count} data.pkl: not a torch checkpoint")
    return roots[0]


def _storage_folders(root: str) -> tuple[str, str]:
    return f"{root}data/", f"{root}constants/"


def _check_records(archive: ZipDirectory, root: str) -> list[str]:
    version = archive.text(f"{root}version")
    if version is not None and (not version.isdigit() or int(version[:9]) > _NEWEST_VERSION):
        raise FormatError(f"format version {quoted(version[:20])} is newer than this ckptkit")
    warnings = archive.warnings(*_storage_folders(root))
    skipped = [entry.name for entry in archive.entries.values()
               if entry.size and not entry.crc and entry.name.startswith(_storage_folders(root))]  # fmt: skip
    if skipped and archive.entries[f"{root}data.pkl"].crc:
        examples = f"{plural(len(skipped), 'record')} without a checksum, such as {quoted(skipped[0])}"
        text = f"torch.save did not write the bytes of storages (torch.serialization.skip_data): {examples}"
        warnings.append(ReaderWarning(text, codes.SKIPPED_DATA))
    return warnings


def _byte_order(archive: ZipDirectory, root: str) -> str:
    order = archive.text(f"{root}byteorder")
    if order not in (None, "little", "big"):
        raise FormatError(f"its byte order is {quoted(order[:20])}", hint="the byte order must be little or big")
    return order or "little"
