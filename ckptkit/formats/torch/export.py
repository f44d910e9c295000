"""Read the archives of torch.export (``.pt2``): weights and constants described by JSON, but not the program."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ckptkit.core.checkpoint import (
    Access,
    Checkpoint,
    Description,
    Entry,
    Payload,
    Record,
    TensorInfo,
    View,
    is_contiguous,
    storage_range,
)
from ckptkit.core.config_files import parse_json
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent, Inflated
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.foreign import refuse_selection
from ckptkit.formats.layout import Strided, only_listed_error
from ckptkit.formats.safetensors import LARGEST_HEADER
from ckptkit.formats.zip_archive import ZipDirectory
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["CODES", "open_torch_export", "parse_tensor_info"]


_MOST_DIMENSIONS = 1024
_LARGEST_SIZE = 2**63
_LAYOUTS: Final = {1: "sparse", 2: "sparse", 3: "sparse", 4: "sparse", 5: "sparse", 6: "mkldnn", 7: "dense"}
# The numbers of ScalarType in the schema of torch.export, which differ from torch's own numbers.
CODES: Final = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 9: "C32", 10: "C64", 11: "C128",
    12: "BOOL", 13: "BF16", 28: "U16", 29: "F8_E4M3", 30: "F8_E5M2", 31: "F8_E4M3FNUZ", 32: "F8_E5M2FNUZ",
    33: "F8_E8M0", 34: "U32", 35: "U64",
}  # fmt: skip


def parse_tensor_info(key: str, payload: Mapping[str, object], storage: int, size: int) -> TensorInfo:
    """Return the description of one tensor of a payload config.

    ``storage`` is the number of the tensor's record, which has ``size`` bytes. Raises ``FormatError`` for a field that
    is missing or wrong, and for a view that exceeds the record.
    """
    meta = payload.get("tensor_meta")
    if not isinstance(meta, dict):
        raise FormatError(f"{quoted(key)}: the description has no tensor_meta")
    code, layout = meta.get("dtype"), meta.get("layout")
    if type(code) is not int or code not in CODES:
        raise FormatError(f"{quoted(key)}: the dtype {quoted(str(code)[:40])} is not known")
    if type(layout) is not int or layout not in _LAYOUTS:
        raise FormatError(f"{quoted(key)}: the layout {quoted(str(layout)[:40])} is not known")
    shape, stride = _integers(key, meta, "sizes"), _integers(key, meta, "strides")
    offset = _integer(key, meta.get("storage_offset"), "storage_offset")
    if math.prod(size or 1 for size in shape) >= _LARGEST_SIZE:
        raise FormatError(f"{quoted(key)}: the shape {str(list(shape))[:80]} overflows")
    pickled = payload.get("use_pickle")
    if type(pickled) is not bool:
        raise FormatError(f"{quoted(key)}: the description does not say whether the record is a pickle")
    if pickled or _LAYOUTS[layout] != "dense":
        return TensorInfo(key, CODES[code], shape, kind="pickled" if pickled else _LAYOUTS[layout])
    if len(shape) != len(stride):
        raise FormatError(f"{quoted(key)}: {len(shape)} sizes and {len(stride)} strides")
    info = TensorInfo(key, CODES[code], shape, View(storage, offset, stride))
    if info.elements and not size:
        return TensorInfo(key, CODES[code], shape, kind="meta")  # a program exported with fake weights
    width = DTYPES[info.dtype].bits // 8
    if size % width:
        raise FormatError(f"{quoted(key)}: the record has {size} bytes, not a multiple of the {width} of {info.dtype}")
    _, last = storage_range(info)
    if last > size:
        raise FormatError(f"{quoted(key)}: the view ends at byte {last} of the record, which has {size}")
    return info


def _integers(key: str, meta: Mapping[str, object], name: str) -> tuple[int, ...]:
    values = meta.get(name)
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        raise FormatError(f"{quoted(key)}: the {name} are not a list of up to {_MOST_DIMENSIONS} numbers")
    return tuple(_integer(key, value, name) for value in values)


def _integer(key: str, value: object, name: str) -> int:
    if isinstance(value, dict) and "as_expr" in value:
        raise FormatError(
            f"{quoted(key)}: the {name} depend on the input of the program, so they do not fit stored bytes"
        )
    number = value.get("as_int") if isinstance(value, dict) else None
    if type(number) is not int or not 0 <= number < _LARGEST_SIZE:
        raise FormatError(f"{quoted(key)}: {quoted(str(value)[:80])} in the {name} is not a valid size")
    return number


_MARK = "archive_format"
_MOST_FILES = 10_000
_COMPILED = ("data/aotinductor/", "data/executorch/", "data/mtia")
_FORMAT_RECORDS = (_MARK, "archive_version", "byteorder", "version", ".data/", ".format_version", ".storage_alignment")
_OBJECTS = {"custom_obj_": "custom object", "opaque_obj_": "opaque object"}


@dataclass(frozen=True, slots=True)
class _Contents:
    """The weights or the constants of a program: tensors, the record of each by key, and all other objects."""

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    records: dict[str, str] = field(default_factory=dict)
    objects: list[Entry] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Program:
    """The parts of an exported program that are read."""

    weights: _Contents
    constants: _Contents


def open_torch_export(archive: ZipDirectory, selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint of the state_dict in an archive of ``torch.export.save``; the Checkpoint closes the file.

    The key ``constants`` selects the constants of the program, and ``NAME`` or ``NAME.constants`` one of several
    programs. Raises ``FormatError`` for a description that contradicts its record.
    """
    file = archive.file
    root = _root(archive)
    _check_order(archive, root)
    programs = {name: _program(archive, root, name) for name in _names(archive, root)}
    if selection.optimizer:
        refuse_selection(selection)
    chosen, unchosen_constants = _choose(programs, selection.key)
    used = {record for program in programs.values() for contents in (program.weights, program.constants)
            for record in contents.records.values()}  # fmt: skip
    files = [name for name in archive.entries if name not in used and _is_content(name.removeprefix(root))]
    others = [*_constants(unchosen_constants), *(_file(archive, root, name) for name in files[:_MOST_FILES])]

    def region_of(info: TensorInfo) -> Extent | Inflated:
        if info.kind != "dense":
            raise only_listed_error(info, file.path)
        return archive.region(chosen.records[info.key])

    def span(info: TensorInfo) -> Payload | None:
        if info.kind != "dense":
            return None
        first, last = storage_range(info)
        return region_of(info).slice(first, last - first)

    def payload(info: TensorInfo) -> Payload:
        region = region_of(info)
        return (span(info) or region) if is_contiguous(info) else Strided(region, info)

    def records() -> Iterator[Record]:
        keys: dict[str, list[str]] = {}
        for key, name in chosen.records.items():
            keys.setdefault(name, []).append(key)
        return archive.records(keys)

    return Checkpoint(
        chosen.infos,
        Access(payload, span, records, file.check_unchanged, file.close),
        Description(
            file.path,
            "torch-export",
            files=[file.path],
            envelope=selection.key,
            entries=[*chosen.objects, *others],
            warnings=[*archive.warnings(f"{root}data/"), *_warnings(unchosen_constants, files, root)],
        ),
    )


