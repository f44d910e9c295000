"""Build a Checkpoint from the parsed pickle of a torch file: unique names, and checked shapes and byte ranges."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ckptkit.core.checkpoint import (
    MOST_TENSORS,
    Access,
    Affine,
    Check,
    Checkpoint,
    Container,
    Description,
    Entry,
    KeyPath,
    Nested,
    Payload,
    Record,
    TensorInfo,
    View,
    is_contiguous,
    module_versions,
    storage_range,
)
from ckptkit.core.dtypes import DTYPES, unpack_float4
from ckptkit.core.files.payloads import Region
from ckptkit.core.files.source import ByteSource
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import listed, plural, printable, quoted, shell_word
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.layout import Strided, only_listed_error
from ckptkit.formats.pickle.affine import CODES_OF_QUANTIZED, affine_of_pickle
from ckptkit.formats.pickle.loading import torch_loading
from ckptkit.formats.pickle.values import PickledMapping, Placeholder, is_harmless, is_suspicious, is_weights_only
from ckptkit.formats.torch.dtensor import describe_pieces, whole_tensor
from ckptkit.formats.torch.modules import replace_modules
from ckptkit.formats.torch.objects import ArrayRef, StorageRef, TensorRef, TorchObjects, made_by_class
from ckptkit.formats.torch.tree import (
    children,
    describe_entry,
    dotted_key,
    find_mapping,
    find_object,
    is_tensor,
    key_name,
    leaves,
    type_name,
    unique_names,
    without_numbers,
)
from ckptkit.wrappers.entries import KnownEntry, describe_entries
from ckptkit.wrappers.envelopes import WEIGHTS, Selection, describe_averages

__all__ = [
    "LARGEST_PICKLE",
    "TorchFile",
    "build_checkpoint",
    "build_file_checkpoint",
    "code_warnings",
    "refuse_many_tensors",
]

LARGEST_PICKLE = 256 << 20
_FEWEST_PLACES = 1_000  # a pickle may have so many places, and one more for each byte: only shared values have more
_CHARACTERS_PER_BYTE = 64  # of all names together, for each byte of the pickle
_CHARACTERS_PER_PART = 4  # counted for each key of a path, in addition to the characters of the key
_MOST_RETYPED = 8
_MOST_EDITED = 4_600_000  # opcodes of a pickle that can be edited: enough for 140,000 tensors
_TOO_MANY_TENSORS = f"holds more than {MOST_TENSORS:,} tensors, the limit"
_MOST_SUMMARIZED = 1_000_000
_MOST_ENTRIES = 100_000
_MOST_BESIDE = 8  # named in a warning


_CALL = re.compile(rb"t(?:q.|r....)?R", re.DOTALL)  # a tuple of arguments, often remembered, and the call
_SMALLEST_CALL = 16  # bytes


def refuse_many_tensors(pickle: bytes) -> None:
    """Raise ``FormatError`` for a pickle that calls more functions than a file may have tensors.

    Counting the calls takes a moment; building so many tensors would take long, only to refuse them.
    """
    if len(pickle) < _SMALLEST_CALL * MOST_TENSORS:
        return
    if next(islice(_CALL.finditer(pickle), MOST_TENSORS, None), None) is not None:
        raise FormatError(f"the pickle builds more than {MOST_TENSORS:,} tensors, the limit")


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The parsed pickle of a torch file, and the functions that find its storages.

    ``objects`` are the builders that parsed the pickle. ``records`` returns everything stored; its argument has the
    keys of the tensors in each storage. ``pickle`` returns the bytes of the pickle, and ``other_records`` everything
    that is neither the pickle nor a storage. ``unwritable`` is the reason why the file cannot be written again.
    ``is_loaded_whole`` is false for a file from which torch loads only the keys that the caller names.
    Raises ``FormatError`` for a pickle that changes a tensor after building it, which torch would follow.
    """

    tree: object
    objects: TorchObjects
    pickle_size: int
    locate: Callable[[StorageRef], Region]  # raises FormatError for a storage that is not in the file
    records: Callable[[Mapping[str, Sequence[str]]], Iterable[Record]]
    warnings: tuple[str, ...] = ()
    has_unknown_byte_order: Callable[[TensorRef], bool] = lambda _: False
    pickle: Callable[[], bytes] | None = None
    unwritable: str = ""
    other_records: Callable[[], Sequence[tuple[str, Payload]]] = tuple
    is_loaded_whole: bool = True
    find: Callable[[StorageRef], object] | None = None  # raises as locate does, but reads nothing

    def __post_init__(self) -> None:
        """Refuse changed tensors."""
        changes = {id(tensor): attribute for tensor, attribute in self.objects.changes}
        if changes:
            path = find_object(self.tree, changes)
            where = "" if path is None else f"{quoted(dotted_key(path))}: "
            attribute = next(iter(changes.values()))
            what = "sets its state" if attribute == "state" else f"sets its attribute {quoted(attribute)}"
            raise FormatError(
                f"{where}after building this tensor, the pickle {what}: torch would read another tensor",
                hint="load it with torch.load(weights_only=True), and save the state_dict again",
            )


