"""Query, key and value: fused into one projection, and taken apart; weights and biases, with grouped queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.core.text import quoted
from ckptkit.tensor_ops.operation import Moving, Shape, unflatten
from ckptkit.tensor_ops.parameters import Int, Text

if TYPE_CHECKING:
    import torch

__all__ = ["FuseQkv", "SplitQkv"]


@dataclass(frozen=True, slots=True)
class _Qkv(Moving):
    """Where the rows of a fused projection lie.

    ``layout`` is ``concat`` (all queries, then all keys, then all values) or ``interleaved`` (for each key-value head
    its queries, its key, its value; with as many key-value heads as heads that is q, k, v of each head in turn).
    ``kv_heads`` is ``heads`` where not given. ``head_dim`` need not be given: it follows from the shape.
    ``dim`` is 0 for torch's Linear; 1 for a Conv1D weight as in GPT-2; -1 serves its weight and its bias.
    """

    heads: Int
    kv_heads: Int | None = None
    head_dim: Int | None = None
    layout: Text = "concat"
    dim: Int = 0

    def __post_init__(self) -> None:
        """Refuse heads that cannot share their keys evenly, and an unknown layout."""
        if self.layout not in ("concat", "interleaved"):
            raise self.refusal(f"layout is {quoted(self.layout)}", "it is concat or interleaved")
        if self.heads < 1 or self.groups < 1 or self.heads % self.groups:
            raise self.refusal(f"{self.heads} heads do not share {self.groups} key-value heads evenly")
        if self.head_dim is not None and self.head_dim < 1:
            raise self.refusal(f"a head is not {self.head_dim} rows")

    @property
    def groups(self) -> int:
        """Number of key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def counts(self) -> tuple[int, int, int]:
        """Return the number of heads in query, key and value."""
        return self.heads, self.groups, self.groups

    def head_size(self, shape: Shape, dim: int, heads: int) -> int:
        """Return the rows of a head; raises ``RuleError`` where the size of ``dim`` is not that many heads."""
        size = shape[dim] // heads
        if size * heads != shape[dim] or self.head_dim not in (None, size):
            each = "" if self.head_dim is None else f" of {self.head_dim}"
            raise self.refusal(f"dim {self.dim} of {list(shape)} is not {heads} heads{each}")
        return size


@dataclass(frozen=True, slots=True)
class SplitQkv(_Qkv):
    """A fused projection taken apart into query, key and value."""

    name: ClassVar[str] = "split_qkv"

    @property
    def outputs(self) -> int:
        """Query, key and value."""
        return 3

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of query, key and value."""
        shape = self.only(inputs)
        dim = self.axis(self.dim, shape)
        size = self.head_size(shape, dim, sum(self.counts()))
        return tuple((*shape[:dim], size * count, *shape[dim + 1 :]) for count in self.counts())

    def move(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Take apart."""
        import torch

        (tensor,) = tensors
        dim = self.dim % tensor.dim()
        size = tensor.shape[dim] // sum(self.counts())
        if self.layout == "concat":
            return torch.split(tensor, [size * count for count in self.counts()], dim)
        share = self.heads // self.groups
        grouped = unflatten(tensor, dim, (self.groups, share + 2, size))
        return [part.flatten(dim, dim + 2) for part in torch.split(grouped, [share, 1, 1], dim + 1)]

    def inverse(self, inputs: Sequence[Shape]) -> FuseQkv:
        """Return the fusion in the same layout."""
        del inputs
        return FuseQkv(self.heads, self.kv_heads, self.head_dim, self.layout, self.dim)


@dataclass(frozen=True, slots=True)
class FuseQkv(_Qkv):
    """Query, key and value, in this order, made one projection."""

    name: ClassVar[str] = "fuse_qkv"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the fused projection."""
        if len(inputs) != 3:
            raise self.refusal(f"takes query, key and value, and there are {len(inputs)}")
        dim = self.axis(self.dim, inputs[0])
        size = self.head_size(inputs[0], dim, self.heads)
        for part, shape in zip(("key", "value"), inputs[1:], strict=True):
            wanted = (*inputs[0][:dim], size * self.groups, *inputs[0][dim + 1 :])
            if shape != wanted:
                raise self.refusal(
                    f"the {part} is {list(shape)}, and a query of {list(inputs[0])} asks for {list(wanted)}"
                )
        return ((*inputs[0][:dim], size * sum(self.counts()), *inputs[0][dim + 1 :]),)

    def move(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Fuse."""
        import torch

        dim = self.dim % tensors[0].dim()
        if self.layout == "concat":
            return [torch.cat(list(tensors), dim)]
        size = tensors[0].shape[dim] // self.heads
        shares = (self.heads // self.groups, 1, 1)
        parts = [
            unflatten(tensor, dim, (self.groups, share, size)) for tensor, share in zip(tensors, shares, strict=True)
        ]
        return [torch.cat(parts, dim + 1).flatten(dim, dim + 2)]

    def inverse(self, inputs: Sequence[Shape]) -> SplitQkv:
        """Return the taking apart in the same layout."""
        del inputs
        return SplitQkv(self.heads, self.kv_heads, self.head_dim, self.layout, self.dim)
