"""Find what decoders of MLX need: the number of bits and the size of groups, which the configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptkit.quantized.known import Known

if TYPE_CHECKING:
    from ckptkit.values.dequantize.model import Setting

__all__ = ["of_mlx"]


def of_mlx(known: Known) -> Mapping[str, Setting]:
    """Return the number of bits and the size of groups of this layer.

    Raises ``UnknownFormError`` for other modes than affine, and where no configuration says the size of groups.
    """
    from ckptkit.values.dequantize.model import UnknownFormError

    layer = known.configured(known.key.removesuffix(".weight"))
    of_layer: Mapping[str, object] = layer if isinstance(layer, Mapping) else {}
    mode, size, bits = (of_layer.get(name, known.configured(name)) for name in ("mode", "group_size", "bits"))
    if mode not in (None, "affine") or "biases" not in known.parts:
        raise UnknownFormError(f"in the mode {mode}" if isinstance(mode, str) else "without biases")
    if type(size) is not int or type(bits) is not int:
        raise UnknownFormError("without a configuration that says bits and group_size")
    return {"bits": bits, "group_size": size}
