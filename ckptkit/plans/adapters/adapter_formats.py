"""The formats of adapters that can be written, and the path of the weights in each."""

from __future__ import annotations

import os
from typing import Literal, TypeAlias, get_args

__all__ = ["ADAPTER_FORMATS", "PEFT_WEIGHTS", "AdapterFormat", "adapter_path"]

AdapterFormat: TypeAlias = Literal["peft", "kohya", "diffusers"]
ADAPTER_FORMATS: tuple[AdapterFormat, ...] = get_args(AdapterFormat)
PEFT_WEIGHTS = "adapter_model.safetensors"  # the name under which PEFT looks for an adapter


def adapter_path(out: str | os.PathLike[str], adapter: AdapterFormat) -> str:
    """Return the path of the weights: for PEFT, ``out`` may be the directory that PEFT loads."""
    path = os.fsdecode(out)
    return os.path.join(path, PEFT_WEIGHTS) if adapter == "peft" and not path.endswith(".safetensors") else path
