"""Find which piece of a tensor a DTensor holds. A pickle stores the local tensor, the device mesh and the placements.

``Shard(dim)`` cuts a tensor as ``torch.chunk`` does, one mesh dimension after the other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

from ckptkit.core.checkpoint import row_major
from ckptkit.core.text import listed, quoted
from ckptkit.errors import FormatError
from ckptkit.formats.layout import Box
from ckptkit.formats.pickle.values import CodeName, Placeholder
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.sharded_tensor import SHARDED

__all__ = [
    "DTENSOR",
    "DTensorLayout",
    "Mesh",
    "describe_pieces",
    "piece_of",
    "ranks_without_copies",
    "read_layout",
    "whole_tensor",
]

DTENSOR: Final = "dtensor"  # the kind of a tensor if the file holds only a piece
_MOST_RANKS = 1 << 16
_MOST_MESH_DIMENSIONS = 16
_MOST_CUT_DIMENSIONS = 64  # of a tensor


class _Placement(NamedTuple):
    """How one mesh dimension places a tensor: the class of torch, and its numbers."""

    name: str
    dim: int = -1
    factor: int = 1


@dataclass(frozen=True, slots=True)
class Mesh:
    """The device mesh of a DTensor: its shape, its ranks in row-major order, and the rank that saved the file."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    own: int | None  # None where the file does not say

    def coordinates(self) -> list[tuple[int, ...]]:
        """Return the coordinates of each rank, in the order of ``ranks``."""
        return list(product(*map(range, self.shape)))


@dataclass(frozen=True, slots=True)
class DTensorLayout:
    """The shape of a whole tensor, the mesh, and for each dimension of the tensor the mesh dimensions that cut it."""

    shape: tuple[int, ...]
    mesh: Mesh
    cuts: tuple[tuple[int, ...], ...]


def whole_tensor(tensor: TensorRef) -> TensorRef:
    """Return the local tensor of a DTensor that is not cut; return any other tensor itself."""
    if tensor.kind != DTENSOR or tensor.local is None:
        return tensor
    try:
        shape = _mesh_shape(_state(tensor.spec).get("mesh"))
        cuts = _read_cuts(tensor, shape)
    except FormatError:
        return tensor
    is_whole = all(shape[mesh_dim] == 1 for found in cuts for mesh_dim in found)
    return tensor.local if is_whole and tensor.local.shape == tensor.shape else tensor


def describe_pieces(tensors: Mapping[str, TensorRef]) -> str | None:
    """Return a sentence about the DTensors and ShardedTensors that the file holds in part, or None."""
    pieces = [key for key, tensor in tensors.items() if tensor.kind in (DTENSOR, SHARDED)]
    if not pieces:
        return None
    whose = "one rank"
    with contextlib.suppress(FormatError):
        mesh = _read_mesh(_state(tensors[pieces[0]].spec).get("mesh"), -1)
        whose = f"rank {mesh.own} of {len(mesh.ranks):,}" if mesh.own is not None else whose
    return (
        f"{listed(pieces, 1)} {'are' if pieces[1:] else 'is'} split among ranks: the file holds the pieces of {whose}"
    )


