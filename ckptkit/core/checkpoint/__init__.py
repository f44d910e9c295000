"""The types that describe a checkpoint: tensors, entries, records, and the ``Checkpoint`` that holds them."""

from __future__ import annotations

from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ckptkit.core.arguments import require_flags, require_strings, require_type
from ckptkit.core.checkpoint.info import (
    UNINITIALISED,
    TensorInfo,
    UnknownKeyError,
    View,
    is_contiguous,
    memory_order,
    row_major,
    storage_range,
    under_key,
)
from ckptkit.core.checkpoint.payload import Part, Payload, Sink, part_of, read_into
from ckptkit.core.closing import Closing
from ckptkit.core.frozen import FrozenDict
from ckptkit.core.result import Result
from ckptkit.core.torch_types import Module, Tensor

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = [
    "MOST_TENSORS",
    "UNINITIALISED",
    "Access",
    "Affine",
    "Check",
    "Checkpoint",
    "Configuration",
    "Container",
    "Description",
    "Entry",
    "KeyPath",
    "Nested",
    "Part",
    "Payload",
    "Record",
    "Sink",
    "TensorInfo",
    "TorchLoading",
    "View",
    "affine_of",
    "as_selected",
    "is_contiguous",
    "memory_order",
    "module_versions",
    "part_of",
    "read_into",
    "replaced_tensors",
    "row_major",
    "storage_range",
    "under_key",
]

MOST_TENSORS: Final = 250_000  # of one checkpoint, which then takes 300 MB; the largest published models have 210,000


class Entry(NamedTuple):
    """A value of a checkpoint that is not a tensor of the state_dict: an epoch, an optimizer, arguments.

    ``value`` is the value itself if JSON can hold it, else a short description. ``is_outside`` is true for a value
    outside the mapping of weights. ``is_file`` is true for a separate file.
    """

    path: str
    type: str
    value: object
    is_outside: bool = False
    is_file: bool = False


class Record(NamedTuple):
    """A range of the file at ``path`` that its container stores as one unit; its bytes are not read yet.

    ``crc`` is the CRC-32 of the payload's bytes if the container has one. ``keys`` are the tensors stored in the
    record.
    """

    path: str
    name: str
    payload: Payload
    crc: int | None = None
    keys: tuple[str, ...] = ()


KeyPath = tuple[object, ...]  # the keys and positions that lead from a nested value to a value inside


class Nested(NamedTuple):
    """The nested mapping that a Checkpoint lists flat, and the key path of each tensor in the mapping.

    Containers, numbers and strings are Python objects. Placeholders replace tensors and objects that need code.
    """

    value: object
    paths: Mapping[str, KeyPath]


@dataclass(frozen=True, slots=True)
class Container:
    """A file that holds more than the mapping of tensors, with all that is needed to write the file again.

    ``path`` leads to the mapping of tensors, and ``paths`` lead from the mapping to each tensor. ``pickle`` returns
    the pickle of the file, ``storage`` the bytes of a storage by its name in the pickle. ``other_records`` returns
    the remaining records by name. ``references`` are code names that torch's weights-only loader refuses.
    ``unwritable`` is the reason why the file cannot be written again, or empty.
    """

    path: KeyPath
    paths: Mapping[str, KeyPath]
    pickle: Callable[[], bytes]
    storage: Callable[[str], Payload]
    other_records: Callable[[], Sequence[tuple[str, Payload]]]
    references: tuple[str, ...] = ()
    unwritable: str = ""


@dataclass(frozen=True, slots=True)
class TorchLoading:
    """What a torch file needs of ``torch.load``, as its pickle tells without being run.

    ``refused`` has the reasons why ``torch.load(weights_only=True)`` refuses the file; it is empty if it does not.
    ``globals`` are the code names among these reasons. ``devices`` are the devices other than ``cpu`` and ``meta`` that
    its storages name: torch.load needs ``map_location`` where it does not have these.
    """

    refused: tuple[str, ...] = ()
    globals: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Configuration:
    """The configuration of a live model of a library that has one, such as ``model.config`` of transformers.

    ``value`` is the configuration itself. ``classes`` names the classes of the model that the library has, the most
    special one first.
    """

    value: object
    classes: tuple[str, ...]

    @property
    def model_type(self) -> str:
        """The model type that the configuration has, or an empty string."""
        found = getattr(self.value, "model_type", None)
        return found if isinstance(found, str) else ""


