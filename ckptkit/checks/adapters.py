"""Low-rank adapters by their names and shapes: both halves of each pair, one rank, and a scale."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural, quoted

__all__ = ["lora_pairs"]

# peft has lora_A and lora_B, kohya lora_down and lora_up, diffusers lora.down and lora.up; variants number the halves.
_HALF = re.compile(
    r"(?P<module>.+?)[._]lora(?:_linear_layer)?[._](?P<table>embedding_)?(?P<side>A|B|down|up)(?P<number>\d*)"
    r"(?P<rest>(?:\.[^.]+)*)"
)
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}


@dataclass(slots=True)
class _Pair:
    halves: dict[str, list[TensorInfo]] = field(default_factory=dict)
    bears_alpha: bool = False


def lora_pairs(infos: Mapping[str, TensorInfo], *, scaled: bool = False) -> Iterator[Finding]:
    """Yield what keeps an adapter from being applied: ``lora-half`` and ``lora-rank`` are errors.

    ``lora-alpha`` is a warning where some modules bring their alpha and others do not, and a note where none does and
    the scale is not known otherwise (``scaled``).
    """
    pairs: dict[tuple[str, str, str], _Pair] = {}
    for key, info in infos.items():
        match = _HALF.fullmatch(key) if "lora" in key else None
        if match is not None and match["rest"].rpartition(".")[2] != "bias":
            pair = pairs.setdefault((match["module"], match["table"] or "", match["rest"]), _Pair())
            pair.halves.setdefault(_SIDES[match["side"]], []).append(info)
            pair.bears_alpha = f"{match['module']}.alpha" in infos
    for pair in pairs.values():
        yield from _about(pair)
    yield from _alphas(pairs.values(), scaled=scaled)


def _about(pair: _Pair) -> Iterator[Finding]:
    if len(pair.halves) == 1:
        (side, (info, *_)), *_ = pair.halves.items()
        said = f"{quoted(info.key)} is half of an adapter: there is no lora_{'B' if side == 'A' else 'A'} beside it"
        hint = "copy or save the adapter again; --drop leaves out what is meant to be left"
        yield Finding("lora-half", "error", info.key, said, hint)
    elif all(len(half) == 1 for half in pair.halves.values()):
        (down,), (up,) = pair.halves["A"], pair.halves["B"]
        if len(down.shape) == len(up.shape) >= 2 and not _fit(down.shape, up.shape):
            said = f"{quoted(down.key)} is {down} and {quoted(up.key)} is {up}: their ranks differ"
            yield Finding("lora-rank", "error", down.key, said, "the two are of different adapters, or one is turned")


def _fit(down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    # Of a stack of experts, each has a pair of its own.
    return down[0] == up[1] or (len(down) == 3 and down[0] == up[0] and down[1] == up[2])


def _alphas(pairs: Collection[_Pair], *, scaled: bool) -> Iterator[Finding]:
    without = [pair.halves["A"][0].key for pair in pairs if "A" in pair.halves and not pair.bears_alpha]
    if not without:
        return
    with_alpha = len(pairs) - len(without)
    if with_alpha:
        said = f"{plural(len(without), 'pair')} without an alpha, where {with_alpha:,} have one: {listed(without)}"
        yield Finding("lora-alpha", "warning", without[0], said, "loaders then scale these by 1, or by another default")
    elif not scaled:
        said = f"the scale of {plural(len(without), 'low-rank pair')} (alpha / rank) is not in the file"
        yield Finding(
            "lora-alpha", "note", without[0], said, "peft keeps it in adapter_config.json; give the directory"
        )
