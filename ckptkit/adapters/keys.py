"""The keys of adapters: whether a file is one, and which library wrote it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ckptkit.adapters.module_names import split_component

__all__ = ["ENDING", "PEFT_PREFIX", "is_adapter", "named_format"]

PEFT_PREFIX = "base_model.model."
ENDING = re.compile(
    r"(?P<stem>.+?)"
    r"(?:\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.(?P<leaf>weight|bias)"
    r"|[._]lora\.(?P<diffusers>down|up)\.weight"
    r"|\.lora_linear_layer\.(?P<linear>down|up)\.weight"
    r"|(?:[._]lora)?\.(?P<alpha>alpha)"
    r"|\.(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.weight)?)"
    r"|\.(?P<lycoris>hada|lokr)_(?P<part>w[12](?:_[ab])?|t[12]))"
)
_MARKS = ("lora", "hada_w", "lokr_w", "dora_scale")
_IS_ADAPTER = re.compile("|".join(_MARKS))


def is_adapter(keys: Collection[str]) -> bool:
    """Return whether most of the keys are those of factors of an adapter, in any format."""
    names = "\n".join(keys)
    if not any(mark in names for mark in _MARKS):
        return False
    hits = sum(1 for key in keys if _IS_ADAPTER.search(key) and ENDING.fullmatch(key))
    alphas = sum(1 for key in keys if key.endswith(".alpha"))
    return hits > 0 and 2 * (hits + alphas) > len(keys)


def named_format(keys: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Return ``kohya``, ``diffusers``, or the empty string, by the names of the tensors and the metadata.

    Factors with the names of PEFT are those of diffusers where an alpha is beside them, which PEFT never writes.
    """
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    is_diffusers = has_alpha = has_factors = False
    for key in keys:
        has_alpha = has_alpha or (key.endswith(".alpha") and not key.startswith(PEFT_PREFIX))
        if _IS_ADAPTER.search(key) is None or key.startswith(PEFT_PREFIX):
            continue
        found = ENDING.fullmatch(key)
        if found is None:
            continue
        if found["kohya"] or found["lycoris"] or found["magnitude"] == "dora_scale":
            return "kohya"
        has_factors = has_factors or bool(found["peft"])
        prefix = split_component(key)[0]
        is_old = bool(found["diffusers"] or found["linear"])
        is_diffusers = is_diffusers or is_old or (prefix != "" and bool(found["peft"]))
    return "diffusers" if is_diffusers or (has_alpha and has_factors) else ""
