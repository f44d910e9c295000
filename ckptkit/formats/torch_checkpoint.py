"""From the inert tree of a torch file to a Checkpoint: names, geometry and byte ranges, all checked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.errors import FormatError
from ckptkit.findings import Remark
from ckptkit.formats.inert import MappingValue, Placeholder
from ckptkit.formats.modules import open_modules
from ckptkit.formats.strided import Strided
from ckptkit.formats.torch_objects import StorageRef, TensorRef, TorchObjects, is_harmless, is_suspicious
from ckptkit.formats.tree import describe, exact_key, flat_key, leaves, select, type_name
from ckptkit.storage import Region
from ckptkit.tensors import (
    DTYPES,
    Checkpoint,
    Entry,
    Payload,
    Record,
    TensorInfo,
    View,
    is_contiguous,
    reach,
    versions_from,
)
from ckptkit.text import plural, printable, quoted

__all__ = ["LARGEST_PICKLE", "TorchFile", "assemble", "code_warnings"]

LARGEST_PICKLE = 256 << 20
_BUDGET_PER_BYTE = 2
_NAMES_PER_BYTE = 64
_MOST_OUTLINED = 1_000_000
_MOST_ENTRIES = 100_000
_MOST_TENSORS = 1_000_000


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a container reader found: the inert tree, the builders that made it, and where each storage lies.

    ``records`` goes over everything stored, told which tensors lie in the storage of a key.
    """

    tree: object
    objects: TorchObjects
    pickle_size: int
    locate: Callable[[StorageRef], Region]  # raises FormatError where the storage is not in the file
    records: Callable[[Mapping[str, Sequence[str]]], Iterable[Record]]
    warnings: tuple[str, ...] = ()
    uncertain: Callable[[TensorRef], bool] = lambda _: False  # whether the order of its bytes cannot be known


def assemble(file: TorchFile, *, path: str, format: str, inner: str, close: Callable[[], None],  # noqa: A002
             check: Callable[[], None]) -> Checkpoint:  # fmt: skip
    """Return the Checkpoint of the mapping ``inner`` (empty: found by its signature) in a torch file.

    Raises ``FormatError`` where a tensor reaches beyond its storage, or a storage is not what the pickle says.
    """
    tree, notes = open_modules(file.tree, file.pickle_size)
    value, chosen = select(tree, inner)
    if isinstance(value, TensorRef):
        value = {"": value} if not chosen else {chosen[-1]: value}
    if inner and not isinstance(value, Mapping | list | tuple):
        raise FormatError(
            f"holds no mapping at {quoted(inner)}, but {quoted(type_name(value))}",
            hint="ckpt show without the :: part lists its value",
        )
    if isinstance(value, Placeholder):
        raise FormatError(
            f"holds a pickled object of class {quoted(type_name(value))}, not a state_dict",
            hint="save its state_dict() and give that",
        )
    outlined = [_MOST_OUTLINED]
    tensors, entries, warnings = _sort_leaves(value, file.pickle_size, outlined)
    places: dict[str, Region] = {}
    ids: dict[str, int] = {}
    infos: dict[str, TensorInfo] = {}
    for key, (tensor, ambiguous) in tensors.items():
        if tensor.kind == "dense" and file.uncertain(tensor):
            tensor = replace(tensor, kind="big-endian")  # noqa: PLW2901 - what is listed of it
        infos[key] = _info(key, tensor, ids, ambiguous=ambiguous)
        if tensor.storage is not None and tensor.storage.key not in places:
            places[tensor.storage.key] = file.locate(tensor.storage)
    entries = _outside(tree, chosen, outlined) + entries
    references = [name for name in file.objects.interpreter.references if not is_harmless(name)]
    suspicious = [name for name in references if is_suspicious(name)]
    warnings += [*file.warnings, *notes, *code_warnings(references, suspicious)]
    if (repeated := file.objects.interpreter.repeated) is not None:
        warnings.append(f"a mapping sets {quoted(repeated)} more than once: the last value counts, as in torch")
    warnings += _seen_twice(infos, {key: tensor for key, (tensor, _) in tensors.items()})
    if file.objects.sources:
        warnings.append(f"embeds source code of {printable(file.objects.sources[0])}")

    def span(info: TensorInfo) -> Payload | None:
        tensor = tensors[info.key][0]
        if tensor.conj or tensor.neg or info.kind != "dense" or tensor.storage is None:
            return None
        return _span(info, places[tensor.storage.key])

    def payload(info: TensorInfo) -> Payload:
        tensor = tensors[info.key][0]
        if info.kind != "dense" or tensor.storage is None:
            raise FormatError(f"{quoted(info.key)} is a {info.kind} tensor: it is listed and cannot be read", path=path)
        whole = places[tensor.storage.key]
        plain = is_contiguous(info) and not tensor.conj and not tensor.neg
        return _span(info, whole) if plain else Strided(whole, info, tensor.conj, tensor.neg)

    def records() -> Iterable[Record]:
        held: dict[str, list[str]] = {}
        for key, (tensor, _) in tensors.items():
            if tensor.storage is not None:
                held.setdefault(tensor.storage.key, []).append(key)
        return file.records({**_held_outside(tree, file.pickle_size), **held} if chosen else held)

    return Checkpoint(
        infos,
        payload,
        path=path,
        format=format,
        entries=entries,
        warnings=warnings,
        references=references,
        suspicious=bool(suspicious),
        versions=_versions(value),
        envelope=flat_key(chosen) if chosen else "",
        span=span,
        records=records,
        files=[path],
        check=check,
        close=close,
    )


