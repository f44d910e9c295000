"""What changed from one checkpoint to another, tensor by tensor, and what a patch needs to say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.files.places import size_at
from ckptkit.core.result import Result
from ckptkit.core.result.summary import totals
from ckptkit.core.text import human_bytes, percent, plural
from ckptkit.deltas.patch import Patch, Side, packed_key
from ckptkit.deltas.patch_file import read_patch

__all__ = ["STATES", "Delta", "DeltaSide", "State", "TensorDelta", "delta_of_patch", "make_result"]

State: TypeAlias = Literal["equal", "renamed", "changed", "replaced", "new"]
STATES: Final[tuple[State, ...]] = ("equal", "renamed", "changed", "replaced", "new")


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """What happened to one tensor of the result.

    Attributes:
        info: Its key, dtype and shape in the result.
        state: ``equal``; ``renamed``, with equal bytes; ``changed``; ``replaced``, by another dtype or shape; ``new``.
        base_key: The key in the base, if the base has the tensor.
        was: The tensor of the base where that has another dtype or shape, else None.
        tied_to: The first key of the same tied tensor of the result, for which it is packed; else empty.
        packed: The bytes that the patch has of it.
    """

    info: TensorInfo
    state: State
    base_key: str
    was: TensorInfo | None
    tied_to: str
    packed: int


@dataclass(frozen=True, slots=True)
class DeltaSide:
    """The base or the result: a name, the totals, and the digest of all contents, as ``ckpt digest`` prints it.

    A patch does not record the name of its result.
    """

    name: str
    tensors: int
    elements: int
    nbytes: int
    contents: str


@dataclass(frozen=True, slots=True, repr=False)
class Delta(Result):
    """What a patch holds, or would hold: the state and the packed bytes of each tensor.

    Attributes:
        base: The checkpoint that the patch is applied to.
        new: The checkpoint that the patch makes of it.
        tensors: The tensors of ``new``, in its order.
        dropped: The tensors of the base that ``new`` does not have.
        compression: ``"zlib"`` or ``"zstd"``.
        nbytes: The size of the patch in bytes.
        path: Where the patch is; empty if nothing was written.
        metadata: The metadata of ``new``.
        left_out: Entries of ``new`` that are not tensors, and that the patch does not hold.
        library: What wrote the patch, such as ``"ckptkit 0.2.0"``.
        notes: What a user should know beside this.

    Example:
        >>> import ckptkit
        >>> delta = ckptkit.make_delta("fixtures/lenet_10class.pth", "fixtures/lenet_tuned.safetensors")
        >>> delta.counts["equal"], delta.counts["changed"]
        (4, 6)
    """

    base: DeltaSide
    new: DeltaSide
    tensors: tuple[TensorDelta, ...]
    dropped: tuple[TensorInfo, ...]
    compression: str
    nbytes: int
    path: str
    metadata: Mapping[str, str]
    left_out: tuple[str, ...] = ()
    library: str = ""
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[State, int]:
        """The number of tensors in each state."""
        counts = dict.fromkeys(STATES, 0)
        for tensor in self.tensors:
            counts[tensor.state] += 1
        return counts

    @property
    def share(self) -> float:
        """The size of the patch as a share of the bytes of the tensors of ``new``; 0 where these have no bytes."""
        return self.nbytes / self.new.nbytes if self.new.nbytes else 0.0

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        counts = self.counts
        changed = len(self.tensors) - counts["equal"] - counts["renamed"]
        size = f"{human_bytes(self.nbytes)}, {percent(self.share)} of {human_bytes(self.new.nbytes)}"
        return f"{changed:,} of {plural(len(self.tensors), 'tensor')} packed, {size}"


def make_result(
    patch: Patch,
    packed: Mapping[str, int],
    nbytes: int,
    path: str,
    *,
    new_name: str = "",
    left_out: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Delta:
    """Return the result for a patch of ``nbytes`` bytes; ``packed`` has the packed bytes of each key that has some."""
    base, result = patch.base, patch.result
    first_of_tie = {key: keys[0] for keys in patch.ties for key in keys[1:]}
    tensors = []
    for key, info in result.infos.items():
        base_key = patch.renamed.get(key, key if key in base.infos else None)
        state = _state(patch, key, base_key)
        was = base.infos[base_key] if base_key is not None and state == "replaced" else None
        tensors.append(TensorDelta(info, state, base_key or "", was, first_of_tie.get(key, ""), packed.get(key, 0)))
    moved = set(patch.renamed.values())
    return Delta(
        _side(base, patch.base_name),
        _side(result, new_name),
        tuple(tensors),
        tuple(info for key, info in base.infos.items() if key not in result.infos and key not in moved),
        patch.compression,
        nbytes,
        path,
        patch.metadata,
        tuple(left_out),
        patch.library,
        tuple(notes),
    )


def _state(patch: Patch, key: str, base_key: str | None) -> State:
    if base_key is None:
        return "new"
    info, old = patch.result.infos[key], patch.base.infos[base_key]
    if (info.dtype, info.shape) != (old.dtype, old.shape):
        return "replaced"
    if patch.result.digests[key] != patch.base.digests[base_key]:
        return "changed"
    return "equal" if base_key == key else "renamed"


def delta_of_patch(checkpoint: Checkpoint) -> Delta:
    """Return what the file of a patch says; only its index is read. Raises what ``read_patch`` raises."""
    patch = read_patch(checkpoint)
    packed = {key: checkpoint[packed_key(key)].nbytes for key in patch.packed if packed_key(key) in checkpoint}
    nbytes = sum(map(size_at, checkpoint.files))
    return make_result(patch, packed, nbytes, checkpoint.path)


def _side(side: Side, name: str) -> DeltaSide:
    return DeltaSide(name, *totals(side.infos.values()), side.contents)