@dataclass(frozen=True, slots=True)
class Description:
    """The description that a reader gives of a checkpoint; ``Checkpoint`` has a property for each field."""

    path: str
    format: str
    files: Sequence[str] = ()
    envelope: str = ""
    entries: Sequence[Entry] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    ambiguous: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    references: Sequence[str] = ()
    suspicious: bool = False
    configuration: Configuration | None = None
    torch_loading: TorchLoading | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    is_selected: bool = False

    def __post_init__(self) -> None:
        """Copy every field that a caller could still change."""
        for name in ("files", "entries", "warnings", "references"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("metadata", "versions", "ambiguous", "layers"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))


class Affine(NamedTuple):
    """A tensor that torch quantised: integers, and the scales and zero points of its slices along ``axis``.

    ``axis`` is -1 if there is one scale for all.
    """

    codes: Payload
    scales: tuple[float, ...]
    zeros: tuple[int, ...]
    axis: int


class Check(Protocol):
    """A function that raises ``ChangedError`` where a file of a checkpoint changed."""

    def __call__(self, *, by_path: bool = False) -> None:
        """Check the open files. With ``by_path``, also check that each path still names the same file."""
        ...


@dataclass(frozen=True, slots=True)
class Access:
    """The functions of a reader that reach the bytes of a checkpoint; the methods of ``Checkpoint`` call them."""

    payload: Callable[[TensorInfo], Payload]
    span: Callable[[TensorInfo], Payload | None] | None = None
    records: Callable[[], Iterable[Record]] | None = None
    check: Check | None = None
    close: Callable[[], None] | None = None
    affine: Callable[[TensorInfo], Affine | None] | None = None