def _sort_leaves(
    value: object, size: int, outlined: list[int]
) -> tuple[dict[str, tuple[TensorRef, bool]], list[Entry], list[str]]:
    tensors: dict[str, tuple[TensorRef, bool]] = {}
    entries: list[Entry] = []
    warnings: list[str] = []
    if isinstance(value, MappingValue) and value.attributes:
        entries.extend(describe((name,), inner, outlined) for name, inner in value.attributes.items())
    names = _NAMES_PER_BYTE * size + 1_000_000
    unlisted = 0
    for place, leaf in leaves(value, [_BUDGET_PER_BYTE * size + 1000]):
        if len(entries) >= _MOST_ENTRIES and not isinstance(leaf, TensorRef):
            unlisted += 1
            continue
        key = flat_key(place)
        names -= len(key)
        if names < 0:
            raise FormatError("the structure is nested so that its names take many times its own size")
        if not isinstance(leaf, TensorRef):
            if place or isinstance(leaf, list | tuple):
                entries.append(describe(place, leaf, outlined))
            continue
        if len(tensors) >= _MOST_TENSORS:
            raise FormatError(f"holds more than {_MOST_TENSORS:,} tensors")
        if key in tensors:
            exact = exact_key(place)
            while exact in tensors:  # keys that are no names, such as tuples, are written alike
                exact = f"{exact}#{len(tensors)}"
            warnings.append(f"two tensors would both be called {quoted(key)}: one is listed as {printable(exact)}")
            tensors[key] = (tensors[key][0], True)
            tensors[exact] = (leaf, True)
        else:
            tensors[key] = (leaf, False)
    if unlisted:
        warnings.append(f"{plural(unlisted, 'entry', 'entries')} more than {_MOST_ENTRIES:,} are not listed")
    return tensors, entries, warnings


def _seen_twice(infos: Mapping[str, TensorInfo], tensors: Mapping[str, TensorRef]) -> list[str]:
    first: dict[str, str] = {}
    for key, tensor in tensors.items():
        if tensor.storage is not None and infos[first.setdefault(tensor.storage.key, key)].dtype != tensor.dtype:
            one, other = infos[first[tensor.storage.key]], infos[key]
            names = f"{quoted(one.key)} is {one}, {quoted(key)} is {other}"
            return [f"one storage is seen as two dtypes, which torch.save refuses: {names}"]
    return []


