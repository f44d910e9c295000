"""From the inert tree of a torch file to a Checkpoint: names, geometry and byte ranges, all checked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.core.checkpoint import (
    DTYPES,
    Access,
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
    unpack_float4,
)
from ckptkit.core.files import LocalFile, Region
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.layout import Strided
from ckptkit.formats.pickle.values import PickledMapping, Placeholder, is_harmless, is_suspicious, is_weights_only
from ckptkit.formats.torch.modules import replace_modules
from ckptkit.formats.torch.objects import StorageRef, TensorRef, TorchObjects
from ckptkit.formats.torch.tree import (
    UniqueNames,
    children,
    describe_entry,
    dotted_key,
    find_mapping,
    is_tensor,
    key_name,
    leaves,
    type_name,
    unique_names,
)
from ckptkit.wrappers.envelopes import WEIGHTS, Selection, averages_beside

__all__ = ["LARGEST_PICKLE", "TorchFile", "build_checkpoint", "build_file_checkpoint", "code_warnings"]

LARGEST_PICKLE = 256 << 20
_LEAST_PLACES = 1_000  # and one for each byte of the pickle: more takes parts that are shared
_NAMES_PER_BYTE = 64
_PART = 4  # what a part of a path costs beside its characters
_MOST_OUTLINED = 1_000_000
_MOST_ENTRIES = 100_000
_MOST_TENSORS = 1_000_000


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a container reader found: the inert tree, the builders that made it, and where each storage lies.

    ``records`` goes over everything stored, told which tensors lie in the storage of a key. ``pickle`` gives the bytes
    that the whole tree was read from, ``others`` what a container holds that is neither pickle nor storage.
    """

    tree: object
    objects: TorchObjects
    pickle_size: int
    locate: Callable[[StorageRef], Region]  # raises FormatError where the storage is not in the file
    records: Callable[[Mapping[str, Sequence[str]]], Iterable[Record]]
    warnings: tuple[str, ...] = ()
    uncertain: Callable[[TensorRef], bool] = lambda _: False  # whether the order of its bytes cannot be known
    pickle: Callable[[], bytes] | None = None
    doubt: str = ""  # why a file cannot be written again with all that it holds
    others: Callable[[], Sequence[tuple[str, Payload]]] = tuple


