"""The names of the operations for mismatched shapes; a module of its own, because importing the operations is slow."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

__all__ = ["MISMATCH_NAMES", "MismatchName"]

MismatchName: TypeAlias = Literal[
    "conv_in_channels",
    "pad",
    "pad_mean",
    "pad_normal",
    "permute",
    "reshape",
    "resize_pos_embed",
    "resize_pos_embed_1d",
    "slice",
    "transpose",
]
MISMATCH_NAMES: tuple[MismatchName, ...] = get_args(MismatchName)