def build_file_checkpoint(
    made: TorchFile,
    file: ByteSource,
    format: str,  # noqa: A002 - the name of the JSON field
    selection: Selection,
) -> Checkpoint:
    """Return the Checkpoint of a single file, as ``build_checkpoint`` does; the Checkpoint closes the file."""
    return build_checkpoint(
        made, path=file.path, format=format, selection=selection, close=file.close, check=file.check_unchanged
    )


def build_checkpoint(
    file: TorchFile,
    *,
    path: str = "",
    format: str = "",  # noqa: A002 - the name of the JSON field
    selection: Selection = WEIGHTS,
    files: Sequence[str] | None = None,
    close: Callable[[], None] | None = None,
    check: Check | None = None,
) -> Checkpoint:
    """Return the Checkpoint of the selected mapping in a torch file.

    Raises ``FormatError`` for a tensor that exceeds its storage, and for a storage that contradicts the pickle.
    """
    tree, notes = replace_modules(file.tree, file.pickle_size)
    value, chosen, left_out, beside = find_mapping(tree, selection)
    averages = [ReaderWarning(text, codes.AVERAGE_BESIDE) for text in describe_averages(tree, chosen, is_tensor)]
    if isinstance(value, TensorRef):
        value = {"": value} if not chosen else {chosen[-1]: value}
    if selection.key and not isinstance(value, Mapping | list | tuple):
        raise FormatError(
            f"holds {quoted(type_name(value))} at {quoted(selection.key)}, not a mapping",
            hint=f"ckpt show {shell_word(path) if path else 'PATH'} shows the value",
        )
    if isinstance(value, Placeholder):
        raise FormatError(
            f"holds a pickled object of class {quoted(type_name(value))}, not a state_dict",
            hint="save the state_dict() of the object instead",
        )
    budget = [_MOST_SUMMARIZED]
    found = _sort_leaves(value, left_out, file.pickle_size, budget)
    regions: dict[str, Region] = {}  # by the key of the storage
    ids: dict[str, int] = {}
    infos: dict[str, TensorInfo] = {}
    for key, tensor in found.tensors.items():
        if tensor.kind == "dense" and (kind := _stored_kind(file, tensor)) != "dense":
            tensor = replace(tensor, kind=kind)  # noqa: PLW2901 - only listed
        infos[key] = _info(key, tensor, ids)
        if tensor.storage is not None and tensor.storage.key not in regions:
            if file.find is None or tensor.storage.data is not None:
                regions[tensor.storage.key] = tensor.storage.data or file.locate(tensor.storage)
            else:
                file.find(tensor.storage)
    entries = _entries_outside(tree, chosen, budget) + found.entries
    if left_out and not file.is_loaded_whole:
        entries = [entry._replace(is_outside=True) for entry in entries]
    interpreter = file.objects.interpreter
    references = [name for name in interpreter.references if not is_harmless(name)]
    suspicious = [name for name in references if is_suspicious(name)]
    warnings = [*found.warnings, *file.warnings, *notes, *averages, *code_warnings(references, suspicious)]
    warnings += _not_weights_warnings(left_out, beside, chosen)
    if interpreter.repeated is not None:
        text = f"a mapping sets {quoted(interpreter.repeated)} more than once: the last value counts, as in torch"
        warnings.append(ReaderWarning(text, codes.REPEATED_KEY))
    warnings += _dtype_conflicts(infos, found.tensors) or _retyped(file.objects.retyped)
    arrays = [key for key, tensor in found.tensors.items() if isinstance(tensor, ArrayRef)]
    if arrays and format != "pickle":
        what = f"{plural(len(arrays), 'tensor is a numpy array', 'tensors are numpy arrays')}: {listed(arrays, 4)}"
        warnings.append(ReaderWarning(f"{what}; load_state_dict of torch does not take an array", codes.NUMPY_ARRAYS))
    if (pieces := describe_pieces(found.tensors)) is not None:
        warnings.append(ReaderWarning(pieces, codes.PART_OF_SEVERAL))
    if file.objects.sources:
        warnings.append(f"embeds source code of {printable(file.objects.sources[0])}")

    # The functions below live as long as the checkpoint. They must not keep ``file``, which can hold a million numbers.
    locate = file.locate

    def region_of(storage: StorageRef) -> Region:
        region = regions.get(storage.key)
        if region is None:  # in a store, where each is a request
            region = regions[storage.key] = locate(storage)
        return region

    def span(info: TensorInfo) -> Payload | None:
        tensor = found.tensors[info.key]
        if tensor.conj or tensor.neg or info.kind != "dense" or tensor.storage is None:
            return None
        return _span(info, region_of(tensor.storage))

    def payload(info: TensorInfo) -> Payload:
        tensor = found.tensors[info.key]
        if info.kind != "dense" or tensor.storage is None:
            raise only_listed_error(info, path)
        region = region_of(tensor.storage)
        has_stored_order = is_contiguous(info) and not tensor.conj and not tensor.neg
        return _span(info, region) if has_stored_order else Strided(region, info, tensor.conj, tensor.neg)

    def affine(info: TensorInfo) -> Affine | None:
        tensor = found.tensors[info.key]
        if tensor.kind != "quantized" or tensor.storage is None or info.dtype not in CODES_OF_QUANTIZED:
            return None
        stored = replace(info, dtype=CODES_OF_QUANTIZED[info.dtype], kind="dense")
        region = region_of(tensor.storage)
        codes = _span(stored, region) if is_contiguous(stored) else Strided(region, stored)
        return affine_of_pickle(tensor.spec, codes, locate)

    rest, size, list_records = without_numbers(tree) if chosen else None, file.pickle_size, file.records

    def records() -> Iterable[Record]:
        keys: dict[str, list[str]] = {}
        for key, tensor in found.tensors.items():
            if tensor.storage is not None:
                keys.setdefault(tensor.storage.key, []).append(key)
        return list_records({**_keys_by_storage(rest, size), **keys} if chosen else keys)

    return Checkpoint(
        infos,
        Access(payload, span, records, check, close, affine),
        Description(
            path,
            format,
            files=[path] if files is None else files,
            envelope=selection.key or (dotted_key(chosen) if chosen else ""),
            entries=entries,
            versions=module_versions(value.attributes.get("_metadata")) if isinstance(value, PickledMapping) else {},
            ambiguous={name: dotted for name, dotted in found.ambiguous.items() if name in infos},
            warnings=warnings,
            references=references,
            suspicious=bool(suspicious),
            torch_loading=torch_loading(interpreter, file.objects.locations.values(), file.objects.sources, format),
        ),
        nested=Nested(value, found.paths),
        container=_container(file, value, chosen, entries, found.paths),
    )


