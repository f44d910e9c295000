"""torch.export's archives (``.pt2``): raw records of weights and constants, described by JSON; no program is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ckptkit.core.checkpoint import (
    DTYPES,
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
from ckptkit.core.files import Extent, Inflated
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.foreign import refuse_selection
from ckptkit.formats.layout import Strided
from ckptkit.formats.safetensors import LARGEST_HEADER, parse_json
from ckptkit.formats.zip_archive import ZipDirectory
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["CODES", "open_torch_export", "parse_tensor_info"]


_MOST_DIMENSIONS = 1024
_LARGEST_SIZE = 2**63
_LAYOUTS: Final = {1: "sparse", 2: "sparse", 3: "sparse", 4: "sparse", 5: "sparse", 6: "mkldnn", 7: "dense"}
# The numbers of ScalarType in the schema, which are not those of torch's own types.
CODES: Final = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 9: "C32", 10: "C64", 11: "C128",
    12: "BOOL", 13: "BF16", 28: "U16", 29: "F8_E4M3", 30: "F8_E5M2", 31: "F8_E4M3FNUZ", 32: "F8_E5M2FNUZ",
    33: "F8_E8M0", 34: "U32", 35: "U64",
}  # fmt: skip


def parse_tensor_info(key: str, payload: Mapping[str, Any], storage: int, size: int) -> TensorInfo:
    """Return the description of one tensor of a payload config, whose record number ``storage`` has ``size`` bytes.

    Raises ``FormatError`` where a field is missing or wrong, or the view reaches beyond the record.
    """
    meta = payload.get("tensor_meta")
    if not isinstance(meta, dict):
        raise FormatError(f"{quoted(key)}: its description has no tensor_meta")
    code, layout = meta.get("dtype"), meta.get("layout")
    if type(code) is not int or code not in CODES:
        raise FormatError(f"{quoted(key)}: its dtype {quoted(str(code)[:40])} is not known")
    if type(layout) is not int or layout not in _LAYOUTS:
        raise FormatError(f"{quoted(key)}: its layout {quoted(str(layout)[:40])} is not known")
    shape, stride = _integers(key, meta, "sizes"), _integers(key, meta, "strides")
    offset = _integer(key, meta.get("storage_offset"), "storage_offset")
    if math.prod(size or 1 for size in shape) >= _LARGEST_SIZE:
        raise FormatError(f"{quoted(key)}: the shape {str(list(shape))[:80]} overflows")
    pickled = payload.get("use_pickle")
    if type(pickled) is not bool:
        raise FormatError(f"{quoted(key)}: its description does not say whether it is a pickle")
    if pickled or _LAYOUTS[layout] != "dense":
        return TensorInfo(key, CODES[code], shape, kind="pickled" if pickled else _LAYOUTS[layout])
    if len(shape) != len(stride):
        raise FormatError(f"{quoted(key)}: {len(shape)} sizes and {len(stride)} strides")
    info = TensorInfo(key, CODES[code], shape, View(storage, offset, stride))
    if info.elements and not size:
        return TensorInfo(key, CODES[code], shape, kind="meta")  # a program exported with fake weights
    width = DTYPES[info.dtype].bits // 8
    if size % width:
        raise FormatError(f"{quoted(key)}: its record has {size} bytes, no multiple of the {width} of {info.dtype}")
    _, last = storage_range(info)
    if last > size:
        raise FormatError(f"{quoted(key)}: the view ends at byte {last} of its record, which has {size}")
    return info


def _integers(key: str, meta: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = meta.get(name)
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        raise FormatError(f"{quoted(key)}: its {name} are no list of up to {_MOST_DIMENSIONS} numbers")
    return tuple(_integer(key, value, name) for value in values)


def _integer(key: str, value: object, name: str) -> int:
    if isinstance(value, dict) and "as_expr" in value:
        raise FormatError(f"{quoted(key)}: its {name} depend on the program's input, and its bytes cannot")
    number = value.get("as_int") if isinstance(value, dict) else None
    if type(number) is not int or not 0 <= number < _LARGEST_SIZE:
        raise FormatError(f"{quoted(key)}: {quoted(str(value)[:80])} in its {name} is no size")
    return number


_MARK = "archive_format"
_MOST_FILES = 10_000
_COMPILED = ("data/aotinductor/", "data/executorch/", "data/mtia")
_HOUSEKEEPING = (_MARK, "archive_version", "byteorder", "version", ".data/", ".format_version", ".storage_alignment")
_OBJECTS = {"custom_obj_": "custom object", "opaque_obj_": "opaque object"}


@dataclass(frozen=True, slots=True)
class _Part:
    """The weights or the constants of a program: its tensors, the entry that holds each, and what is no tensor."""

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    records: dict[str, str] = field(default_factory=dict)
    objects: list[Entry] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Program:
    """An exported program, as far as it is read here."""

    weights: _Part
    constants: _Part


def open_torch_export(archive: ZipDirectory, selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint of the state_dict in an archive of ``torch.export.save``; takes over its file.

    The key is ``constants`` for what the program holds beside its state_dict, or the name of one of several
    programs (``NAME``, ``NAME.constants``). Raises ``FormatError`` where a description is not true of its record.
    """
    file = archive.file
    root = _root(archive)
    _check_order(archive, root)
    programs = {name: _program(archive, root, name) for name in _names(archive, root)}
    if selection.optimizer:
        refuse_selection(selection)
    part, beside = _choose(programs, selection.key)
    used = {entry for program in programs.values() for each in (program.weights, program.constants)
            for entry in each.records.values()}  # fmt: skip
    files = [name for name in archive.entries if name not in used and _is_content(name.removeprefix(root))]
    entries = [*part.objects, *_constants(beside), *(_file(archive, root, name) for name in files[:_MOST_FILES])]

    def stored(info: TensorInfo) -> Extent | Inflated:
        if info.kind != "dense":
            raise FormatError(
                f"{quoted(info.key)} is a {info.kind} tensor: it is listed and cannot be read", path=file.path
            )
        return archive.region(part.records[info.key])

    def span(info: TensorInfo) -> Payload | None:
        if info.kind != "dense":
            return None
        first, last = storage_range(info)
        return stored(info).slice(first, last - first)

    def payload(info: TensorInfo) -> Payload:
        region = stored(info)
        return (span(info) or region) if is_contiguous(info) else Strided(region, info)

    def records() -> Iterator[Record]:
        keys: dict[str, list[str]] = {}
        for key, name in part.records.items():
            keys.setdefault(name, []).append(key)
        return archive.records(keys)

    return Checkpoint(
        part.infos,
        Access(payload, span, records, file.check_unchanged, file.close),
        Description(
            file.path,
            "torch-export",
            files=[file.path],
            envelope=selection.key,
            entries=entries,
            warnings=[*archive.warnings(f"{root}data/"), *_warnings(beside, files, root)],
        ),
    )


