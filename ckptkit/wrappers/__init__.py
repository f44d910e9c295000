"""What wrappers and trainers put around weights: prefixes, segments and envelopes, each known by its own mark."""

from __future__ import annotations

from ckptkit.wrappers.envelopes import (
    AN_OPTIMIZER,
    ENVELOPES,
    FLAT_GROUPS,
    FLAT_STATE,
    Envelope,
    choose_envelope,
    find_optimizers,
    is_optimizer_state,
    is_state_dict,
    which_is_which,
)
from ckptkit.wrappers.explain import AUTO, Explanation, Wrapping, explain, take_off
from ckptkit.wrappers.table import PREFIXES, SEGMENTS, WRAPPERS, Wrapper

__all__ = [
    "AN_OPTIMIZER",
    "AUTO",
    "ENVELOPES",
    "FLAT_GROUPS",
    "FLAT_STATE",
    "PREFIXES",
    "SEGMENTS",
    "WRAPPERS",
    "Envelope",
    "Explanation",
    "Wrapper",
    "Wrapping",
    "choose_envelope",
    "explain",
    "find_optimizers",
    "is_optimizer_state",
    "is_state_dict",
    "take_off",
    "which_is_which",
]
