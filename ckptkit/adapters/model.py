"""Descriptions of an adapter as its file means it, and of what it changes in a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from ckptkit.tensor_ops.operation import Operation

__all__ = ["AdaptedModule", "Adapter", "AdapterPlan", "Fold", "Kind", "Orientation"]

Kind: TypeAlias = Literal["lora", "dora", "adalora", "loha", "lokr", "ia3"]
Orientation: TypeAlias = Literal["by shape", "plain", "transposed"]


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One module that an adapter changes by factors, independent of the format of the file.

    ``module`` is the path of the module in the model: its weight is ``{module}.{parameter}``. ``factors`` maps a role
    to a key of the adapter. These are the roles of each kind, with the shapes of PEFT:

    - ``lora``: ``A`` is ``[r, in]`` and ``B`` is ``[out, r]``. For a convolution they are ``[r, in, *kernel]`` and
      ``[out, r, 1, ...]``. For an embedding, whose orientation is ``transposed``, they are ``[r, vocab]`` and
      ``[dim, r]``.
    - ``dora``: as ``lora``, and ``magnitude`` with one value for each output, or for each input if
      ``is_magnitude_of_inputs``.
    - ``adalora``: as ``lora``, and ``E`` ``[r, 1]``.
    - ``loha``: ``w1_a``, ``w1_b``, ``w2_a``, ``w2_b``, and for some convolutions ``t1`` and ``t2``.
    - ``lokr``: ``w1`` or ``w1_a`` and ``w1_b``, ``w2`` or ``w2_a`` and ``w2_b``, and for some convolutions ``t2``.
    - ``ia3``: ``l``, with one value for each output or each input. Its scale is always 1.

    ``scale`` multiplies the update, as a number: alpha over the rank. ``scale_from`` says where it came from, in words
    for a report. ``bias`` is the key of an update of ``{module}.bias``, which is added times ``scale``, or is empty.
    ``orientation`` says how the base stores the weight: ``plain`` is ``[out, in]``, ``transposed`` is ``[in, out]``,
    and ``by shape`` leaves it to the shapes of the weight and the factors.
    """

    module: str
    kind: Kind
    factors: Mapping[str, str]
    scale: float
    scale_from: str = ""
    orientation: Orientation = "by shape"
    bias: str = ""
    parameter: str = "weight"
    is_magnitude_of_inputs: bool = False

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
class Adapter:
    """What the tensors of an adapter mean, read from any format.

    ``format`` is the name of the format: ``peft``, ``kohya`` or ``diffusers``. ``replacements`` maps a key of the model
    to the key of a tensor that the adapter saves whole, such as those of ``modules_to_save``. ``fan_in_fan_out`` says
    how square weights are stored whose orientation is ``by shape``: true means ``[in, out]``.
    """

    format: str
    modules: tuple[AdaptedModule, ...]
    replacements: Mapping[str, str] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield each key of the adapter after the key of the model that it changes."""
        yield from self.replacements.items()
        for module in self.modules:
            yield from module.places()

    def changed_keys(self) -> tuple[str, ...]:
        """Return the keys of the model that the adapter changes, each once."""
        return tuple(dict.fromkeys(key for key, _ in self.places()))

    def scaled(self, factor: float) -> Adapter:
        """Return the adapter with the scale of every module multiplied by ``factor``."""
        return replace(self, modules=tuple(replace(each, scale=each.scale * factor) for each in self.modules))


@dataclass(frozen=True, slots=True)
class Fold:
    """One weight of the base, and the tensors of the adapter that fold into it.

    The inputs of ``operation`` are the weight, then ``factors`` in order. ``replaced_by`` names the tensor of the
    adapter that replaces the weight before the fold, or is empty. ``label`` is what plans print: ``lora, scale 2``.
    """

    key: str
    factors: tuple[str, ...]
    operation: Operation
    replaced_by: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The changes of an adapter to the base: folds, and replacements (base key → adapter key)."""

    folds: tuple[Fold, ...]
    replacements: Mapping[str, str] = field(default_factory=dict)