def _why_not_edited(objects: TorchObjects) -> str:
    if objects.retyped:
        return "it names a storage with two types"
    return "it describes more objects than an edit can hold" if objects.interpreter.steps > _MOST_EDITED else ""


def _stored_kind(file: TorchFile, tensor: TensorRef) -> str:
    """Return the kind of a dense tensor: another one if its stored bytes do not say what torch would load."""
    key = "" if tensor.storage is None else tensor.storage.key
    is_array = tensor.storage is not None and tensor.storage.data is not None
    if not is_array and file.has_unknown_byte_order(tensor):
        return "big-endian"
    if key in file.objects.retyped:
        return "two-type"
    return "meta" if file.objects.locations.get(key) == "meta" else "dense"


def _retyped(storages: Mapping[str, tuple[str, str]]) -> list[str]:
    return [
        f"storage {quoted(key)} is named with two types, {first} and {second}: torch gives all its tensors {first}"
        for key, (first, second) in list(storages.items())[:_MOST_RETYPED]
    ]


def _container(
    file: TorchFile, value: object, chosen: KeyPath, entries: Iterable[Entry], paths: Mapping[str, KeyPath]
) -> Container | None:
    """Return the file around the mapping, or None if the file holds no more or does not hold the mapping as it is."""
    level, pickle = file.tree, file.pickle
    for key in chosen:
        level = children(level).get(key)
    # The state_dict of a pickled module is computed from the module: the file has no such mapping.
    if pickle is None or level is not value or not isinstance(value, Mapping):
        return None
    if not chosen and all(entry.path == "_metadata" for entry in entries):
        return None
    storages, locate = file.objects.storages, file.locate
    return Container(
        chosen,
        paths,
        pickle,
        storage=lambda key: locate(storages[key]),
        other_records=file.other_records,
        references=tuple(name for name in file.objects.interpreter.references if not is_weights_only(name)),
        unwritable=file.unwritable or _why_not_edited(file.objects),
    )


