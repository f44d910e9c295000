"""Make the decoders of the quantised weights of a checkpoint."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ckptkit.core.checkpoint import Checkpoint, TensorInfo, affine_of
from ckptkit.core.checkpoint.stored import StoredBytes
from ckptkit.core.text import listed, quoted
from ckptkit.errors import FormatError, PlanError
from ckptkit.quantized import QuantizedWeight
from ckptkit.quantized.configuration import Configuration, configured_dtype, read_configuration
from ckptkit.quantized.known import Known

if TYPE_CHECKING:
    from ckptkit.core.cast_losses import CastLoss
    from ckptkit.values.dequantize.model import Decoder, Setting
    from ckptkit.values.dequantize.payload import DequantizedPayload
    from ckptkit.values.workers import Workers

__all__ = ["SETTINGS", "Broken", "Decoded", "Decoding", "SettingsOf"]

SettingsOf = Callable[[Known], "Mapping[str, Setting]"]

# The module and the function that find the settings of a family: what the headers of the parts do not say.
SETTINGS: Mapping[str, tuple[str, str]] = {
    "affine": ("torch", "of_affine"),
    "scaled": ("scaled", "of_scaled"),
    "torchao": ("torchao", "of_torchao"),
    "bitsandbytes 4bit": ("bitsandbytes", "of_four_bits"),
    "bitsandbytes int8": ("bitsandbytes", "of_int8"),
    "gptq": ("gptq", "of_gptq"),
    "awq": ("gptq", "of_awq"),
    "hqq": ("hqq", "of_hqq"),
    "mlx": ("mlx", "of_mlx"),
    "packed rows": ("compressed", "of_packed_rows"),
}


class Broken(NamedTuple):
    """A part that its weight cannot have: its key, and a sentence."""

    key: str
    reason: str


# The parts that change what a layer computes of the same weight: numbers without them would be another layer.
_SCALES_OF_INPUTS = ("pre_quant_scale", "prequant_scaling_factor", "act_pre_scale")
_CHANGING = ("weight_zero_point", "weight_g_idx")  # refused where the decoder of a scheme does not take them


@dataclass(frozen=True, slots=True)
class Decoded:
    """A quantised weight with its decoder, and what a plan records of it: the family and the settings."""

    weight: QuantizedWeight
    decoder: Decoder
    family: str
    settings: tuple[tuple[str, Setting], ...]

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """The key of the part that has each role."""
        return self.weight.roles

    def payload(
        self,
        stored: StoredBytes,
        out: TensorInfo,
        workers: Workers | None = None,
        losses: MutableMapping[str, CastLoss] | None = None,
    ) -> DequantizedPayload:
        """Return the bytes of the weight, with the dtype of ``out``; ``stored`` has the bytes of the parts.

        ``losses`` gets the losses of the numbers whenever all bytes were read.
        """
        from ckptkit.values.dequantize.payload import DequantizedPayload
        from ckptkit.values.workers import Workers

        sources = {role: stored.payload(key) for role, key in self.weight.roles}
        return DequantizedPayload(self.decoder, sources, out, losses, workers or Workers())


class Decoding:
    """The decoders of the quantised weights of one checkpoint, and the dtype that its configuration names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read nothing yet."""
        self.checkpoint = checkpoint
        self._stored = StoredBytes(checkpoint)

    @functools.cached_property
    def _configuration(self) -> Configuration:
        return read_configuration(self.checkpoint)

    @functools.cached_property
    def dtype(self) -> str | None:
        """The dtype of the weights that the configuration names, or None."""
        return configured_dtype(self.checkpoint)

    def decoded(self, weight: QuantizedWeight) -> Decoded:
        """Return a weight with its decoder.

        Raises ``PlanError`` for a scheme that ckptkit cannot decode, and ``FormatError`` for missing or broken parts.
        """
        from ckptkit.values.dequantize.model import BrokenPartError, UnknownFormError
        from ckptkit.values.dequantize.payload import broken_part

        if weight.missing:
            raise FormatError(f"{quoted(weight.key)} cannot be dequantised: it lacks {listed(weight.missing)}")
        if not weight.family:
            raise _unknown(weight)
        scaled = next((key for key in weight.parts if key.endswith(_SCALES_OF_INPUTS)), None)
        if scaled is not None:
            raise _unknown(weight, inputs=f" for inputs that are multiplied by {quoted(scaled)}")
        parts = {role: self.checkpoint[key] for role, key in weight.roles}
        try:
            _refuse_unused(weight)
            settings, decoder = self._make(weight, parts)
        except UnknownFormError as error:
            raise _unknown(weight, form=f" {error}", hint=error.hint) from None
        except BrokenPartError as error:
            raise broken_part(weight.key, parts, error) from None
        return Decoded(weight, decoder, weight.family, tuple(settings.items()))

    def broken(self, weight: QuantizedWeight, *, reads: bool) -> Broken | None:
        """Return what is wrong with the parts of a weight that lacks none, or None.

        With ``reads``, the parts that a decoder reads whole are read. A scheme without a decoder is not judged. Raises
        what reading raises.
        """
        from ckptkit.values.dequantize.model import BrokenPartError, UnknownFormError
        from ckptkit.values.dequantize.payload import broken_part

        parts, keys = {role: self.checkpoint[key] for role, key in weight.roles}, dict(weight.roles)
        try:
            decoder = self._make(weight, parts)[1] if weight.family else None
            if decoder is not None and reads:
                decoder.prepare({
                    role: memoryview(self._read(key)) for role, key in keys.items() if role not in decoder.streamed
                })  # fmt: skip
                if decoder.has_scales_in_codes:
                    self._try_all(weight, decoder)
        except UnknownFormError:
            return None
        except BrokenPartError as error:
            reason = broken_part(weight.key, parts, error).reason
            return Broken(keys.get(error.role, weight.coded), reason)
        return None

    def _try_all(self, weight: QuantizedWeight, decoder: Decoder) -> None:
        from ckptkit.values.dequantize.payload import DequantizedPayload
        from ckptkit.values.workers import Workers

        sources = {role: self._stored.payload(key) for role, key in weight.roles}
        with Workers() as workers:
            DequantizedPayload(decoder, sources, TensorInfo(weight.key, "F32", decoder.shape), None, workers).try_all()

    def _make(self, weight: QuantizedWeight, parts: Mapping[str, TensorInfo]) -> tuple[Mapping[str, Setting], Decoder]:
        """Return the settings and the decoder; raise ``BrokenPartError`` or ``UnknownFormError``."""
        from ckptkit.values.dequantize.schemes import make_decoder

        _refuse_two_of_a_role(weight)
        settings: Mapping[str, Setting] = {}
        if weight.family in SETTINGS:
            module, function = SETTINGS[weight.family]
            find: SettingsOf = getattr(importlib.import_module(f"ckptkit.quantized.settings.{module}"), function)
            keys, sections = dict(weight.roles), self._configuration.sections
            affine = affine_of(self.checkpoint, weight.key) if weight.family == "affine" else None
            known = Known(
                weight.key, parts, sections, self.checkpoint.metadata, lambda role: self._read(keys[role]), affine
            )
            settings = find(known)
        return settings, make_decoder(weight.family, parts, settings)

    def _read(self, key: str) -> bytes:
        return b"".join(map(bytes, self._stored.payload(key).chunks()))


def _unknown(weight: QuantizedWeight, *, form: str = "", inputs: str = "", hint: str = "") -> PlanError:
    """Return the error for a scheme, or a form of it, without a decoder."""
    reason = f"{quoted(weight.key)} is quantised ({weight.scheme}{form}){inputs}, which ckptkit cannot dequantise"
    return PlanError(reason, hint=f"{hint}; or {weight.way_out}" if hint else weight.way_out)


def _refuse_unused(weight: QuantizedWeight) -> None:
    """Raise ``UnknownFormError`` for a part that changes the numbers and that the decoder does not take."""
    from ckptkit.values.dequantize.model import UnknownFormError

    used = {key for _, key in weight.roles}
    unused = next((key for key in weight.parts if key.endswith(_CHANGING) and key not in used), None)
    if unused is not None:
        raise UnknownFormError(f"with {quoted(unused)}")


def _refuse_two_of_a_role(weight: QuantizedWeight) -> None:
    """Raise ``BrokenPartError`` for two parts of which only one can be used, such as two tensors of scales."""
    from ckptkit.values.dequantize.model import BrokenPartError

    first: dict[str, str] = {}
    for role, key in weight.roles:
        if first.setdefault(role, key) != key:
            raise BrokenPartError(role, f"and {quoted(first[role])} are both its {role}, and only one can be right")
