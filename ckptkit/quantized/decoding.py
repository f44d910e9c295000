"""Make the decoders of the quantised weights of a checkpoint."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
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

__all__ = ["SETTINGS", "Decoded", "Decoding", "SettingsOf"]

SettingsOf = Callable[[Known], "Mapping[str, Setting]"]

# The module and the function that find the settings of a family: what the headers of the parts do not say.
SETTINGS: Mapping[str, tuple[str, str]] = {
    "scaled": ("settings", "of_scaled"),
    "torchao": ("settings_torchao", "of_torchao"),
    "bitsandbytes 4bit": ("settings_bitsandbytes", "of_four_bits"),
    "bitsandbytes int8": ("settings_bitsandbytes", "of_int8"),
    "gptq": ("settings_gptq", "of_gptq"),
    "awq": ("settings_gptq", "of_awq"),
    "mlx": ("settings_mlx", "of_mlx"),
    "packed rows": ("settings_compressed", "of_packed_rows"),
}


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
        self, stored: StoredBytes, out: TensorInfo, losses: MutableMapping[str, CastLoss] | None = None
    ) -> DequantizedPayload:
        """Return the bytes of the weight, with the dtype of ``out``; ``stored`` has the bytes of the parts."""
        from ckptkit.values.dequantize.payload import DequantizedPayload

        sources = {role: stored.payload(key) for role, key in self.weight.roles}
        return DequantizedPayload(self.decoder, sources, out, losses)


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
        from ckptkit.values.dequantize.schemes import make_decoder

        if weight.missing:
            raise FormatError(f"{quoted(weight.key)} cannot be dequantised: it lacks {listed(weight.missing)}")
        if not weight.family:
            reason = f"{quoted(weight.key)} is quantised ({weight.scheme}), which ckptkit cannot dequantise"
            raise PlanError(reason, hint=weight.way_out)
        parts = {role: self.checkpoint[key] for role, key in weight.roles}
        keys = dict(weight.roles)
        settings: Mapping[str, Setting] = {}
        try:
            if weight.family in SETTINGS:
                module, function = SETTINGS[weight.family]
                find: SettingsOf = getattr(importlib.import_module(f"ckptkit.quantized.{module}"), function)
                settings = find(
                    Known(
                        weight.key,
                        parts,
                        self._configuration.sections,
                        self.checkpoint.metadata,
                        lambda role: b"".join(map(bytes, self._stored.payload(keys[role]).chunks())),
                    )
                )
            decoder = make_decoder(weight.family, parts, settings)
        except UnknownFormError as error:
            reason = f"{quoted(weight.key)} is quantised ({weight.scheme} {error}), which ckptkit cannot dequantise"
            raise PlanError(reason, hint=weight.way_out) from None
        except BrokenPartError as error:
            raise broken_part(weight.key, parts, error) from None
        return Decoded(weight, decoder, weight.family, tuple(settings.items()))
