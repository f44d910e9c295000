"""Verification of an output: a reader that is not ckptkit reads it, and its bytes are compared with the plan."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint import Payload
from ckptkit.core.dtypes import DTYPES, torch_shape
from ckptkit.core.files.payloads import announce, same_bytes
from ckptkit.core.files.places import is_url, open_source
from ckptkit.core.text import first_line, listed, printable, quoted
from ckptkit.core.torch_bridge import TensorPayload, code_of, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import OutputError
from ckptkit.formats import open_checkpoint, open_inside
from ckptkit.formats.safetensors import reader_refusal
from ckptkit.formats.writing.state import wrong_output
from ckptkit.plans.plan.step import Step
from ckptkit.plans.produce import Producer
from ckptkit.wrappers.envelopes import Selection

if TYPE_CHECKING:
    from ckptkit.formats.sharded import Shard

__all__ = ["Verification", "verify_dcp", "verify_index", "verify_safetensors", "verify_torch"]

_PIECE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Verification:
    """The reader that found the planned bytes in an output: ``safetensors 0.8.0`` or ``torch 2.13.0``.

    If that reader cannot read the output, ``alone`` is the reason, and only ckptkit read the bytes. A file in a store
    is such an output: ckptkit reads all of it again, in ranges.
    """

    reader: str
    alone: str = ""


@dataclass(frozen=True, slots=True)
class _File:
    """A file to verify: where it is now, and the path that messages name."""

    path: str
    shown: str

    def fail(self, reason: str) -> OutputError:
        return wrong_output(reason, self.shown)


def verify_safetensors(
    path: str, shown: str, steps: Sequence[Step], metadata: Mapping[str, str], producer: Producer
) -> Verification:
    """Return how the safetensors file at ``path`` was verified; messages name it ``shown``.

    The safetensors library must find exactly the keys, dtypes, shapes, metadata and bytes of the plan. Each tensor is
    produced again by ``producer``, and large tensors are compared in pieces. Raises ``OutputError`` for the first
    difference.
    """
    import safetensors

    file = _File(path, shown)
    reader = f"safetensors {safetensors.__version__}"
    if is_url(path):
        return Verification(reader, _read_alone(file, _only_local(reader), steps, producer, metadata=metadata))
    unknown = next((step for step in steps if reader_refusal(step.out.dtype, step.out.shape)), None)
    if unknown is not None:
        why = f"{quoted(unknown.out.key)} in {printable(shown)} is {unknown.out.dtype}"
        return Verification(reader, _read_alone(file, why, steps, producer, metadata=metadata))
    with _name_to_open(path) as name:

        def opened() -> Any:  # the library has no type for its readers
            return safetensors.safe_open(name, framework="pt", device="cpu")

        try:
            with opened() as found:
                _refuse_other_keys(file, found.keys(), steps)
                if dict(found.metadata() or {}) != dict(metadata):
                    raise file.fail("does not have the metadata of the plan")
        except OutputError:
            raise
        except Exception as error:  # also errors of the file system
            raise file.fail(f"safetensors cannot open it ({first_line(error)})") from error
        for batch in _batches(steps):
            with opened() as found:
                for step in batch:
                    part = found.get_slice(step.out.key)
                    described = f"{part.get_dtype()} {list(part.get_shape())}"
                    if described != str(step.out):
                        raise file.fail(f"{quoted(step.out.key)} should be {step.out}, and is {described}")
                    _compare(file, step, producer, _Pieces(step.out.nbytes, _pieces_of(found, opened, step)))
    return Verification(reader)


def _batches(steps: Iterable[Step]) -> Iterator[list[Step]]:
    """Yield the steps in batches: the pages of a mapped file stay in memory until the reader is closed."""
    batch: list[Step] = []
    size = 0
    for step in steps:
        if batch and size + step.out.nbytes > _PIECE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(step)
        size += step.out.nbytes
    yield batch


def _pieces_of(found: Any, opened: Callable[[], Any], step: Step) -> Iterator[Tensor]:
    """Yield the tensor of an open reader; the pieces of a large tensor are from readers of their own."""
    info = step.out
    if info.nbytes <= _PIECE_BYTES or DTYPES[info.dtype].bits < 8:  # the library cannot cut packed elements
        yield found.get_tensor(info.key)
        return
    for index in _indexes(info.shape, DTYPES[info.dtype].bits // 8):
        with opened() as reader:
            yield reader.get_slice(info.key)[index if len(index) > 1 else index[0]]


def _indexes(shape: tuple[int, ...], width: int) -> Iterator[tuple[slice, ...]]:
    """Yield indexes of pieces of bounded size, in the order of the elements."""
    row = math.prod(shape[1:]) * width
    if row <= _PIECE_BYTES:
        rows = max(_PIECE_BYTES // max(row, 1), 1)
        yield from ((slice(first, min(first + rows, shape[0])),) for first in range(0, shape[0], rows))
        return
    for number in range(shape[0]):
        yield from ((slice(number, number + 1), *inner) for inner in _indexes(shape[1:], width))


def verify_torch(path: str, shown: str, steps: Sequence[Step], producer: Producer, inner: str = "") -> Verification:
    """Return how the torch file at ``path`` was verified; messages name it ``shown``.

    ``torch.load`` with ``weights_only`` and ``mmap`` must find exactly the keys, dtypes, shapes and bytes of the plan.
    ``inner`` is the mapping inside the file that holds the tensors. Each tensor is produced again by ``producer``.
    Raises ``OutputError`` for the first difference.
    """
    import torch

    file = _File(path, shown)
    reader = f"torch {torch.__version__.split('+')[0]}"
    if is_url(path):
        return Verification(reader, _read_alone(file, _only_local(reader), steps, producer, inner))
    with open_inside(path, Selection(inner)) as written:
        container, nested = written.container, written.nested
        references = container.references if container is not None else ()
    at = container.path if container is not None else ()
    known = {} if nested is None else nested.paths
    paths = {step.out.key: known.get(step.out.key, (step.out.key,)) for step in steps}
    with _name_to_open(path) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about storage classes and dtypes that torch wants to replace
        try:
            found = torch.load(name, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch has no common class of errors for broken files
            if type(error).__name__ != "UnpicklingError":
                raise file.fail(f"torch cannot load it ({first_line(error)})") from error
            holds = listed(references, 4, show=printable) if references else f"a value of a kind that {reader} refuses"
            why = f"{printable(shown)} holds {holds}"
            return Verification(reader, _read_alone(file, why, steps, producer, inner))
        mapping = _value_at(file, found, at)
        if isinstance(mapping, Mapping):
            top = {path[0]: key for key, path in paths.items() if len(path) == 1}
            tensors = [name for name, value in mapping.items() if isinstance(value, torch.Tensor)]
            surplus = next((name for name in tensors if name not in top), None)
            if surplus is not None:
                raise file.fail(f"holds {quoted(str(surplus))}, which the plan does not make")
        for step in steps:
            tensor = _value_at(file, mapping, paths[step.out.key])
            if not isinstance(tensor, torch.Tensor):
                raise file.fail(f"{quoted(step.out.key)} should be {step.out}, and is a {type(tensor).__name__}")
            if (code_of(tensor.dtype), tuple(tensor.shape)) != (
                step.out.dtype,
                torch_shape(step.out.dtype, step.out.shape),
            ):
                described = f"{code_of(tensor.dtype)} {list(tensor.shape)}"
                raise file.fail(f"{quoted(step.out.key)} should be {step.out}, and is {described}")
            _compare(file, step, producer, TensorPayload(tensor, step.out.nbytes))
    return Verification(reader)


def verify_dcp(path: str, shown: str, steps: Sequence[Step], producer: Producer) -> Verification:
    """Return how the distributed checkpoint in the directory ``path`` was verified; messages name it ``shown``.

    ``torch.distributed.checkpoint.load`` must find exactly the keys, dtypes, shapes and bytes of the plan. Each tensor
    is produced again by ``producer``. A tensor is loaded whole, and small ones together. Raises ``OutputError`` for
    the first difference.
    """
    import torch

    file = _File(path, shown)
    reader = f"torch {torch.__version__.split('+')[0]}"
    if is_url(path):
        return Verification(reader, _read_alone(file, _only_local(reader), steps, producer, is_directory=True))
    unknown = next((step.out for step in steps if not hasattr(torch, DTYPES[step.out.dtype].torch_name)), None)
    if unknown is not None:
        why = f"{quoted(unknown.key)} in {printable(shown)} is {unknown.dtype}"
        return Verification(reader, _read_alone(file, why, steps, producer, is_directory=True))
    if not torch.distributed.is_available():
        why = f"{reader} was built without torch.distributed"
        return Verification(reader, _read_alone(file, why, steps, producer, is_directory=True))
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

    # Older torch has no such argument, and finds out by itself that there is no group of processes.
    alone: dict[str, Any] = {"no_dist": True} if "no_dist" in inspect.signature(load_distributed).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a load without a group of processes
        try:
            described = FileSystemReader(path).read_metadata().state_dict_metadata
        except Exception as error:  # torch has no common class of errors for broken files
            raise file.fail(f"torch cannot read its metadata ({first_line(error)})") from error
        _refuse_other_keys(file, described, steps)
        for step in steps:
            found = described[step.out.key]
            if not isinstance(found, TensorStorageMetadata):
                raise file.fail(f"{quoted(step.out.key)} should be {step.out}, and is not a tensor")
            if (code_of(found.properties.dtype), tuple(found.size)) != (
                step.out.dtype,
                torch_shape(step.out.dtype, step.out.shape),
            ):
                is_now = f"{code_of(found.properties.dtype)} {list(found.size)}"
                raise file.fail(f"{quoted(step.out.key)} should be {step.out}, and is {is_now}")
        for batch in _batches(steps):
            tensors = {
                step.out.key: torch.empty(
                    torch_shape(step.out.dtype, step.out.shape), dtype=torch_dtype(step.out.dtype), device="cpu"
                )
                for step in batch
            }
            try:
                load_distributed(tensors, checkpoint_id=path, **alone)
            except Exception as error:
                raise file.fail(f"torch cannot load it ({first_line(error)})") from error
            for step in batch:
                _compare(file, step, producer, TensorPayload(tensors[step.out.key], step.out.nbytes))
    return Verification(reader)


def _value_at(file: _File, value: object, path: Iterable[object]) -> object:
    for key in path:
        try:
            value = value[key]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            raise file.fail(f"has nothing at {quoted(str(key))}, where the plan puts a tensor") from None
    return value


def verify_index(path: str, shown: str, shards: Iterable[Shard]) -> None:
    """Raise ``OutputError`` where the index at ``path`` does not map each key to its shard; messages name it ``shown``.

    Every reader of shards reads the index as JSON, so the JSON module of Python reads it here.
    """
    file = open_source(path)
    try:
        found = json.loads(file.read(0, file.size))["weight_map"]
    finally:
        file.close()
    if found != {info.key: shard.name for shard in shards for info in shard.infos}:
        raise _File(path, shown).fail("the index does not map each tensor to its shard")


def _only_local(reader: str) -> str:
    return f"{reader} reads only files of this machine"


def _read_alone(
    file: _File,
    why: str,
    steps: Sequence[Step],
    producer: Producer,
    inner: str = "",
    *,
    is_directory: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Compare the file or directory with ckptkit's own reader, and return ``why``; None is any metadata."""
    with open_checkpoint(file.path) if is_directory else open_inside(file.path, Selection(inner)) as written:
        if metadata is not None and dict(written.metadata) != dict(metadata):
            raise file.fail("does not have the metadata of the plan")
        _refuse_other_keys(file, written, steps)
        for step in steps:
            info = written[step.out.key]
            if (info.dtype, info.shape) != (step.out.dtype, step.out.shape):
                raise file.fail(f"{quoted(step.out.key)} should be {step.out}, and is {info}")
        found = {step.out.key: written.payload(step.out.key) for step in steps}
        announce(found.values())
        for step in steps:
            _compare(file, step, producer, found[step.out.key])
    return why


