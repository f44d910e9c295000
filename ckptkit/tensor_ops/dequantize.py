"""The operation that makes numbers of the parts of a quantised weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.checkpoint import Payload, TensorInfo
from ckptkit.core.checkpoint.reading import torch_bytes
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import TensorPayload, code_of, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import FormatError, PlanError
from ckptkit.tensor_ops.casting import cast_tensor
from ckptkit.tensor_ops.operation import Ints, Operation, Rounded, Shape, Table, Text, Texts
from ckptkit.values.casting import float_dtype
from ckptkit.values.dequantize.model import BrokenPartError, Decoder, Settings, UnknownFormError
from ckptkit.values.dequantize.payload import DequantizedPayload, broken_part
from ckptkit.values.dequantize.schemes import FAMILIES, make_decoder

__all__ = ["Dequantize"]


@dataclass(frozen=True, slots=True)
class Dequantize(Operation):
    """Make numbers of a quantised weight, rounded once to ``dtype``.

    In a rule file, the operation stands alone: weights with names that match are found with all their parts, and the
    dtype is that of the configuration or of the scheme if none is given. A plan records what was found. ``scheme`` is
    the family of decoders, ``parts`` the role of each input, ``shape`` that of the weight, and ``settings`` what the
    inputs themselves do not say.
    """

    dtype: Text = ""
    scheme: Text = ""
    parts: Texts = ()
    shape: Ints = ()
    settings: Table = ()
    name: ClassVar[str] = "dequantize"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a dtype or a scheme that is not known."""
        if self.dtype:
            try:
                object.__setattr__(self, "dtype", float_dtype(self.dtype))
            except PlanError as error:
                raise self.refusal(error.reason, error.hint) from None
        if self.scheme and self.scheme not in FAMILIES:
            raise self.refusal(f"there is no scheme {quoted(self.scheme)}", f"known: {', '.join(FAMILIES)}")
        if any(size < 0 for size in self.shape):
            raise self.refusal(f"{list(self.shape)} is not a shape")

    @property
    def lossy(self) -> bool:
        """Whether the inputs cannot be restored: the codes cannot."""
        return True

    def params(self) -> dict[str, object]:
        """Return the parameters as JSON values, without those that are not set."""
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings}
        found: dict[str, object] = {
            "dtype": self.dtype, "scheme": self.scheme, "parts": list(self.parts), "settings": settings,
        }  # fmt: skip
        found = {name: value for name, value in found.items() if value}
        return {**found, "shape": list(self.shape)} if self.scheme else found

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the weight; without a scheme, the tensor is plain and keeps its shape."""
        if not self.scheme:
            return (self.only_shape(inputs),)
        if len(inputs) != len(self.parts):
            raise self.refusal(f"takes {', '.join(self.parts)}, not {len(inputs)} tensors")
        return (self.shape,)

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtype of the result; without a scheme, that of the input."""
        return (self.dtype or "F32",) if self.scheme else (inputs[0],)

    def decoder(self, key: str, infos: Sequence[TensorInfo]) -> Decoder:
        """Return the decoder of the weight ``key`` with these parts; raise ``FormatError`` where they do not fit."""
        parts = dict(zip(self.parts, infos, strict=True))
        settings: Settings = dict(self.settings)
        try:
            decoder = make_decoder(self.scheme, parts, settings)
        except UnknownFormError as error:
            raise self.refusal(f"{quoted(key)} is {self.scheme} {error}, which ckptkit cannot dequantise") from None
        except BrokenPartError as error:
            raise broken_part(key, parts, error) from None
        if decoder.shape != self.shape:
            raise FormatError(f"{quoted(key)} would be {list(decoder.shape)}, and is {list(self.shape)} in the plan")
        return decoder

    def sources(self, payloads: Sequence[Payload]) -> Mapping[str, Payload]:
        """Return the payload of each part by its role."""
        return dict(zip(self.parts, payloads, strict=True))

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Decode the parts."""
        if not self.scheme:
            return (tensors[0].contiguous(),)
        infos = [
            TensorInfo(role, code_of(one.dtype), tuple(one.shape))
            for role, one in zip(self.parts, tensors, strict=True)
        ]
        sources = [TensorPayload(one, info.nbytes) for one, info in zip(tensors, infos, strict=True)]
        decoder = self.decoder("the weight", infos)
        wide = TensorInfo("", "F32", self.shape)
        payload = DequantizedPayload(decoder, self.sources(sources), wide)
        numbers = torch_bytes(wide.nbytes, payload.readinto).view(torch_dtype("F32")).reshape(self.shape)
        if self.dtype in ("", "F32"):
            return (numbers,)
        made = cast_tensor(numbers, self.dtype)
        if rounded is not None:
            rounded((), numbers, made)
        return (made,)