def _root(archive: ZipDirectory) -> str:
    roots = archive.roots(_MARK)
    if len(roots) != 1:
        raise FormatError(f"{len(roots)} entries called {_MARK}: several archives in one")
    if f"{roots[0]}data.pkl" in archive.entries:
        raise FormatError(f"holds both {_MARK} and data.pkl: two checkpoints in one")
    kind = archive.text(f"{roots[0]}{_MARK}")
    if kind != "pt2":
        raise FormatError(f"an archive of the unknown kind {quoted(str(kind)[:40])}")
    version = archive.text(f"{roots[0]}archive_version") or "0"
    if version != "0":
        raise FormatError(f"its archive version is {quoted(version[:20])}, newer than known")
    return roots[0]


def _check_order(archive: ZipDirectory, root: str) -> None:
    order = archive.text(f"{root}byteorder") or "little"
    if order != "little":
        # Its records have no swapping reader in torch either.
        what = "written on a big-endian machine" if order == "big" else f"its byte order is {quoted(order[:20])}"
        raise FormatError(what, hint="export the program again where it is to be read")


def _names(archive: ZipDirectory, root: str) -> list[str]:
    names: dict[str, None] = {}
    for entry in archive.entries:
        place = entry.removeprefix(root)
        for kind in ("weights", "constants"):
            start, end = f"data/{kind}/", f"_{kind}_config.json"
            if place.startswith(start) and place.endswith(end):
                names[place[len(start) : -len(end)]] = None
        if place.startswith(("data/weights/", "data/constants/")) and place.endswith(".pt"):
            raise FormatError(
                f"its weights are a pickle, {quoted(place)}, as torch.export wrote them once",
                hint="load it with torch.export.load, and save it again",
            )
    return list(names)