def _versions(value: object) -> dict[str, int]:
    table = value.attributes.get("_metadata") if isinstance(value, MappingValue) else None
    return versions_from(table) if isinstance(table, Mapping) else {}


def _outside(tree: object, chosen: tuple[object, ...], outlined: list[int]) -> list[Entry]:
    entries: list[Entry] = []
    level = tree
    for depth, key in enumerate(chosen):
        if not isinstance(level, Mapping):
            break
        others = [other for other in level if other is not key]
        described = (describe((*chosen[:depth], other), level[other], outlined) for other in others)
        entries.extend(entry._replace(outside=True) for entry in described)
        level = level[key]
    return entries


def _held_outside(tree: object, size: int) -> dict[str, list[str]]:
    """Return the names of all tensors, those beside the mapping of weights too, by the key of their storage."""
    held: dict[str, list[str]] = {}
    with contextlib.suppress(FormatError):  # a tree that expands without end: what was named until then will do
        for place, leaf in leaves(tree, [_BUDGET_PER_BYTE * size + 1000]):
            if isinstance(leaf, TensorRef) and leaf.storage is not None:
                held.setdefault(leaf.storage.key, []).append(flat_key(place))
    return held


def code_warnings(references: list[str], suspicious: list[str]) -> list[Remark]:
    """Return what to say of the code that a file names: ``suspicious`` where there is any, else ``references``."""
    if suspicious:
        named = ", ".join(printable(name) for name in suspicious[:8])
        said = f"looks malicious: it asks for {named} to be called; not run, and loading it elsewhere may run it"
        return [Remark(said, "code-suspicious", "error")]
    if references:
        named = ", ".join(printable(name) for name in references[:8])
        more = f" and {len(references) - 8} more" if len(references) > 8 else ""
        said = f"contains {plural(len(references), 'code reference')}, not run: {named}{more}"
        return [Remark(said, "code-reference")]
    return []


def _info(key: str, tensor: TensorRef, ids: dict[str, int], *, ambiguous: bool) -> TensorInfo:
    if math.prod(size or 1 for size in tensor.shape) >= 2**63:
        raise FormatError(f"{quoted(key)}: the shape {str(list(tensor.shape))[:80]} overflows")
    kind = "ambiguous" if ambiguous and tensor.kind == "dense" else tensor.kind
    if tensor.storage is None:
        return TensorInfo(key, tensor.dtype, tensor.shape, kind=kind)
    shape, stride, offset, bits = tensor.shape, tensor.stride, tensor.offset, DTYPES[tensor.dtype].bits
    if tensor.dtype == "F4":
        # torch counts bytes of two elements each, the safetensors code counts the elements.
        if not shape or stride[-1] != 1:
            return TensorInfo(key, tensor.dtype, shape, kind="packed")
        shape, offset = (*shape[:-1], 2 * shape[-1]), 2 * offset
        stride = (*(2 * step for step in stride[:-1]), 1)
    storage = tensor.storage
    length = storage.nbytes if storage.length < 0 else storage.length
    view = View(ids.setdefault(storage.key, len(ids)), offset + storage.start * 8 // bits, stride)
    info = TensorInfo(key, tensor.dtype, shape, view, kind)
    first, last = reach(info)
    if last - storage.start > length:
        raise FormatError(
            f"{quoted(key)}: the view ends at byte {last - storage.start} of storage {quoted(storage.key)}, "
            f"which has {length}"
        )
    if storage.start * 8 % bits:
        raise FormatError(f"{quoted(key)}: begins inside an element, at byte {first}")
    return info


def _span(info: TensorInfo, whole: Region) -> Payload:
    first, last = reach(info)
    return whole.slice(first, last - first)
