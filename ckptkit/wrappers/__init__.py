"""What wrappers and trainers put around weights: prefixes, segments and envelopes, each known by its own mark."""

from __future__ import annotations

from ckptkit.wrappers.envelopes import ENVELOPES, Envelope, choose_envelope, is_state_dict, which_is_which
from ckptkit.wrappers.explain import AUTO, Explanation, Wrapping, explain, take_off
from ckptkit.wrappers.table import PREFIXES, SEGMENTS, WRAPPERS, Wrapper

__all__ = [
    "AUTO",
    "ENVELOPES",
    "PREFIXES",
    "SEGMENTS",
    "WRAPPERS",
    "Envelope",
    "Explanation",
    "Wrapper",
    "Wrapping",
    "choose_envelope",
    "explain",
    "is_state_dict",
    "take_off",
    "which_is_which",
]
