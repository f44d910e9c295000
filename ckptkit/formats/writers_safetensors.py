"""Write safetensors: the header first, since every size is known, then the bytes, in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.core.checkpoint import DTYPES, Payload, TensorInfo
from ckptkit.core.files import Extent
from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.formats.atomic import AtomicFile
from ckptkit.formats.safetensors import LARGEST_HEADER, METADATA

__all__ = ["SafetensorsLayout", "layout_safetensors", "merge_extents", "refuse_unstorable", "write_safetensors"]

_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """A file before it is written: the header's bytes, and the tensors in the order of their data."""

    header: bytes
    infos: tuple[TensorInfo, ...]
    nbytes: int


def layout_safetensors(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> SafetensorsLayout:
    """Return the layout of a file with these tensors; order is kept unless alignment needs another.

    Raises ``PlanError`` for a dtype that the format has no code for, a name that is not Unicode text or
    is ``__metadata__``, and a header above the format's limit of 100 MB.
    """
    order = list(infos)
    refuse_unstorable(order)
    if not _aligned(order):
        order.sort(key=lambda info: -DTYPES[info.dtype].bits)
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for info in order:
        end = offset + info.nbytes
        header[info.key] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (offset, end)}
        offset = end
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        odd = error.object[error.start]
        name = next((info.key for info in order if odd in info.key), odd)
        raise PlanError(
            f"a name is not Unicode text: {quoted(name)}", hint="give it another with --rename, or write a .pt file"
        ) from None
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > LARGEST_HEADER:
        raise PlanError(f"the header would have {len(text):,} bytes, more than safetensors allows", hint="write shards")
    return SafetensorsLayout(len(text).to_bytes(8, "little") + text, tuple(order), len(text) + 8 + offset)


def refuse_unstorable(infos: Iterable[TensorInfo]) -> None:
    """Raise ``PlanError`` for a dtype that the format has no code for, and for the name it keeps for itself."""
    for info in infos:
        if info.key == METADATA:
            raise PlanError(f"a tensor is called '{METADATA}', which safetensors keeps for itself", hint="rename it")
        dtype = DTYPES.get(info.dtype)
        if dtype is None or not dtype.storable:
            raise PlanError(
                f"{quoted(info.key)} would be {info.dtype}, which safetensors cannot store",
                hint="write a .pt file, or leave it out of the input: ckpt remap with --drop",
            )


def _aligned(infos: Sequence[TensorInfo]) -> bool:
    offset = 0
    for info in infos:
        if offset * 8 % max(DTYPES[info.dtype].bits, 8):
            return False
        offset += info.nbytes
    return True


def write_safetensors(layout: SafetensorsLayout, payloads: Mapping[str, Payload], out: AtomicFile) -> Iterator[int]:
    """Write tensors and header into ``out``; yield the bytes of each step."""
    offset = len(layout.header)
    for payload in merge_extents(payloads[info.key] for info in layout.infos):
        yield from out.copy(payload, offset)
        offset += payload.nbytes
    # Last, so that what a killed process leaves behind is no checkpoint of zeros.
    out.write(layout.header, 0)


def merge_extents(payloads: Iterable[Payload]) -> Iterator[Payload]:
    """Join neighbours that lie next to each other in one file, so that the kernel copies them in one call."""
    pending: Extent | None = None
    for payload in payloads:
        if not isinstance(payload, Extent):
            if pending is not None:
                yield pending
                pending = None
            yield payload
        elif pending is not None and _adjoins(pending, payload):
            pending = Extent(pending.file, pending.offset, pending.nbytes + payload.nbytes)
        else:
            if pending is not None:
                yield pending
            pending = payload
    if pending is not None:
        yield pending


def _adjoins(first: Extent, second: Extent) -> bool:
    return first.file is second.file and first.offset + first.nbytes == second.offset
