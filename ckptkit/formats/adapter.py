"""An adapter of PEFT: its weights against the configuration beside them, without which they mean nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Remark
from ckptkit.core.text import plural, quoted

__all__ = ["CONFIG", "adapter_remarks"]

CONFIG = "adapter_config.json"
_OUTER = "base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!lora_)\w+)?(?:\.weight)?")
_LITERAL = re.compile(r"\^?[\w.]+")  # names of modules; everything else is a regular expression, and not evaluated
_MOST_NAMED = 4
_DEEPEST = 64


def adapter_remarks(infos: Mapping[str, TensorInfo], config: Mapping[str, object] | None) -> list[Remark]:
    """Return what is odd about the weights of an adapter whose configuration is ``config``; None where there is none.

    Of LoRA the ranks are compared: a tensor whose rank is not the one that ``r`` or ``rank_pattern`` gives is named.
    """
    if config is None:
        return [Remark(f"no {CONFIG} beside the weights: their scale (lora_alpha / r) is unknown", "adapter-config")]
    base = config.get("base_model_name_or_path")
    of = f" of {quoted(base)}" if isinstance(base, str) and base else ""
    remarks = [Remark(f"an adapter: the weights{of} that it belongs to are not inside", "adapter-base", "note")]
    if config.get("peft_type") == "LORA" and not config.get("target_parameters"):
        wrong = list(_other_ranks(infos, config))
        remarks += [Remark(text, "adapter-rank") for text in wrong[:_MOST_NAMED]]
        if len(wrong) > _MOST_NAMED:
            said = f"{plural(len(wrong) - _MOST_NAMED, 'more tensor')} of another rank than {CONFIG} gives"
            remarks.append(Remark(said, "adapter-rank"))
    return remarks


def _other_ranks(infos: Mapping[str, TensorInfo], config: Mapping[str, object]) -> Iterator[str]:
    pattern = config.get("rank_pattern")
    pattern = pattern if isinstance(pattern, Mapping) else {}
    if not all(_LITERAL.fullmatch(key) for key in pattern):
        return
    places = {key: place for place, key in enumerate(pattern)}
    for key, info in infos.items():
        match = _LOW_RANK.fullmatch(key)
        if match is None or len(info.shape) < 2:
            continue
        wanted = _rank_of(match["module"].removeprefix(_OUTER), config.get("r"), pattern, places)
        found = info.shape[0] if match["side"] == "A" else info.shape[1]
        if type(wanted) is int and found != wanted:
            yield f"{quoted(key)} has rank {found:,}, and {CONFIG} gives {wanted}"


def _rank_of(module: str, default: object, pattern: Mapping[str, object], places: Mapping[str, int]) -> object:
    # The first key wins that is the module's name or an end of it; behind "^" the whole name.
    parts = module.split(".")
    ends = [".".join(parts[first:]) for first in range(len(parts))] if len(parts) <= _DEEPEST else [module]
    fitting = [end for end in (f"^{module}", *ends) if end in places]
    return pattern[min(fitting, key=places.__getitem__)] if fitting else default