def build_file_checkpoint(
    made: TorchFile,
    file: LocalFile,
    format: str,  # noqa: A002 - the name of the JSON field
    selection: Selection,
) -> Checkpoint:
    """Return what ``build_checkpoint`` returns for the whole of one file, which the Checkpoint takes over."""
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
    check: Callable[[], None] | None = None,
) -> Checkpoint:
    """Return the Checkpoint of the selected mapping in a torch file.

    Raises ``FormatError`` where a tensor reaches beyond its storage, or a storage is not what the pickle says.
    """
    tree, notes = replace_modules(file.tree, file.pickle_size)
    value, chosen = find_mapping(tree, selection)
    averages = [ReaderWarning(said, codes.AVERAGE_BESIDE) for said in averages_beside(tree, chosen, is_tensor)]
    if isinstance(value, TensorRef):
        value = {"": value} if not chosen else {chosen[-1]: value}
    if selection.key and not isinstance(value, Mapping | list | tuple):
        raise FormatError(
            f"holds no mapping at {quoted(selection.key)}, but {quoted(type_name(value))}",
            hint="ckpt show without the :: part lists its value",
        )
    if isinstance(value, Placeholder):
        raise FormatError(
            f"holds a pickled object of class {quoted(type_name(value))}, not a state_dict",
            hint="save its state_dict() and give that",
        )
    outlined = [_MOST_OUTLINED]
    tensors, entries, names, placed = _sort_leaves(value, file.pickle_size, outlined)
    places: dict[str, Region] = {}
    ids: dict[str, int] = {}
    infos: dict[str, TensorInfo] = {}
    for key, tensor in tensors.items():
        if tensor.kind == "dense" and file.uncertain(tensor):
            tensor = replace(tensor, kind="big-endian")  # noqa: PLW2901 - what is listed of it
        infos[key] = _info(key, tensor, ids)
        if tensor.storage is not None and tensor.storage.key not in places:
            places[tensor.storage.key] = file.locate(tensor.storage)
    entries = _outside(tree, chosen, outlined) + entries
    references = [name for name in file.objects.interpreter.references if not is_harmless(name)]
    suspicious = [name for name in references if is_suspicious(name)]
    warnings = [*names.warnings, *file.warnings, *notes, *averages, *code_warnings(references, suspicious)]
    if (repeated := file.objects.interpreter.repeated) is not None:
        said = f"a mapping sets {quoted(repeated)} more than once: the last value counts, as in torch"
        warnings.append(ReaderWarning(said, codes.REPEATED_KEY))
    warnings += _seen_twice(infos, tensors)
    if file.objects.sources:
        warnings.append(f"embeds source code of {printable(file.objects.sources[0])}")

    def span(info: TensorInfo) -> Payload | None:
        tensor = tensors[info.key]
        if tensor.conj or tensor.neg or info.kind != "dense" or tensor.storage is None:
            return None
        return _span(info, places[tensor.storage.key])

    def payload(info: TensorInfo) -> Payload:
        tensor = tensors[info.key]
        if info.kind != "dense" or tensor.storage is None:
            raise FormatError(f"{quoted(info.key)} is a {info.kind} tensor: it is listed and cannot be read", path=path)
        whole = places[tensor.storage.key]
        plain = is_contiguous(info) and not tensor.conj and not tensor.neg
        return _span(info, whole) if plain else Strided(whole, info, tensor.conj, tensor.neg)

    def records() -> Iterable[Record]:
        held: dict[str, list[str]] = {}
        for key, tensor in tensors.items():
            if tensor.storage is not None:
                held.setdefault(tensor.storage.key, []).append(key)
        return file.records({**_held_outside(tree, file.pickle_size), **held} if chosen else held)

    return Checkpoint(
        infos,
        Access(payload, span, records, check, close),
        Description(
            path,
            format,
            files=[path] if files is None else files,
            envelope=selection.key or (dotted_key(chosen) if chosen else ""),
            entries=entries,
            versions=module_versions(value.attributes.get("_metadata")) if isinstance(value, PickledMapping) else {},
            ambiguous={name: dotted for name, dotted in names.ambiguous.items() if name in infos},
            warnings=warnings,
            references=references,
            suspicious=bool(suspicious),
        ),
        nested=Nested(value, placed),
        container=_container(file, value, chosen, entries, placed),
    )


def _container(
    file: TorchFile, value: object, chosen: KeyPath, entries: Iterable[Entry], placed: Mapping[str, KeyPath]
) -> Container | None:
    """Return what the file holds beside a mapping of it; None where it holds no more, or the mapping is none of it."""
    level, pickle = file.tree, file.pickle
    for key in chosen:
        level = children(level).get(key)
    # The state_dict of a pickled module is read out of the module: the file itself has no such mapping.
    if pickle is None or level is not value or not isinstance(value, Mapping):
        return None
    if not chosen and all(entry.path == "_metadata" for entry in entries):
        return None
    unknown = tuple(name for name in file.objects.interpreter.references if not is_weights_only(name))
    storages = file.objects.storages
    return Container(chosen, placed, pickle, lambda key: file.locate(storages[key]), file.others, unknown, file.doubt)