@dataclass(frozen=True, slots=True)
class _Leaves:
    """The tensors in a mapping by name, with their key paths, and entries for all other values."""

    tensors: dict[str, TensorRef]
    paths: dict[str, KeyPath]
    entries: list[Entry]
    ambiguous: dict[str, str]
    warnings: list[str]


def _sort_leaves(value: object, left_out: Collection[object], size: int, summary_budget: list[int]) -> _Leaves:
    """Return the tensors and entries of a mapping. Each value at a key in ``left_out`` is one entry.

    ``size`` is the size of the pickle, which bounds the number of places.
    """
    if isinstance(value, Mapping) and sum(map(is_tensor, value.values())) > MOST_TENSORS:
        raise FormatError(_TOO_MANY_TENSORS)  # before any name is made
    found: list[tuple[KeyPath, object]] = []
    budget = _CHARACTERS_PER_BYTE * size + 1_000_000
    tensors = unlisted = 0
    for path, found_leaf in leaves(value, [_FEWEST_PLACES + size], left_out):
        leaf = made_by_class(found_leaf) or found_leaf
        leaf_is_tensor = is_tensor(leaf) and not (left_out and path[0] in left_out)
        if not leaf_is_tensor and not (path or isinstance(leaf, list | tuple)):
            continue
        if not leaf_is_tensor and len(found) - tensors >= _MOST_ENTRIES:
            unlisted += 1
            continue
        budget -= len(dotted_key(path)) + _CHARACTERS_PER_PART * len(path)
        if budget < 0:
            raise FormatError("the structure is nested so deeply that its names take many times the size of the file")
        tensors += leaf_is_tensor
        if tensors > MOST_TENSORS:
            raise FormatError(_TOO_MANY_TENSORS)
        found.append((path, leaf))
    names = unique_names([path for path, _ in found])
    result = _Leaves({}, {}, [], names.ambiguous, names.warnings)
    if isinstance(value, PickledMapping):
        for key, attribute in value.attributes.items():
            result.entries.append(describe_entry(key_name(key), attribute, summary_budget))
    for name, (path, leaf) in zip(names.names, found, strict=True):
        if is_tensor(leaf) and not (left_out and path[0] in left_out):
            result.tensors[name] = whole_tensor(leaf)
            result.paths[name] = path
        else:
            result.entries.append(describe_entry(name, leaf, summary_budget))
    if unlisted:
        result.warnings.append(f"{plural(unlisted, 'entry', 'entries')} more than {_MOST_ENTRIES:,} are not listed")
    return result


def _not_weights_warnings(
    left_out: Mapping[object, KnownEntry], beside: Sequence[str], chosen: KeyPath
) -> Iterator[ReaderWarning]:
    if left_out:
        yield ReaderWarning(describe_entries(left_out), codes.NOT_WEIGHTS)
    if beside:
        names = listed(beside, _MOST_BESIDE)
        text = f"reads the weights in {quoted(dotted_key(chosen))}, and no other tensors: {names}"
        yield ReaderWarning(text, codes.NOT_WEIGHTS)


