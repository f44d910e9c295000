"""Recognise the files of distributed checkpoints by their names, so that only the needed reader is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.core.text import listed
from ckptkit.errors import FormatError

__all__ = [
    "CONSOLIDATED",
    "DCP_METADATA",
    "DCP_SHARD",
    "DCP_SUFFIX",
    "UNIVERSAL",
    "ZERO_MODEL_STATES",
    "ZERO_OPTIM_STATES",
    "RankFiles",
    "find_rank_files",
    "find_states_file",
    "is_dcp",
    "is_zero",
]

CONSOLIDATED = re.compile(r"consolidated\.(\d{2,4})\.pth")  # of Meta, one file for each rank
DCP_METADATA = ".metadata"
DCP_SUFFIX = ".distcp"
DCP_SHARD = re.compile(r"shard-(\d{5,9})-model-(\d{5,9})-of-(\d{5,9})\.safetensors")
UNIVERSAL = "zero"  # the directory of the parameters in a universal checkpoint of DeepSpeed
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


_DIGITS = re.compile(r"\d+")
_RANK = re.compile(r"rank[_-]?(\d{1,6})(?!.*rank)", re.IGNORECASE)
_WORLD_SIZE = re.compile(r"world_?size[_-]?(\d{1,6})", re.IGNORECASE)
_MOST_DIGITS = 6


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The files of several ranks: their names by rank, and the number of ranks where the names state it."""

    names: Mapping[int, str]
    world: int | None

    def check_complete(self) -> None:
        """Raise ``FormatError`` if the names state more ranks, or other ranks, than there are files."""
        count = max(self.names) + 1 if self.world is None else self.world
        missing = [rank for rank in range(min(count, len(self.names) + 5)) if rank not in self.names]
        if missing:
            raise FormatError(
                f"the files of some ranks are missing: {listed([f'rank {rank}' for rank in missing], 4, show=str)}",
                hint="copy the whole directory again",
            )
        if len(self.names) > count:
            raise FormatError(
                f"the names state {count:,} ranks, but there are {len(self.names):,} files",
                hint="the directory holds files of two saves",
            )


def find_rank_files(names: Sequence[str]) -> RankFiles | None:
    """Return the files of weights by rank if their names differ in one number only, else None.

    One file alone counts if its name says ``rank``.
    """
    if len({_DIGITS.sub("#", name) for name in names}) != 1:
        return None
    numbers = [_DIGITS.findall(name) for name in names]
    if any(len(digits) > _MOST_DIGITS for found in numbers for digits in found):
        return None
    varying = [at for at in range(len(numbers[0])) if len({found[at] for found in numbers}) > 1]
    if len(names) == 1 and (match := _RANK.search(names[0])) is not None:
        by_rank = {int(match[1]): names[0]}
    elif len(varying) == 1:
        by_rank = {int(found[varying[0]]): name for found, name in zip(numbers, names, strict=True)}
    else:
        return None
    world = _WORLD_SIZE.search(names[0])
    return RankFiles(by_rank, int(world[1]) if world is not None else None) if len(by_rank) == len(names) else None
