"""A snapshot of the tensors of a live model, to compare the model with and to restore it."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint.reading import torch_bytes
from ckptkit.core.closing import Closing
from ckptkit.core.text import first_line, human_bytes, quoted
from ckptkit.core.torch_bridge import TensorPayload
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import ModelError
from ckptkit.loading.regions import held_memory
from ckptkit.loading.watch import Watch

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["Snapshot"]

_IN_MEMORY = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Saved:
    name: str
    tensor: Tensor
    memory: Tensor  # a second view of the memory of the tensor
    offset: int
    nbytes: int


class _Memory(io.RawIOBase):
    """Memory of fixed size that is written and read like a file; one that grows would be copied several times."""

    def __init__(self, size: int) -> None:
        self._at = 0
        self._owner = torch_bytes(size, self._take)  # has huge pages where it is large

    def _take(self, memory: memoryview) -> None:
        self._memory = memory

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        assert whence == io.SEEK_SET  # noqa: S101 - a snapshot knows where each copy is
        self._at = offset
        return offset

    def write(self, data: ReadableBuffer, /) -> int:
        count = memoryview(data).nbytes
        self._memory[self._at : self._at + count] = data
        self._at += count
        return count

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer)
        target[:] = self._memory[self._at : self._at + target.nbytes]
        self._at += target.nbytes
        return target.nbytes


class Snapshot(Watch, Closing):
    """A copy of every parameter and buffer of a model, and of the extra states at the keys ``extra_states``.

    Close the snapshot, or use it as a context manager.

    Up to 256 MB are stored in memory, more in a temporary file without a name. Tensors without plain bytes (sparse,
    quantized, subclasses, on the meta device) are neither compared nor restored.
    """

    def __init__(self, model: Module, extra_states: Iterable[str] = ()) -> None:
        """Copy all tensors of ``model``; raise ``ModelError`` where there is no space, or a state cannot be copied."""
        super().__init__(model)
        self._extra_states = [
            (key, module, _copied_extra_state(key, module))
            for key in extra_states
            for module in [model.get_submodule(key.rpartition(".")[0])]
        ]
        self._slots: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (slots, dict(slots))
            for module in model.modules()
            for slots in (module._parameters, module._buffers, module._modules)  # noqa: SLF001 - hooks may replace their values
        ]
        self._saved: dict[int, _Saved] = {}
        self._buffer = bytearray()
        size = self._describe()
        try:
            self._file: _Memory | io.BufferedRandom = (
                _Memory(size) if size <= _IN_MEMORY else tempfile.TemporaryFile()  # noqa: SIM115 - closed with the snapshot
            )
            self._save()
        except OSError as error:
            raise ModelError(
                f"there is no space for a copy of the model: {(error.strerror or str(error)).lower()}",
                hint=f"set TMPDIR to a directory with {human_bytes(size)} free",
            ) from error

    def _describe(self) -> int:
        """Decide where the copy of each tensor is, and return the size of all copies."""
        offset = 0
        for name, tensor in self.tensors.items():
            held = held_memory(tensor)
            if id(tensor) not in self._saved and held is not None:
                nbytes = held.numel() * held.element_size()
                self._saved[id(tensor)] = _Saved(name, held, held.detach(), offset, nbytes)
                offset += nbytes
        return offset

    def _save(self) -> None:
        try:
            for saved in self._saved.values():
                for chunk in TensorPayload(saved.tensor, saved.nbytes).chunks():
                    self._file.write(chunk)
            self._file.flush()
        except BaseException:
            self._file.close()
            raise

    @property
    def not_compared(self) -> tuple[str, ...]:
        """Names of the tensors that were not copied."""
        return tuple(name for name, tensor in self.tensors.items() if id(tensor) not in self._saved)

    def is_unchanged(self, name: str) -> bool:
        """Return whether a tensor has the same bits as the snapshot; true for a tensor that was not copied."""
        saved = self._saved.get(id(self.tensors[name]))
        return saved is None or self._is_unchanged(saved)

    def _is_unchanged(self, saved: _Saved) -> bool:
        tensor = saved.tensor
        if tensor.dtype != saved.memory.dtype or tensor.shape != saved.memory.shape:
            return False
        self._file.seek(saved.offset)
        return all(self._next_is(chunk) for chunk in TensorPayload(tensor, saved.nbytes).chunks())

    def _next_is(self, chunk: memoryview) -> bool:
        self._buffer.extend(bytes(max(len(chunk) - len(self._buffer), 0)))
        self._file.readinto(memoryview(self._buffer)[: len(chunk)])
        return self._buffer.startswith(chunk)

    def restore(self) -> list[str]:
        """Restore the objects and bits of all tensors; return the names of tensors that cannot be restored."""
        import torch

        for slots, before in self._slots:
            slots.clear()
            slots.update(before)
        failed = []
        for saved in self._saved.values():
            if not saved.tensor.is_set_to(saved.memory):
                saved.tensor.data = saved.memory
            if self._is_unchanged(saved):
                continue
            self._file.seek(saved.offset)
            buffer = bytearray(self._file.read(saved.nbytes) or b"")
            value = torch.frombuffer(buffer, dtype=torch.uint8).view(saved.memory.dtype).reshape(saved.memory.shape)
            try:
                with torch.inference_mode(saved.tensor.is_inference()), torch.no_grad():
                    saved.tensor.copy_(value)
            except RuntimeError:
                failed.append(saved.name)
        for key, module, state in self._extra_states:
            try:
                module.set_extra_state(state)
            except Exception:  # noqa: BLE001 - the method is code of the user
                failed.append(key)
        # A tensor can share memory with a tensor that was restored later, so every tensor is checked again.
        return failed + [
            saved.name for saved in self._saved.values() if saved.name not in failed and not self._is_unchanged(saved)
        ]

    def close(self) -> None:
        """Free the memory or the temporary file."""
        self._file.close()


def _copied_extra_state(key: str, module: Module) -> object:
    try:
        return copy.deepcopy(module.get_extra_state())
    except Exception as error:  # the state is made by code of the user
        raise ModelError(
            f"{quoted(key)} cannot be copied, so it could not be restored: {first_line(error)}",
            hint="load without rollback=True",
        ) from error