def piece_of(layout: DTensorLayout, coordinate: Sequence[int]) -> Box:
    """Return the piece of the tensor that the rank at this coordinate of the mesh holds."""
    offsets, sizes = [], []
    for size, cuts in zip(layout.shape, layout.cuts, strict=True):
        start, length = 0, size
        for mesh_dim in cuts:
            chunk = -(-length // layout.mesh.shape[mesh_dim])
            skipped = min(chunk * coordinate[mesh_dim], length)
            start, length = start + skipped, min(chunk, length - skipped)
        offsets.append(start)
        sizes.append(length)
    return Box(tuple(offsets), tuple(sizes))


def ranks_without_copies(layout: DTensorLayout) -> list[tuple[int, tuple[int, ...]]]:
    """Return the ranks that hold the tensor once, each with its coordinate: of equal copies, the first."""
    cutting = {mesh_dim for cuts in layout.cuts for mesh_dim in cuts}
    return [
        (rank, coordinate)
        for rank, coordinate in zip(layout.mesh.ranks, layout.mesh.coordinates(), strict=True)
        if all(at == 0 or mesh_dim in cutting for mesh_dim, at in enumerate(coordinate))
    ]


def read_layout(tensor: TensorRef, rank: int, meshes: dict[int, Mesh]) -> DTensorLayout:
    """Return the layout of a DTensor that ``rank`` saved; ``meshes`` keeps each mesh of a file that was read.

    Raises ``FormatError`` for a placement or a mesh that is not read.
    """
    value = _state(tensor.spec).get("mesh")
    if id(value) not in meshes:
        meshes[id(value)] = _read_mesh(value, rank)
    mesh = meshes[id(value)]
    return DTensorLayout(tensor.shape, mesh, _read_cuts(tensor, mesh.shape))


def _read_cuts(tensor: TensorRef, mesh: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    spec = _state(tensor.spec)
    placements = [_read_placement(value) for value in _items(spec.get("placements"))[:_MOST_MESH_DIMENSIONS]]
    if len(placements) != len(mesh):
        raise FormatError(f"{len(placements)} placements for a mesh of {len(mesh)} dimensions")
    cuts: list[list[int]] = [[] for _ in tensor.shape]
    for mesh_dim, placement in enumerate(placements):
        if placement.name == "Replicate":
            continue
        if placement.name not in ("Shard", "_StridedShard"):
            raise FormatError(f"the placement {quoted(placement.name)}, which is not read")
        dim = placement.dim + len(tensor.shape) if placement.dim < 0 else placement.dim
        if not 0 <= dim < len(tensor.shape):
            raise FormatError(f"a placement cuts dimension {placement.dim} of {len(tensor.shape)}")
        cuts[dim].append(mesh_dim)
    ordered = tuple(_order_of_cuts(found, placements, mesh) for found in cuts)
    _check_order(spec, ordered, placements)
    return ordered


def _order_of_cuts(found: Sequence[int], placements: Sequence[_Placement], mesh: Sequence[int]) -> tuple[int, ...]:
    """Return the mesh dimensions that cut one dimension of a tensor, in the order of the cuts."""
    strided = [mesh_dim for mesh_dim in found if placements[mesh_dim].name == "_StridedShard"]
    if not strided or all(mesh[mesh_dim] == 1 for mesh_dim in found):
        return tuple(found)
    # FSDP2 after tensor parallelism: the second mesh dimension cuts first, and the first cuts the pieces.
    if len(found) == 2 and strided == [found[0]] and placements[found[0]].factor == mesh[found[1]]:
        return found[1], found[0]
    raise FormatError("the placement '_StridedShard' in an order that is not read")


def _check_order(
    spec: Mapping[object, object], cuts: Sequence[tuple[int, ...]], placements: Sequence[_Placement]
) -> None:
    """Raise ``FormatError`` where the spec states another order of the cuts than its placements."""
    if any(placement.name == "_StridedShard" for placement in placements):
        return
    for entry in _items(spec.get("shard_order"))[:_MOST_CUT_DIMENSIONS]:
        numbers = entry.args if isinstance(entry, Placeholder) else entry
        if isinstance(numbers, tuple) and len(numbers) == 2 and type(numbers[0]) is int:
            dim, order = numbers[0], _items(numbers[1])
            if 0 <= dim < len(cuts) and tuple(order[:_MOST_MESH_DIMENSIONS]) != cuts[dim]:
                raise FormatError(f"dimension {dim} cut in another order than its placements, which is not read")


def _state(value: object) -> Mapping[object, object]:
    state = value.state if isinstance(value, Placeholder) else None
    return state if isinstance(state, Mapping) else {}


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()


def _integers(value: object, most: int = _MOST_MESH_DIMENSIONS) -> tuple[int, ...] | None:
    """Return up to ``most`` integers of a list, which can be nested once; None for anything else."""
    if type(value) is int:
        return (value,)
    if not isinstance(value, list | tuple) or len(value) > most:
        return None
    flat: list[object] = []
    for item in value:
        flat.extend(item if isinstance(item, list | tuple) else (item,))
        if len(flat) > most:
            return None
    numbers = tuple(number for number in flat if type(number) is int and 0 <= number < _MOST_RANKS)
    return numbers if len(numbers) == len(flat) else None


def _read_placement(value: object) -> _Placement:
    name = value.factory.name if isinstance(value, Placeholder) and isinstance(value.factory, CodeName) else "unknown"
    state = _state(value)
    args = _integers(value.args) if isinstance(value, Placeholder) else None
    dim = state.get("dim", args[0] if args else -1)
    factor = state.get("split_factor", args[1] if args and len(args) > 1 else 1)
    if type(dim) is not int or type(factor) is not int:
        raise FormatError(f"the placement {quoted(name)} without a dimension")
    return _Placement(name, dim, factor)


def _mesh_shape(value: object) -> tuple[int, ...]:
    state = _state(value)
    tensor = state.get("mesh")  # before torch 2.10, the mesh was a tensor
    if isinstance(tensor, TensorRef):
        return tensor.shape
    return tuple(math.prod(axis.sizes) for axis in _axes(state.get("_layout")))


def _read_mesh(value: object, rank: int) -> Mesh:
    """Return a mesh, with the rank that saved it where the mesh says so."""
    state = _state(value)
    shape = _mesh_shape(value)
    has_tensor = isinstance(state.get("mesh"), TensorRef)
    ranks = _integers(state.get("_flatten_mesh_list" if has_tensor else "_flatten_rank_map"), _MOST_RANKS)
    if not ranks or not 0 < len(shape) <= _MOST_MESH_DIMENSIONS or not 0 < math.prod(shape) <= len(ranks):
        raise FormatError("a device mesh without its ranks, which is not read")
    own = state.get("_rank")
    if type(own) is not int:
        own = None
    if has_tensor:
        ranks = ranks if math.prod(shape) == len(ranks) else ()
    else:
        ranks = _ranks_of_slice(_axes(state.get("_layout")), ranks, rank if own is None else own)
    if not ranks or len(set(ranks)) != len(ranks):
        raise FormatError("a device mesh that names a rank twice, or no rank")
    coordinate = _integers(state.get("_coordinate_on_dim"))
    if own is None and coordinate is not None and len(coordinate) == len(shape):
        at = sum(index * step for index, step in zip(coordinate, row_major(shape), strict=True))
        own = ranks[at] if at < len(ranks) else None
    return Mesh(shape, ranks, own)


class _Axis(NamedTuple):
    """One mesh dimension: sizes and strides in the list of ranks; several where dimensions were flattened."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def positions(self) -> list[int]:
        return [
            sum(at * step for at, step in zip(index, self.strides, strict=True))
            for index in product(*map(range, self.sizes))
        ]


def _axes(layout: object) -> list[_Axis]:
    """Return the axes of a ``_MeshLayout`` of torch: a list of axes, or a shape and strides."""
    state = _state(layout)
    if "axes" in state:
        pairs = [
            (axis.get("shape"), axis.get("stride"))
            for axis in map(_state, _items(state["axes"])[: _MOST_MESH_DIMENSIONS + 1])
        ]
    else:
        args = _items(layout.args) if isinstance(layout, Placeholder) else ()
        shape, stride = args if len(args) == 2 else (state.get("shape"), state.get("stride"))
        shapes, strides = ((x,) if type(x) is int else _items(x)[: _MOST_MESH_DIMENSIONS + 1] for x in (shape, stride))
        pairs = list(zip(shapes, strides, strict=False)) if len(shapes) == len(strides) else []
    axes: list[_Axis] = []
    for shape, stride in pairs:
        sizes, steps = _integers(shape), _integers(stride)
        if sizes is None or steps is None or len(sizes) != len(steps):
            raise FormatError("a device mesh of an unknown layout, which is not read")
        axes.append(_Axis(sizes, steps))
    if (
        not 0 < len(axes) <= _MOST_MESH_DIMENSIONS
        or math.prod(size for axis in axes for size in axis.sizes) > _MOST_RANKS
    ):
        raise FormatError("a device mesh of an unknown layout, which is not read")
    return axes


def _ranks_of_slice(axes: Sequence[_Axis], ranks: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return the ranks of the mesh that holds ``rank``: a slice of a mesh exists several times, with other ranks."""
    is_slice = math.prod(size for axis in axes for size in axis.sizes) < len(ranks)
    if is_slice and rank not in ranks:
        raise FormatError(f"a device mesh without rank {rank}, which saved it")
    at = ranks.index(rank) if is_slice else 0
    steps = [(size, step) for axis in axes for size, step in zip(axis.sizes, axis.strides, strict=True) if step]
    origin = at - sum(at // step % size * step for size, step in steps)
    places = [origin + sum(offsets) for offsets in product(*(axis.positions() for axis in axes))]
    if min(places) < 0 or max(places) >= len(ranks):
        raise FormatError("a device mesh that reaches outside its ranks")
    return tuple(ranks[place] for place in places)