def _root(archive: ZipDirectory) -> str:
    roots = archive.roots(_MARK)
    if len(roots) != 1:
        raise FormatError(f"{len(roots)} entries called {_MARK}: several archives in one file")
    if f"{roots[0]}data.pkl" in archive.entries:
        raise FormatError(f"holds both {_MARK} and data.pkl: two checkpoints in one file")
    kind = archive.text(f"{roots[0]}{_MARK}")
    if kind != "pt2":
        raise FormatError(f"an archive of the unknown kind {quoted(str(kind)[:40])}")
    version = archive.text(f"{roots[0]}archive_version") or "0"
    if version != "0":
        raise FormatError(f"archive version {quoted(version[:20])} is newer than this ckptkit")
    return roots[0]


def _check_order(archive: ZipDirectory, root: str) -> None:
    order = archive.text(f"{root}byteorder") or "little"
    if order != "little":
        # torch cannot swap the bytes of these records either.
        reason = "written on a big-endian machine" if order == "big" else f"its byte order is {quoted(order[:20])}"
        raise FormatError(reason, hint="export the program again on a little-endian machine")


def _names(archive: ZipDirectory, root: str) -> list[str]:
    names: dict[str, None] = {}
    for entry in archive.entries:
        name = entry.removeprefix(root)
        for kind in ("weights", "constants"):
            start, end = f"data/{kind}/", f"_{kind}_config.json"
            if name.startswith(start) and name.endswith(end):
                names[name[len(start) : -len(end)]] = None
        if name.startswith(("data/weights/", "data/constants/")) and name.endswith(".pt"):
            raise FormatError(
                f"its weights are a pickle, {quoted(name)}, as in old versions of torch.export",
                hint="load the program with torch.export.load, and save it again",
            )
    return list(names)


