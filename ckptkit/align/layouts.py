"""Known layouts: the names that PEFT stores and uses, and the tensors that GGUF files hold in another form."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptkit.adapters.keys import PEFT_PREFIX
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.rules.gguf.architectures import ARCHITECTURES, Architecture
from ckptkit.tensor_ops.operation import Operation
from ckptkit.tensor_ops.registry import parse_operation

__all__ = ["Arrangement", "LayoutNames", "gguf_arrangement", "peft_names"]

# The parameters of PEFT's tuners; in a live model the name of the adapter follows.
_TUNER = re.compile(
    r"(?<![^.])(?P<parameter>lora_[A-Za-z_]+|hada_\w+|lokr_\w+|ia3_l|oft_\w+|boft_\w+|vera_\w+|road_\w+|ln_tuning_\w+"
    r"|hra_\w+|bone_\w+|randlora_\w+|c3a_\w+|shira_\w+)\.(?P<name>(?!(?:weight|bias)(?:\.|$))[^.]+)(?=\.(?:weight|bias)$|$)"
)
_MARKS = (
    "lora_", "hada_", "lokr_", "ia3_l", "oft_", "vera_", "road_", "ln_tuning_", "hra_", "bone_", "c3a_", "shira_",
)  # fmt: skip
_TO_SAVE = re.compile(r"(?<![^.])modules_to_save\.(?P<name>[^.]+)\.")
_ADAPTED = ("base_layer.", "original_module.")  # the base's tensors in a wrapped model
_PEFT = "the names of PEFT"


@dataclass(frozen=True, slots=True)
class LayoutNames:
    """Pairs of keys, by expected key, that a known layout decides, and keys that fit several places of it."""

    why: str
    pairs: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()  # expected keys, found keys


def peft_names(expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> LayoutNames:
    """Return the pairs of a live PEFT model on one side, and a saved adapter or the plain base on the other side.

    An adapter is saved without its name, and what ``modules_to_save`` trained is saved under the plain name. A tensor
    of the base has ``base_layer`` in its live name. For a module of ``modules_to_save``, the base fits the frozen
    original and the trained copy, so it is tied.
    """
    for live, other, is_expected in ((expected, found, True), (found, expected, False)):
        text = "\n".join(live)  # one search of a long text is faster than one for each key
        if not any(mark in text for mark in _MARKS):
            continue
        adapters = {match["name"] for key in live if (match := _TUNER.search(key))}
        if not adapters or any(_TUNER.search(key) for key in other):
            continue
        is_adapter = any(_TUNER.search(f"{key.removesuffix('.weight')}.default") for key in other)
        places: dict[str, list[str]] = defaultdict(list)
        for key, info in live.items():
            for name in _adapter_names(key) if is_adapter else _base_names(key):
                if name in other and other[name].shape == info.shape:
                    places[name].append(key)
        pairs: dict[str, str] = {}
        tied = []
        for name, keys in places.items():
            if len(keys) > 1:
                tied.append((tuple(keys), (name,)) if is_expected else ((name,), tuple(keys)))
            elif keys[0] not in other:
                pairs |= {keys[0]: name} if is_expected else {name: keys[0]}
        return LayoutNames(f"{_PEFT} for {'an adapter' if is_adapter else 'the base'}", pairs, tuple(tied))
    return LayoutNames("")


def _adapter_names(key: str) -> Iterable[str]:
    """Return the names under which PEFT saves a tensor of a live adapter; empty if the tensor is not saved."""
    match = _TUNER.search(key)
    if match is not None:
        saved = f"{key[: match.end('parameter')]}{key[match.end('name') :]}"
        bare = saved.removesuffix(".weight") if match["parameter"] == "lora_magnitude_vector" else saved
        return (*_with_and_without_wrapper(saved), *(_with_and_without_wrapper(bare) if bare != saved else ()))
    match = _TO_SAVE.search(key)
    if match is not None:
        return _with_and_without_wrapper(f"{key[: match.start()]}{key[match.end() :]}")
    return ()


def _base_names(key: str) -> Iterable[str]:
    """Return the names that the plain base may have for a tensor of a live model; empty for the adapter's own."""
    if _TUNER.search(key):
        return ()
    plain = _TO_SAVE.sub("", key)
    for mark in _ADAPTED:
        plain = re.sub(rf"(?<![^.]){re.escape(mark)}", "", plain)
    return _with_and_without_wrapper(plain)


def _with_and_without_wrapper(name: str) -> tuple[str, ...]:
    return (name, name.removeprefix(PEFT_PREFIX)) if name.startswith(PEFT_PREFIX) else (name,)


_HUGGING_FACE, _META = frozenset({"q_proj", "k_proj"}), frozenset({"wq", "wk"})  # names of query and key
_GATED_NORM = "ssm_norm.weight"  # has no offset
_DECAY = re.compile(r"\.ssm_a(\.weight)?$")
_UNKNOWN = Architecture()


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What must be done to tensors of a GGUF file, or to tensors that become such a file."""

    architecture: str
    is_expected: bool  # the GGUF file is the expected side
    row: Architecture
    heads: int | None
    key_heads: int | None

    def operation(self, roles: Iterable[str], gguf_key: str, other_name: str) -> tuple[Operation, str] | None:
        """Return the operation for a tensor, and a note; None if the layout does not change the tensor.

        ``other_name`` is the name of the module on the other side, such as ``q_proj``.
        """
        heads = self.heads if "query" in roles else self.key_heads if "key" in roles else None
        if self.row.is_permuted and heads and other_name in _HUGGING_FACE:
            direction = "to_original" if self.is_expected else "to_hf"
            note = f"{self.architecture} in GGUF has the rows in another order"
            return parse_operation({"rope_permute": {"heads": heads, "direction": direction}}), note
        if self.row.norm_offset and gguf_key.endswith("norm.weight") and not gguf_key.endswith(_GATED_NORM):
            value = self.row.norm_offset if self.is_expected else -self.row.norm_offset
            note = f"{self.architecture} in GGUF stores norms plus {self.row.norm_offset}, with rounding"
            return parse_operation({"add": {"value": value}}), note
        return None

    def has_rows_of(self, other_name: str) -> bool:
        """Return whether rows of query and key are in the order that a file with this name of the module has."""
        return self.row is not _UNKNOWN and other_name in (_META if self.row.is_permuted else _HUGGING_FACE)

    def is_inexpressible(self, gguf_key: str) -> bool:
        """Return whether a tensor is a function of the original that no operation computes: ``-exp(A_log)``."""
        return _DECAY.search(gguf_key) is not None


def gguf_arrangement(expected: Checkpoint, found: Checkpoint) -> Arrangement | None:
    """Return the arrangement of a GGUF file on one side, by its ``general.architecture``; None without such a file."""
    sides = [_metadata(side) for side in (expected, found)]
    if (sides[0] is None) == (sides[1] is None):
        return None
    metadata = sides[0] if sides[0] is not None else sides[1]
    architecture = (metadata or {}).get("general.architecture")
    if metadata is None or not isinstance(architecture, str):
        return None
    row = ARCHITECTURES.get(architecture, _UNKNOWN)
    heads = metadata.get(f"{architecture}.attention.head_count")
    key_heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    counts = [count if isinstance(count, int) and count > 0 else None for count in (heads, key_heads)]
    return Arrangement(architecture, sides[0] is not None, row, *counts)


def _metadata(side: Checkpoint) -> Mapping[str, object] | None:
    if "gguf" not in side.format:
        return None
    return {entry.path: entry.value for entry in side.entries}
