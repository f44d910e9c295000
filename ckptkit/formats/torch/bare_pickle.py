"""Read a pickle of numpy arrays that no program of torch wrote, such as the files of detectron2's model zoo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, overload

from ckptkit.core.checkpoint import Checkpoint, Record
from ckptkit.core.files.payloads import Extent
from ckptkit.core.files.source import ByteSource
from ckptkit.core.text import plural
from ckptkit.errors import FormatError
from ckptkit.formats.foreign import unsupported_format
from ckptkit.formats.pickle.machine import parse_pickle
from ckptkit.formats.torch.checkpoint import TorchFile, build_file_checkpoint
from ckptkit.formats.torch.objects import ArrayRef, StorageRef, TorchObjects
from ckptkit.formats.torch.tree import leaves
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_bare_pickle"]

_WINDOW = 1 << 16
_LARGEST_TEXT = 256 << 20
_MOST_PLACES = 1_000_000
_MOST_OPERATIONS = 2_000_000  # a pickle takes about 40 for each array


class _FileBytes:
    """The bytes of a file for a parser, which are read in windows: the elements of arrays are never read."""

    def __init__(self, file: ByteSource) -> None:
        self._file = file
        self._start = 0
        self._window = b""
        self._left = _MOST_OPERATIONS

    def __len__(self) -> int:
        return self._file.size

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> bytes: ...

    def __getitem__(self, index: int | slice) -> int | bytes:
        if isinstance(index, int):
            self._left -= 1
            if self._left < 0:
                raise FormatError(f"a bare pickle of more than {_MOST_OPERATIONS:,} operations")
        start = index.start if isinstance(index, slice) else index
        stop = min(index.stop, self._file.size) if isinstance(index, slice) else index + 1
        if stop - start > _LARGEST_TEXT:
            raise FormatError(f"the pickle holds a text of more than {_LARGEST_TEXT:,} bytes")
        if start < self._start or stop > self._start + len(self._window):
            self._start = start
            length = min(max(_WINDOW, stop - start), self._file.size - start)
            self._window = self._file.read(start, length) if length > 0 else b""
        if isinstance(index, slice):
            return self._window[start - self._start : stop - self._start]
        return self._window[start - self._start]

    def find(self, part: bytes, start: int) -> int:
        found = self[start : start + _WINDOW].find(part)
        return found if found < 0 else start + found


def open_bare_pickle(file: ByteSource, head: bytes, selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint of a pickle with numpy arrays; the Checkpoint closes the file.

    ``head`` is the beginning of the file. Raises ``FormatError`` for a pickle that is damaged or holds no array.
    """
    objects = TorchObjects(_refuse_persistent)
    objects.interpreter.keep_bytes = lambda start, count: Extent(file, start, count)
    try:
        tree, end = parse_pickle(_FileBytes(file), objects.interpreter)
        places = leaves(tree, [_MOST_PLACES])
        has_array = any(isinstance(leaf, ArrayRef) and leaf.storage is not None for _, leaf in places)
    except FormatError:
        if any(name.startswith("numpy.") for name in objects.interpreter.references):
            raise
        has_array = False
    if not has_array:
        raise unsupported_format(file, head)

    def locate(_: StorageRef) -> NoReturn:
        raise FormatError("a tensor of torch in a pickle that torch.save did not write")

    def records(keys: Mapping[str, Sequence[str]]) -> Iterator[Record]:
        names = tuple(name for named in keys.values() for name in named)
        yield Record(file.path, "the pickle", Extent(file, 0, end), keys=names)

    after = file.size - end
    warnings = (f"not read: {plural(after, 'byte')} after the pickle",) if after else ()
    return build_file_checkpoint(
        TorchFile(tree, objects, file.size, locate, records, warnings), file, "pickle", selection
    )


def _refuse_persistent(_: object) -> NoReturn:
    raise FormatError("corrupt pickle: an unexpected persistent id")