def _choose(programs: Mapping[str, _Program], key: str) -> tuple[_Contents, _Contents]:
    """Return the contents that ``key`` names, and the constants that are only listed."""
    nothing = _Contents()
    if not programs:
        programs = {"": _Program(nothing, nothing)}
    choices = {f"{name}.constants": (program.constants, nothing) for name, program in programs.items()}
    if len(programs) == 1:
        ((weights, constants),) = ((program.weights, program.constants) for program in programs.values())
        choices |= {"constants": (constants, nothing), "": (weights, constants)}
    choices |= {name: (program.weights, program.constants) for name, program in programs.items()}
    if key in choices:
        return choices[key]
    names = ", ".join(f"PATH::{printable(name)}" for name in list(programs)[:12])
    if not key:
        raise FormatError(f"holds {len(programs)} exported programs", hint=f"choose one: {names}")
    raise FormatError(f"holds nothing at {quoted(key)}", hint=f"choose {names}, or add .constants to one of them")


def _program(archive: ZipDirectory, root: str, name: str) -> _Program:
    return _Program(_contents(archive, root, name, "weights"), _contents(archive, root, name, "constants"))


def _contents(archive: ZipDirectory, root: str, name: str, kind: str) -> _Contents:
    config_name = f"data/{kind}/{name}_{kind}_config.json"
    contents = _Contents()
    if f"{root}{config_name}" not in archive.entries:
        return contents
    config = parse_json(archive.read(f"{root}{config_name}", LARGEST_HEADER), quoted(config_name)).get("config")
    if not isinstance(config, dict):
        raise FormatError(f"{quoted(config_name)} has no config")
    ids: dict[str, int] = {}
    for key, meta in config.items():
        record = meta.get("path_name") if isinstance(meta, dict) else None
        if not isinstance(record, str) or not record or "/" in record or "\\" in record or record in (".", ".."):
            raise FormatError(f"{quoted(key)}: the record name {quoted(str(record)[:80])} is not valid")
        entry = f"{root}data/{kind}/{record}"
        if entry not in archive.entries:
            raise FormatError(f"{quoted(key)}: the record {quoted(record)} is not in the archive")
        contents.records[key] = entry
        object_kind = next((noun for prefix, noun in _OBJECTS.items() if record.startswith(prefix)), None)
        if object_kind:
            contents.objects.append(Entry(key, object_kind, "a pickle, not read"))
        else:
            contents.infos[key] = parse_tensor_info(
                key, meta, ids.setdefault(record, len(ids)), archive.entries[entry].size
            )
    return contents


def _constants(constants: _Contents) -> Iterator[Entry]:
    for key, info in constants.infos.items():
        yield Entry(f"constants.{key}", "tensor", str(info), is_outside=True)
    for entry in constants.objects:
        yield entry._replace(path=f"constants.{entry.path}", is_outside=True)


def _is_content(name: str) -> bool:
    return not name.startswith(_FORMAT_RECORDS) and not name.endswith("_config.json")


def _file(archive: ZipDirectory, root: str, name: str) -> Entry:
    return Entry(name.removeprefix(root), "file", plural(archive.entries[name].size, "byte"), is_outside=True)


def _warnings(constants: _Contents, files: Sequence[str], root: str) -> Iterator[str]:
    count = len(constants.infos) + len(constants.objects)
    if count:
        text = f"{plural(count, 'constant')} beside the state_dict (non-persistent buffers, lifted tensors)"
        yield ReaderWarning(f"{text}: ::constants selects them", codes.CONSTANTS)
    compiled = [name.removeprefix(root) for name in files if name.removeprefix(root).startswith(_COMPILED)]
    if compiled:
        what = f"holds compiled code, {plural(len(compiled), 'entry', 'entries')} such as {quoted(compiled[0])}"
        yield ReaderWarning(f"{what}: listed, and never loaded", codes.NOT_LISTED)
    if len(files) > _MOST_FILES:
        text = f"{plural(len(files) - _MOST_FILES, 'entry', 'entries')} more than {_MOST_FILES:,} are not listed"
        yield ReaderWarning(text, codes.NOT_LISTED)