def _refuse_other_keys(file: _File, found: Iterable[str], steps: Sequence[Step]) -> None:
    keys, planned = list(found), {step.out.key: step.out for step in steps}
    surplus = next((key for key in keys if key not in planned), None)
    if surplus is not None:
        raise file.fail(f"holds {quoted(surplus)}, which the plan does not make")
    missing = next((key for key in planned if key not in set(keys)), None) if len(keys) < len(planned) else None
    if missing is not None:
        raise file.fail(f"{quoted(missing)} should be {planned[missing]}, and is missing")


def _compare(file: _File, step: Step, producer: Producer, found: Payload) -> None:
    if not same_bytes(producer.payload(step), found):
        raise file.fail(f"{quoted(step.out.key)} does not have the bytes that the plan makes")


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The bytes of tensors one after the other; the tensors are read only with the chunks, and only once."""

    nbytes: int
    tensors: Iterator[Tensor]

    def chunks(self) -> Iterator[memoryview]:
        for tensor in self.tensors:
            yield from TensorPayload(tensor, tensor.nbytes).chunks()


@contextlib.contextmanager
def _name_to_open(path: str) -> Iterator[str]:
    """Yield a name under which a library opens the file: libraries take only names that are text."""
    try:
        path.encode()
    except UnicodeEncodeError:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
    else:
        yield path
