"""Checks of LoRA adapters by names and shapes: both matrices of each pair, the same rank, and a scale."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from ckptkit.checks import codes
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural, quoted

__all__ = ["check_lora"]

# peft writes lora_A and lora_B, kohya lora_down and lora_up, diffusers lora.down and lora.up; some add a number.
_MATRIX = re.compile(
    r"(?P<module>.+?)[._]lora(?:_linear_layer)?[._](?P<table>embedding_)?(?P<side>A|B|down|up)(?P<number>\d*)"
    r"(?P<rest>(?:\.[^.]+)*)"
)
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}


@dataclass(slots=True)
class _LoraPair:
    matrices: dict[str, list[TensorInfo]] = field(default_factory=dict)  # by side: A or B
    has_alpha: bool = False


def check_lora(infos: Mapping[str, TensorInfo], *, scale_reported: bool = False) -> Iterator[Finding]:
    """Yield errors for LoRA pairs that cannot be applied: ``lora-half`` and ``lora-rank``.

    ``lora-alpha`` is a warning if only some modules have an alpha. It is a note if no module has one and the reader
    has not reported the scale (``scale_reported``).
    """
    pairs: dict[tuple[str, str, str], _LoraPair] = {}
    for key, info in infos.items():
        match = _MATRIX.fullmatch(key) if "lora" in key else None
        if match is not None and match["rest"].rpartition(".")[2] != "bias":
            pair = pairs.setdefault((match["module"], match["table"] or "", match["rest"]), _LoraPair())
            pair.matrices.setdefault(_SIDES[match["side"]], []).append(info)
            pair.has_alpha = f"{match['module']}.alpha" in infos
    for pair in pairs.values():
        yield from _check_pair(pair)
    yield from _check_alphas(pairs.values(), scale_reported=scale_reported)


def _check_pair(pair: _LoraPair) -> Iterator[Finding]:
    if len(pair.matrices) == 1:
        (side, (info, *_)), *_ = pair.matrices.items()
        other = "lora_B" if side == "A" else "lora_A"
        message = f"{quoted(info.key)} is half of a LoRA pair: its {other} is not in the file"
        hint = "copy or save the adapter again, or leave this tensor out with --drop"
        yield codes.LORA_HALF.finding(info.key, message, hint)
    elif all(len(matrices) == 1 for matrices in pair.matrices.values()):
        (down,), (up,) = pair.matrices["A"], pair.matrices["B"]
        if len(down.shape) == len(up.shape) >= 2 and not _has_one_rank(down.shape, up.shape):
            message = f"{quoted(down.key)} is {down} and {quoted(up.key)} is {up}: their ranks differ"
            hint = "the matrices come from different adapters, or one of them is transposed"
            yield codes.LORA_RANK.finding(down.key, message, hint)


def _has_one_rank(down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    # In a stack of experts the first dim counts the experts, each with its own pair.
    return down[0] == up[1] or (len(down) == 3 and down[0] == up[0] and down[1] == up[2])


def _check_alphas(pairs: Collection[_LoraPair], *, scale_reported: bool) -> Iterator[Finding]:
    without = [pair.matrices["A"][0].key for pair in pairs if "A" in pair.matrices and not pair.has_alpha]
    if not without:
        return
    with_alpha = len(pairs) - len(without)
    if with_alpha:
        message = f"{plural(len(without), 'LoRA pair')} without alpha, but {with_alpha:,} with alpha: {listed(without)}"
        hint = "loaders scale pairs without alpha by 1, or by another default"
        yield codes.LORA_ALPHA.finding(without[0], message, hint, keys=without)
    elif not scale_reported:
        message = f"the scale of {plural(len(without), 'LoRA pair')} (alpha / rank) is not in the file"
        hint = "peft keeps the scale in adapter_config.json: give the path of the directory"
        yield codes.LORA_ALPHA.finding(without[0], message, hint, severity="note", keys=without)