def _choose(programs: Mapping[str, _Program], key: str) -> tuple[_Part, _Part]:
    """Return the part that ``key`` names, and the constants to tell of beside it."""
    nothing = _Part()
    if not programs:
        programs = {"": _Program(nothing, nothing)}
    choices = {f"{name}.constants": (program.constants, nothing) for name, program in programs.items()}
    if len(programs) == 1:
        ((weights, constants),) = ((program.weights, program.constants) for program in programs.values())
        choices |= {"constants": (constants, nothing), "": (weights, constants)}
    choices |= {name: (program.weights, program.constants) for name, program in programs.items()}
    if key in choices:
        return choices[key]
    named = ", ".join(f"PATH::{printable(name)}" for name in list(programs)[:12])
    if not key:
        raise FormatError(f"holds {len(programs)} exported programs", hint=f"name one: {named}")
    raise FormatError(f"holds nothing at {quoted(key)}", hint=f"there is: {named}, and the same with .constants")


def _program(archive: ZipDirectory, root: str, name: str) -> _Program:
    return _Program(_part(archive, root, name, "weights"), _part(archive, root, name, "constants"))


def _part(archive: ZipDirectory, root: str, name: str, kind: str) -> _Part:
    place = f"data/{kind}/{name}_{kind}_config.json"
    part = _Part()
    if f"{root}{place}" not in archive.entries:
        return part
    what = quoted(place)
    table = parse_json(archive.read(f"{root}{place}", LARGEST_HEADER), what).get("config")
    if not isinstance(table, dict):
        raise FormatError(f"{what} has no config")
    ids: dict[str, int] = {}
    for key, meta in table.items():
        record = meta.get("path_name") if isinstance(meta, dict) else None
        if not isinstance(record, str) or not record or "/" in record or "\\" in record or record in (".", ".."):
            raise FormatError(f"{quoted(key)}: the record name {quoted(str(record)[:80])} is none")
        entry = f"{root}data/{kind}/{record}"
        if entry not in archive.entries:
            raise FormatError(f"{quoted(key)}: its record {quoted(record)} is not in the archive")
        part.records[key] = entry
        object_kind = next((noun for prefix, noun in _OBJECTS.items() if record.startswith(prefix)), None)
        if object_kind:
            part.objects.append(Entry(key, object_kind, "a pickle, not read"))
        else:
            part.infos[key] = parse_tensor_info(
                key, meta, ids.setdefault(record, len(ids)), archive.entries[entry].size
            )
    return part


def _constants(part: _Part) -> Iterator[Entry]:
    for key, info in part.infos.items():
        yield Entry(f"constants.{key}", "tensor", str(info), is_outside=True)
    for entry in part.objects:
        yield entry._replace(path=f"constants.{entry.path}", is_outside=True)


def _is_content(place: str) -> bool:
    return not place.startswith(_HOUSEKEEPING) and not place.endswith("_config.json")


def _file(archive: ZipDirectory, root: str, name: str) -> Entry:
    return Entry(name.removeprefix(root), "file", plural(archive.entries[name].size, "byte"), is_outside=True)


def _warnings(beside: _Part, files: Sequence[str], root: str) -> Iterator[str]:
    count = len(beside.infos) + len(beside.objects)
    if count:
        said = f"{plural(count, 'constant')} beside the state_dict (buffers that are not persistent, lifted tensors)"
        yield ReaderWarning(f"{said}: ::constants takes them", codes.CONSTANTS)
    compiled = [name.removeprefix(root) for name in files if name.removeprefix(root).startswith(_COMPILED)]
    if compiled:
        yield (f"holds compiled code, {plural(len(compiled), 'entry', 'entries')} such as {quoted(compiled[0])}: "
               "listed, and never loaded")  # fmt: skip
    if len(files) > _MOST_FILES:
        yield f"{plural(len(files) - _MOST_FILES, 'entry', 'entries')} more than {_MOST_FILES:,} are not listed"
