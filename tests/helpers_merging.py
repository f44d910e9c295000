"""Merge arrays with a method, as a step of a plan does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.checkpoint.payload import HeldBytes
from ckptkit.plans.methods.operation import Merge
from ckptkit.plans.methods.table import method_named
from ckptkit.values.arrays import array_of, numpy_dtype
from ckptkit.values.merging.payload import MergedPayload, MergeInput
from ckptkit.values.workers import Workers

Array = npt.NDArray[Any]


def merge_payload(
    method: str,
    tensors: Sequence[Array],
    given: Mapping[str, object] | None = None,
    *,
    base: bool = False,
    codes: Sequence[str] | str = "F32",
    out: str = "",
    key: str = "w",
    losses: dict[str, CastLoss] | None = None,
    workers: Workers | None = None,
    **options: Any,
) -> MergedPayload:
    """Return the merge of tensors that are stored with these dtypes; with ``base``, the first is the base."""
    count = len(tensors) - base
    merge = Merge(
        method_named(method).of(count, given or {}, has_base=base), key, tuple(range(1, count + 1)), base, **options
    )
    of_each = [codes] * len(tensors) if isinstance(codes, str) else codes
    infos = [TensorInfo(key, code, np.shape(tensor)) for tensor, code in zip(tensors, of_each, strict=True)]
    merge.dtypes([info.dtype for info in infos])
    stored = [
        bytearray(np.asarray(tensor).astype(numpy_dtype(info.dtype)).tobytes())
        for tensor, info in zip(tensors, infos, strict=True)
    ]
    inputs = [
        MergeInput(f"input {number}", info, HeldBytes(data))
        for number, (info, data) in enumerate(zip(infos, stored, strict=True))
    ]
    shape = merge.shapes([info.shape for info in infos])[0]
    return merge.payload(inputs, TensorInfo(key, out or infos[0].dtype, shape), losses, workers=workers)


def merge_arrays(
    method: str, tensors: Sequence[Array], given: Mapping[str, object] | None = None, **rest: Any
) -> Array:
    """Return the merged tensor, with its own dtype; see ``merge_payload``."""
    return read(merge_payload(method, tensors, given, **rest))


def read(payload: MergedPayload) -> Array:
    """Return the tensor that a payload computes."""
    data = bytearray(payload.nbytes)
    payload.readinto(memoryview(data))
    return array_of(data, payload.out.dtype).reshape(payload.out.shape)
