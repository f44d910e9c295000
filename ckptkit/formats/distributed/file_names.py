"""Recognise the files of distributed checkpoints by their names, so that only the needed reader is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "CONSOLIDATED",
    "DCP_METADATA",
    "DCP_SHARD",
    "DCP_SUFFIX",
    "ZERO_MODEL_STATES",
    "ZERO_OPTIM_STATES",
    "find_states_file",
    "is_dcp",
    "is_zero",
]

CONSOLIDATED = re.compile(r"consolidated\.(\d{2,4})\.pth")  # of Meta, one file for each rank
DCP_METADATA = ".metadata"
DCP_SUFFIX = ".distcp"
DCP_SHARD = re.compile(r"shard-(\d{5,9})-model-(\d{5,9})-of-(\d{5,9})\.safetensors")
ZERO_OPTIM_STATES = re.compile(r"([a-z0-9_]*?)zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
ZERO_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_model_states\.pt")


def is_dcp(names: Iterable[str]) -> bool:
    """Return whether a directory with these file names is a checkpoint of ``torch.distributed.checkpoint``.

    The checkpoint can be incomplete.
    """
    return any(name == DCP_METADATA or name.endswith(DCP_SUFFIX) or DCP_SHARD.fullmatch(name) for name in names)


def is_zero(names: Iterable[str]) -> bool:
    """Return whether a directory with these file names is a ZeRO checkpoint of DeepSpeed.

    The checkpoint can be incomplete.
    """
    return any(
        ZERO_OPTIM_STATES.fullmatch(name) or ((match := ZERO_MODEL_STATES.fullmatch(name)) and match[1])
        for name in names
    )


def find_states_file(names: Iterable[str], key: str) -> tuple[str, str] | None:
    """Split ``key`` into the name of a DeepSpeed file and the key inside the file, or return None."""
    for name in names:
        is_prefix = f"{key}.".startswith(f"{name}.")
        if is_prefix and (ZERO_OPTIM_STATES.fullmatch(name) or ZERO_MODEL_STATES.fullmatch(name)):
            return name, key[len(name) + 1 :]
    return None