def _sort_leaves(
    value: object, size: int, outlined: list[int]
) -> tuple[dict[str, TensorRef], list[Entry], UniqueNames, dict[str, KeyPath]]:
    found: list[tuple[KeyPath, object]] = []
    budget = _NAMES_PER_BYTE * size + 1_000_000
    tensors = unlisted = 0
    for place, leaf in leaves(value, [_LEAST_PLACES + size]):
        is_tensor = isinstance(leaf, TensorRef)
        if not is_tensor and not (place or isinstance(leaf, list | tuple)):
            continue
        if not is_tensor and len(found) - tensors >= _MOST_ENTRIES:
            unlisted += 1
            continue
        budget -= len(dotted_key(place)) + _PART * len(place)
        if budget < 0:
            raise FormatError("the structure is nested so that its names take many times its own size")
        tensors += is_tensor
        if tensors > _MOST_TENSORS:
            raise FormatError(f"holds more than {_MOST_TENSORS:,} tensors")
        found.append((place, leaf))
    names = unique_names([place for place, _ in found])
    named = list(zip(names.names, (leaf for _, leaf in found), strict=True))
    entries = []
    if isinstance(value, PickledMapping):
        entries += [describe_entry(key_name(name), inner, outlined) for name, inner in value.attributes.items()]
    entries += [describe_entry(name, leaf, outlined) for name, leaf in named if not isinstance(leaf, TensorRef)]
    if unlisted:
        names.warnings.append(f"{plural(unlisted, 'entry', 'entries')} more than {_MOST_ENTRIES:,} are not listed")
    sorted_out = {name: leaf for name, leaf in named if isinstance(leaf, TensorRef)}
    placed = {
        name: place for name, (place, leaf) in zip(names.names, found, strict=True) if isinstance(leaf, TensorRef)
    }
    return sorted_out, entries, names, placed


def _seen_twice(infos: Mapping[str, TensorInfo], tensors: Mapping[str, TensorRef]) -> list[str]:
    first: dict[str, str] = {}
    for key, tensor in tensors.items():
        if tensor.storage is not None and infos[first.setdefault(tensor.storage.key, key)].dtype != tensor.dtype:
            one, other = infos[first[tensor.storage.key]], infos[key]
            names = f"{quoted(one.key)} is {one}, {quoted(key)} is {other}"
            return [f"one storage is seen as two dtypes, which torch.save refuses: {names}"]
    return []


def _outside(tree: object, chosen: KeyPath, outlined: list[int]) -> list[Entry]:
    found: list[tuple[KeyPath, object]] = []
    level = tree
    for depth, key in enumerate(chosen):
        if not isinstance(level, Mapping):
            break
        found += [((*chosen[:depth], other), level[other]) for other in level if other is not key]
        level = level[key]
    names = unique_names([place for place, _ in found]).names
    entries = (describe_entry(name, value, outlined) for name, (_, value) in zip(names, found, strict=True))
    return [entry._replace(is_outside=True) for entry in entries]


def _held_outside(tree: object, size: int) -> dict[str, list[str]]:
    """Return the names of all tensors, those beside the mapping of weights too, by the key of their storage."""
    held: dict[str, list[str]] = {}
    with contextlib.suppress(FormatError):  # a tree that expands without end: what was named until then will do
        for place, leaf in leaves(tree, [_LEAST_PLACES + size]):
            if isinstance(leaf, TensorRef) and leaf.storage is not None:
                held.setdefault(leaf.storage.key, []).append(dotted_key(place))
    return held


def code_warnings(references: list[str], suspicious: list[str]) -> list[ReaderWarning]:
    """Return what to say of the code that a file names: ``suspicious`` where there is any, else ``references``."""
    if suspicious:
        named = ", ".join(printable(name) for name in suspicious[:8])
        said = f"looks malicious: it asks for {named} to be called; not run, and loading it elsewhere may run it"
        return [ReaderWarning(said, codes.CODE_SUSPICIOUS)]
    if references:
        named = ", ".join(printable(name) for name in references[:8])
        more = f" and {len(references) - 8} more" if len(references) > 8 else ""
        said = f"contains {plural(len(references), 'code reference')}, not run: {named}{more}"
        return [ReaderWarning(said, codes.CODE_REFERENCE)]
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
