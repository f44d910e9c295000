"""Descriptions of an adapter as its file means it, and of what it changes in a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Operation

__all__ = ["COMPLETE", "AdaptedModule", "Adapter", "AdapterPlan", "Fold", "Kind", "Orientation", "TokenRows"]

Kind: TypeAlias = Literal["lora", "dora", "adalora", "loha", "lokr", "ia3"]
Orientation: TypeAlias = Literal["by shape", "plain", "transposed"]


def _sets(*roles: str) -> frozenset[frozenset[str]]:
    return frozenset(frozenset(each.split()) for each in roles)


# The sets of roles with which a module of each kind is complete; AdaptedModule says what the roles are.
COMPLETE: Mapping[Kind, frozenset[frozenset[str]]] = {
    "lora": _sets("A B", "A B mid"),
    "dora": _sets("A B magnitude"),
    "adalora": _sets("A B E"),
    "loha": _sets("w1_a w1_b w2_a w2_b", "w1_a w1_b w2_a w2_b t1 t2"),
    "lokr": _sets(*(f"{w1} {w2}" for w1 in ("w1", "w1_a w1_b") for w2 in ("w2", "w2_a w2_b", "w2_a w2_b t2"))),
    "ia3": _sets("l"),
}


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One module that an adapter changes by factors, independent of the format of the file.

    ``module`` is the path of the module in the model: its weight is ``{module}.{parameter}``. ``factors`` maps a role
    to a key of the adapter. These are the roles of each kind, with the shapes of PEFT:

    - ``lora``: ``A`` is ``[r, in]`` and ``B`` is ``[out, r]``. For a convolution they are ``[r, in, *kernel]`` and
      ``[out, r, 1, ...]``. For an embedding, whose orientation is ``transposed``, they are ``[r, vocab]`` and
      ``[dim, r]``. With ``mid`` ``[r, r, *kernel]``, the factors of a convolution have kernels of 1.
    - ``dora``: as ``lora``, and ``magnitude`` with one value for each output, or for each input if ``per_input``.
    - ``adalora``: as ``lora``, and ``E`` ``[r, 1]``.
    - ``loha``: ``w1_a``, ``w1_b``, ``w2_a``, ``w2_b``, and for some convolutions ``t1`` and ``t2``.
    - ``lokr``: ``w1`` or ``w1_a`` and ``w1_b``, ``w2`` or ``w2_a`` and ``w2_b``, and for some convolutions ``t2``.
    - ``ia3``: ``l``, with one value for each output, or for each input if ``per_input``. It has no scale.

    ``scale`` multiplies the update, as a number: alpha over the rank. ``bias`` is the key of an update of
    ``{module}.bias``, which is added times ``scale``, or is empty.
    ``orientation`` says how the base stores the weight: ``plain`` is ``[out, in]``, ``transposed`` is ``[in, out]``,
    and ``by shape`` leaves it to the shapes of the weight and the factors. ``rows`` are the first and the end of the
    rows of the weight that change, if not all do. ``up_rows`` are those of ``B`` that belong to this module, if others
    share it.
    """

    module: str
    kind: Kind
    factors: Mapping[str, str]
    scale: float
    orientation: Orientation = "by shape"
    bias: str = ""
    parameter: str = "weight"
    per_input: bool = False
    rows: tuple[int, int] | None = None
    up_rows: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """The key of the weight in the model."""
        return f"{self.module}.{self.parameter}"

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield each key of the adapter after the key of the model that it changes."""
        for name in self.factors.values():
            yield self.key, name
        if self.bias:
            yield f"{self.module}.bias", self.bias


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of the weight ``key`` that the adapter replaces: row i of the tensor ``name`` becomes row ``indices[i]``."""

    key: str
    name: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """What the tensors of an adapter mean, read from any format.

    ``replacements`` maps a key of the model
    to the key of a tensor that the adapter saves whole, such as those of ``modules_to_save``. ``fan_in_fan_out`` says
    how square weights are stored whose orientation is ``by shape``: true means ``[in, out]``. ``follows_ties`` has the
    keys of the model whose change is also that of every tensor tied to them. The change of another key ends its tie.
    ``left_out`` are the tensors of the file that change nothing, each with the reason.
    """

    modules: tuple[AdaptedModule, ...]
    replacements: Mapping[str, str] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    rows: tuple[TokenRows, ...] = ()
    follows_ties: frozenset[str] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield each key of the adapter after the key of the model that it changes."""
        yield from self.replacements.items()
        yield from ((rows.key, rows.name) for rows in self.rows)
        for module in self.modules:
            yield from module.places()

    def changed_keys(self) -> tuple[str, ...]:
        """Return the keys of the model that the adapter changes, each once."""
        return tuple(dict.fromkeys(key for key, _ in self.places()))

    def scaled(self, factor: float) -> Adapter:
        """Return the adapter with the scale of every module multiplied by ``factor``.

        Raises ``RuleError`` for another factor than 1 where a module has no scale.
        """
        unscaled = next((each for each in self.modules if each.kind == "ia3"), None)
        if factor != 1 and unscaled is not None:
            raise RuleError(f"{quoted(unscaled.module)} is adapted by IA3, which has no scale")
        return replace(self, modules=tuple(replace(each, scale=each.scale * factor) for each in self.modules))


@dataclass(frozen=True, slots=True)
class Fold:
    """One weight of the base, and the tensors of the adapter that fold into it.

    The inputs of ``operation`` are the weight, then ``factors`` in order. ``replaced_by`` names the tensor of the
    adapter that replaces the weight before the fold, or is empty. ``label`` is what plans print: ``lora, scale 2``.
    ``rows`` and ``up_rows`` are as in ``AdaptedModule``; the second factor has the rows.
    """

    key: str
    factors: tuple[str, ...]
    operation: Operation
    replaced_by: str = ""
    label: str = ""
    rows: tuple[int, int] | None = None
    up_rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The changes of an adapter to the base: folds, and replacements (base key → adapter key).

    ``unplaced`` are the tensors that are saved whole and have no key in the base, in the form of ``replacements``.
    ``left_out`` are the other tensors without a place: adapter key → the key of the base that is missing.
    """

    folds: tuple[Fold, ...]
    replacements: Mapping[str, str] = field(default_factory=dict)
    unplaced: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