class Checkpoint(Result, Mapping[str, TensorInfo], Closing):
    """An open checkpoint: a mapping from key to ``TensorInfo`` that reads bytes only on request.

    Close a Checkpoint, or use it as a context manager. A Checkpoint never changes: ``with_warnings`` and
    ``with_entries`` return a new Checkpoint that shares the open files.

    Example:
        >>> with ckptkit.open_checkpoint("fixtures/lenet_10class.pth") as checkpoint:
        ...     print(checkpoint["fc3.weight"], checkpoint.read("fc3.weight").dtype)
        F32 [10, 84] torch.float32
    """

    __slots__ = ("__weakref__", "_access", "_container", "_description", "_infos", "_model", "_nested", "_open_files")

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        access: Access,
        description: Description,
        *,
        nested: Nested | None = None,
        container: Container | None = None,
        model: Module | None = None,
    ) -> None:
        """Take over the open files of a reader; ``access`` has the functions of the reader."""
        self._model = model
        self._infos = infos
        self._access = access
        self._description = description
        self._nested = nested
        self._container = container
        self._open_files = ExitStack()  # shared with the Checkpoints that with_warnings and with_entries return
        if access.close is not None:
            self._open_files.callback(access.close)

    @property
    def path(self) -> str:
        """Return the path that was opened, or a name for a checkpoint in memory."""
        return self._description.path

    @property
    def format(self) -> str:
        """Return the name of the file format."""
        return self._description.format

    @property
    def files(self) -> Sequence[str]:
        """Return the paths of all files that hold a part of the checkpoint."""
        return self._description.files

    @property
    def envelope(self) -> str:
        """Return the dotted path of the selected mapping inside the file; empty for the whole file."""
        return self._description.envelope

    @property
    def is_selected(self) -> bool:
        """Return whether the path named the envelope, as ``run.pt::model`` does; else it was found by its content."""
        return self._description.is_selected

    @property
    def entries(self) -> Sequence[Entry]:
        """Return everything that is not a tensor of the mapping."""
        return self._description.entries

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the free text that the format stores as metadata."""
        return self._description.metadata

    @property
    def versions(self) -> Mapping[str, int]:
        """Return the module versions of the state_dict's ``_metadata``, by module prefix."""
        return self._description.versions

    @property
    def ambiguous(self) -> Mapping[str, str]:
        """Return the keys that ckptkit had to make up, each with its dotted name.

        A key is made up if several values have the same dotted name, or if a part of the name is not a string.
        """
        return self._description.ambiguous

    @property
    def warnings(self) -> Sequence[str]:
        """Return the warnings of the reader, as sentences."""
        return self._description.warnings

    @property
    def references(self) -> Sequence[str]:
        """Return the dotted names of the code that the file refers to; ckptkit never runs that code."""
        return self._description.references

    @property
    def suspicious(self) -> bool:
        """Return whether a name among ``references`` looks malicious."""
        return self._description.suspicious

    @property
    def configuration(self) -> Configuration | None:
        """Return the configuration of a live model of a library that has one, else None."""
        return self._description.configuration

    @property
    def torch_loading(self) -> TorchLoading | None:
        """Return what a file of ``torch.save`` needs of ``torch.load``; None for every other checkpoint."""
        return self._description.torch_loading

    @property
    def layers(self) -> Mapping[str, str]:
        """Return the kind of each layer of a live model, by the path of its module; empty for a file.

        The kinds are ``linear``, ``embedding``, ``convolution`` (without groups), ``transposed`` (a linear layer whose
        weight is ``[in, out]``, such as Conv1D of GPT-2) and ``other``.
        """
        return self._description.layers

    @property
    def nested(self) -> Nested | None:
        """Return the nested mapping of a torch file; None for every flat format."""
        return self._nested

    @property
    def model(self) -> Module | None:
        """Return the live model whose whole state_dict this is; None for a file or a mapping."""
        return self._model

    @property
    def container(self) -> Container | None:
        """Return the whole file if it holds more than the mapping of tensors, else None."""
        return self._container

    def with_warnings(self, *warnings: str) -> Checkpoint:
        """Return this checkpoint with more warnings; both share the open files.

        Example:
            >>> checkpoint = ckptkit.open_checkpoint("fixtures/lenet_10class.pth").with_warnings("trained on old data")
            >>> checkpoint.warnings[-1]
            'trained on old data'
        """
        return self._with(replace(self._description, warnings=(*self.warnings, *warnings)))

    def with_entries(self, *entries: Entry) -> Checkpoint:
        """Return this checkpoint with more entries; both share the open files.

        Example:
            >>> from ckptkit.core.checkpoint import Entry
            >>> checkpoint = ckptkit.open_checkpoint("fixtures/lenet_10class.pth")
            >>> checkpoint.with_entries(Entry("epoch", "int", 3)).entries[-1].value
            3
        """
        return self._with(replace(self._description, entries=(*self.entries, *entries)))

    def with_configuration(self, configuration: Configuration | None) -> Checkpoint:
        """Return this checkpoint with the configuration of a live model; both share the open files.

        Example:
            >>> checkpoint = ckptkit.open_checkpoint("fixtures/lenet_10class.pth")
            >>> checkpoint.with_configuration(None).configuration is None
            True
        """
        return self._with(replace(self._description, configuration=configuration))

    def without(self, keys: Collection[str]) -> Checkpoint:
        """Return this checkpoint without the tensors at ``keys``; both share the open files.

        Example:
            >>> checkpoint = ckptkit.open_checkpoint("fixtures/lenet_10class.pth")
            >>> len(checkpoint.without(["fc3.weight", "fc3.bias"]))
            8
        """
        left_out = set(require_strings(keys, "keys", "keys of the checkpoint"))
        return self._with(self._description, {key: info for key, info in self._infos.items() if key not in left_out})

    def with_as_entries(self, keys: Collection[str]) -> Checkpoint:
        """Return this checkpoint with the tensors at ``keys`` as entries; both share the open files.

        Example:
            >>> checkpoint = ckptkit.open_checkpoint("fixtures/lenet_10class.pth").with_as_entries(["fc3.bias"])
            >>> "fc3.bias" in checkpoint, checkpoint.entries[-1].path
            (False, 'fc3.bias')
        """
        moved = require_strings(keys, "keys", "keys of the checkpoint")
        return self.without(moved).with_entries(*(Entry(key, "tensor", str(self._infos[key])) for key in moved))

    def _with(self, description: Description, infos: Mapping[str, TensorInfo] | None = None) -> Checkpoint:
        other = Checkpoint(
            self._infos if infos is None else infos,
            replace(self._access, close=None),
            description,
            nested=self._nested,
            container=self._container,
            model=self._model if infos is None else None,
        )
        other._open_files = self._open_files
        return other

    def __getitem__(self, key: str) -> TensorInfo:
        """Return the description of one tensor."""
        return self._infos[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys in the order of the file."""
        return iter(self._infos)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._infos)

    def __bool__(self) -> bool:
        """Return whether the checkpoint has a tensor, as for every mapping."""
        return bool(self._infos)

    def __contains__(self, key: object) -> bool:
        """Return whether the checkpoint has a tensor with this key."""
        return key in self._infos

    def items(self) -> ItemsView[str, TensorInfo]:
        """Return keys and descriptions, as fast as a dict."""
        return self._infos.items()

    def values(self) -> ValuesView[TensorInfo]:
        """Return the descriptions, as fast as a dict."""
        return self._infos.values()

    def __repr__(self) -> str:
        """Return path, format and number of tensors, never the contents."""
        return f"<Checkpoint {self.path!r}: {self.format}, {len(self)} tensors>"

    def _info(self, key: str) -> TensorInfo:
        info = self._infos.get(key) if type(key) is str else None
        if info is None:
            require_type(key, str, "key", "a str")
            raise UnknownKeyError(key, self._infos)
        return info

    def payload(self, key: str) -> Payload:
        """Return the bytes of one tensor, not read yet.

        Example:
            >>> checkpoint = ckptkit.open_checkpoint("fixtures/lenet_10class.pth")
            >>> checkpoint.payload("fc3.bias").nbytes
            40
        """
        return self._access.payload(self._info(key))

    def span(self, key: str) -> Payload | None:
        """Return the stored bytes from the first to the last element of a view.

        A writer uses spans to write the shared bytes of two views only once. Return None for a conjugate or negative
        view and for a format without views: their values are only in ``payload``.

        Example:
            >>> checkpoint = ckptkit.open_checkpoint("fixtures/lenet_10class.pth")
            >>> checkpoint.span("fc3.bias").nbytes
            40
        """
        span = self._access.span
        return None if span is None else span(self._info(key))

    def records(self) -> Iterable[Record]:
        """Return all stored records in the order of the files, not read yet; none for a checkpoint in memory."""
        if self._access.records is not None:
            return self._access.records()
        stored = [info for info in self.values() if info.kind == "dense"] if self.files else []
        return (Record(self.path, info.key, self._access.payload(info), keys=(info.key,)) for info in stored)

    def read_bytes(self, key: str) -> bytes:
        """Return the contiguous little-endian bytes of one tensor.

        Example:
            >>> with ckptkit.open_checkpoint("fixtures/lenet_10class.pth") as checkpoint:
            ...     len(checkpoint.read_bytes("fc3.bias"))
            40
        """
        return b"".join(bytes(chunk) for chunk in self.payload(key).chunks())

    def read(self, key: str, *, rows: slice | None = None) -> Tensor:
        """Return one tensor on the CPU, in memory of its own, with the shape and dtype of ``self[key]``.

        ``rows`` is a slice along dim 0, without a step; bounds count as in Python. Where the tensor is stored
        contiguously, only these rows are read.

        Raises:
            KeyError: The checkpoint has no tensor ``key``.
            ArgumentError: This torch has no such dtype, or ``rows`` is not a slice of adjacent rows.
            FormatError: The bytes contradict the header, or the tensor is listed but cannot be read.
            ChangedError: The file became shorter since it was opened.

        Example:
            >>> import ckptkit
            >>> with ckptkit.open_checkpoint("fixtures/lenet_10class.pth") as checkpoint:
            ...     checkpoint.read("fc3.bias", rows=slice(-3, None)).shape
            torch.Size([3])
        """
        from ckptkit.core.checkpoint.reading import read_tensor

        return read_tensor(self._info(key), self._access.payload, rows)

    def numpy(self, key: str, *, rows: slice | None = None) -> npt.NDArray[Any]:
        """Return one tensor as a numpy array in memory of its own, without torch; ``rows`` as in ``read``.

        numpy itself has no bfloat16 and no float8. These are arrays of the dtypes of ``ml_dtypes``.

        Raises:
            KeyError: The checkpoint has no tensor ``key``.
            ArgumentError: numpy has no such dtype, or ``rows`` is not a slice of adjacent rows.
            FormatError: The bytes contradict the header, or the tensor is listed but cannot be read.
            ChangedError: The file became shorter since it was opened.

        Example:
            >>> import ckptkit
            >>> with ckptkit.open_checkpoint("fixtures/lenet_10class.pth") as checkpoint:
            ...     checkpoint.numpy("fc3.bias").dtype
            dtype('float32')
        """
        from ckptkit.core.checkpoint.reading import read_array

        return read_array(self._info(key), self._access.payload, rows)

    def state_dict(
        self,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
        keys: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Return the tensors as a state_dict, in the order of the file, for ``load_state_dict`` and ``torch.save``.

        ``device`` is the CPU unless given. ``dtype`` is a dtype of torch or its name. As with ``Module.to``, only
        floating-point tensors are cast, and a value that is too large becomes inf. Complex tensors keep their dtype.
        torch casts them: in ``float8_e4m3fn``, which has no inf, a value that is too large becomes 448, or NaN in older
        versions of torch.
        ``keys`` are the tensors to read, instead of all.

        Tensors of one dtype that overlap in the file share memory, as after ``torch.load``. Every other tensor has
        contiguous memory of its own, and so has a conjugate or negative view. Where the checkpoint has versions of
        modules, the result has them as ``_metadata``.

        Raises:
            KeyError: The checkpoint does not have one of ``keys``.
            ArgumentError: ``dtype`` is not a floating-point dtype, or this torch does not have the dtype of a tensor.
            FormatError: The bytes contradict the header, or a tensor is listed but cannot be read.
            ChangedError: A file became shorter since it was opened.

        Example:
            >>> import ckptkit, torch
            >>> with ckptkit.open_checkpoint("fixtures/lenet_10class.pth") as checkpoint:
            ...     state = checkpoint.state_dict(dtype=torch.bfloat16, keys=["fc3.weight", "fc3.bias"])
            >>> {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
            {'fc3.weight': (torch.bfloat16, (10, 84)), 'fc3.bias': (torch.bfloat16, (10,))}
        """
        from ckptkit.core.checkpoint.state_dict import cast_dtype, choose, read_state_dict, to_device, with_versions

        infos = choose(self._infos, keys)
        span = self._access.span or (lambda _: None)
        tensors = read_state_dict(infos, self._access.payload, span, to_device(device), cast_dtype(dtype))
        return with_versions(tensors, self.versions)

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` if a file changed on disk after it was opened.

        With ``by_path``, also raise it if another program replaced the file. The open file still has the old bytes.

        Example:
            >>> with ckptkit.open_checkpoint("fixtures/lenet_10class.pth") as checkpoint:
            ...     checkpoint.check_unchanged(by_path=True)
        """
        require_flags(by_path=by_path)
        if self._access.check is not None:
            self._access.check(by_path=by_path)

    def close(self) -> None:
        """Close the files; reading a tensor afterwards is an error."""
        self._open_files.close()


def affine_of(checkpoint: Checkpoint, key: str) -> Affine | None:
    """Return how torch quantised a tensor; None for any other tensor, and where the reader does not know."""
    access = checkpoint._access  # noqa: SLF001
    return None if access.affine is None else access.affine(checkpoint[key])


def as_selected(checkpoint: Checkpoint, key: str) -> Checkpoint:
    """Return the checkpoint that was opened with ``key`` after ``::``; ``is_selected`` if that is its envelope."""
    if not key or key != checkpoint.envelope:
        return checkpoint
    return checkpoint._with(replace(checkpoint._description, is_selected=True))  # noqa: SLF001


def replaced_tensors(
    checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], payload: Callable[[TensorInfo], Payload | None]
) -> Checkpoint:
    """Return a checkpoint with these tensors; both share the open files.

    ``payload`` returns the bytes of a tensor that the first checkpoint does not have, and None for every other.
    """
    access = checkpoint._access  # noqa: SLF001

    def any_payload(info: TensorInfo) -> Payload:
        return payload(info) or access.payload(info)

    def span(info: TensorInfo) -> Payload | None:
        return None if access.span is None or payload(info) is not None else access.span(info)

    other = Checkpoint(infos, replace(access, payload=any_payload, span=span, close=None), checkpoint._description)  # noqa: SLF001
    other._open_files = checkpoint._open_files  # noqa: SLF001
    return other


def module_versions(metadata: object) -> dict[str, int]:
    """Return the module versions in the ``_metadata`` of a state_dict, by module prefix; none if it is malformed."""
    table = metadata if isinstance(metadata, Mapping) else {}
    return {
        prefix: entry["version"]
        for prefix, entry in table.items()
        if isinstance(prefix, str)
        and isinstance(entry, Mapping)
        and type(entry.get("version")) is int
        and 0 <= entry["version"] < 2**31
    }