def _dtype_conflicts(infos: Mapping[str, TensorInfo], tensors: Mapping[str, TensorRef]) -> list[str]:
    first_keys: dict[str, str] = {}  # of each storage
    for key, tensor in tensors.items():
        if tensor.storage is None:
            continue
        first = infos[first_keys.setdefault(tensor.storage.key, key)]
        if first.dtype != tensor.dtype:
            conflict = f"{quoted(first.key)} is {first}, {quoted(key)} is {infos[key]}"
            return [f"two dtypes share one storage, which torch.save refuses: {conflict}"]
    return []


def _entries_outside(tree: object, chosen: KeyPath, summary_budget: list[int]) -> list[Entry]:
    """Return entries for everything outside the chosen mapping."""
    found: list[tuple[KeyPath, object]] = []
    level = tree
    for depth, key in enumerate(chosen):
        if not isinstance(level, Mapping):
            break
        found += [((*chosen[:depth], other), level[other]) for other in level if other is not key]
        level = level[key]
    names = unique_names([path for path, _ in found]).names
    entries = (describe_entry(name, value, summary_budget) for name, (_, value) in zip(names, found, strict=True))
    return [entry._replace(is_outside=True) for entry in entries]


def _keys_by_storage(tree: object, size: int) -> dict[str, list[str]]:
    """Return the dotted keys of all tensors in the file, by the key of their storage."""
    keys: dict[str, list[str]] = {}
    with contextlib.suppress(FormatError):  # of a tree that expands without end, the first names are enough
        for path, leaf in leaves(tree, [_FEWEST_PLACES + size]):
            if isinstance(leaf, TensorRef) and leaf.storage is not None:
                keys.setdefault(leaf.storage.key, []).append(dotted_key(path))
    return keys


def code_warnings(references: list[str], suspicious: list[str]) -> list[ReaderWarning]:
    """Return a warning about the code that a file names: the suspicious names, or else all names."""
    if suspicious:
        names = ", ".join(map(printable, suspicious[:8]))
        text = f"looks malicious: it asks to call {names}; not run here, but loading the file elsewhere may run it"
        return [ReaderWarning(text, codes.CODE_SUSPICIOUS)]
    if references:
        names = listed(references, 8, show=printable)
        text = f"contains {plural(len(references), 'code reference')}, not run: {names}"
        return [ReaderWarning(text, codes.CODE_REFERENCE)]
    return []


def _info(key: str, tensor: TensorRef, ids: dict[str, int]) -> TensorInfo:
    if math.prod(size or 1 for size in tensor.shape) >= 2**63:
        raise FormatError(f"{quoted(key)}: the shape {str(list(tensor.shape))[:80]} overflows")
    kind = tensor.kind
    if tensor.storage is None:
        return TensorInfo(key, tensor.dtype, tensor.shape, kind=kind)
    shape, stride, offset, bits = tensor.shape, tensor.stride, tensor.offset, DTYPES[tensor.dtype].bits
    if tensor.dtype == "F4":
        unpacked = unpack_float4(shape, stride, offset)
        if unpacked is None:
            return TensorInfo(key, tensor.dtype, shape, kind="packed")
        shape, stride, offset = unpacked
    storage = tensor.storage
    length = storage.nbytes if storage.length < 0 else storage.length
    view = View(ids.setdefault(storage.key, len(ids)), offset + storage.start * 8 // bits, stride)
    info = TensorInfo(key, tensor.dtype, shape, view, kind)
    first, last = storage_range(info)
    if last - storage.start > length:
        raise FormatError(
            f"{quoted(key)}: the view ends at byte {last - storage.start} of storage {quoted(storage.key)}, "
            f"which has {length}"
        )
    if storage.start * 8 % bits:
        raise FormatError(f"{quoted(key)}: begins inside an element, at byte {first}")
    return info


def _span(info: TensorInfo, whole: Region) -> Payload:
    first, last = storage_range(info)
    return whole.slice(first, last - first)
