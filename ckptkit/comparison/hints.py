"""Hints about the differences of two state_dicts: renames that make keys match, and the command that helps."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Protocol

from ckptkit.comparison.library import library_hint
from ckptkit.comparison.parts import PartedTensor, align_command, fold_command, parted_hint
from ckptkit.comparison.quantized import QuantizedKey, quantized_messages
from ckptkit.comparison.renamed import count_common_shapes, count_replaced_prefixes, least_of_many
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.checkpoint.provenance import way_to_apply
from ckptkit.core.patterns import literal, parse_rename
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.text import shell_word
from ckptkit.errors import hint_for_python
from ckptkit.wrappers.entries import FLAT_GROUPS, FLAT_STATE, SLOTS
from ckptkit.wrappers.table import PREFIXES, SEGMENTS

__all__ = ["Differences", "Hint", "count_prefixes", "find_hints", "joined_hint"]

_MAX_HINTS = 3
_FEW_SEGMENTS = 16
_MAX_PREFIX_SEGMENTS = 64  # a hostile key can have a million segments
Shapes = Mapping[str, tuple[int, ...]]


class Differences(Protocol):
    """What hints need to know of a ``StateDictDiff``; its attributes have the same names."""

    @property
    def expected(self) -> Mapping[str, TensorInfo]: ...
    @property
    def found(self) -> Mapping[str, TensorInfo]: ...
    @property
    def names(self) -> Mapping[str, str]: ...
    @property
    def matched(self) -> Sized: ...
    @property
    def missing(self) -> Sequence[TensorInfo]: ...
    @property
    def unexpected(self) -> Sequence[TensorInfo]: ...
    @property
    def quantized(self) -> tuple[QuantizedKey, ...]: ...
    @property
    def parted(self) -> Sequence[PartedTensor]: ...
    @property
    def expected_checkpoint(self) -> CheckpointSummary: ...
    @property
    def found_checkpoint(self) -> CheckpointSummary: ...


@dataclass(frozen=True, slots=True, repr=False)
class Hint:
    """A sentence that explains differences, and the rename that makes more keys match, or an empty string.

    ``matches`` is the number of keys that match after the rename, 0 without one.
    ``message`` names the commands and options of ``ckpt``; printed, a hint names the functions and arguments of Python.
    """

    message: str
    rename: str
    matches: int = 0

    def __str__(self) -> str:
        """Return the sentence for Python."""
        return hint_for_python(self.message)

    def __repr__(self) -> str:
        """Return the sentence for Python in brackets."""
        return f"<Hint: {self}>"


def find_hints(result: Differences) -> tuple[Hint, ...]:
    """Return how to apply a patch or fold an adapter; else renames that make the most keys match; else ``align``.

    Where only one side is the state of an optimizer, the hint is the command that compares two of them.
    Renames are left out if the rules rename keys. The last hints are about quantised weights.
    """
    open_shapes = _open_shapes(result)
    return (
        *(
            _patch_hints(result)
            or _fold_hints(result)
            or _optimizer_hints(result)
            or _hints(result, _candidate_renames(result, *open_shapes))
            or _align_hints(result, *open_shapes)
        ),
        *(Hint(message, "") for message in quantized_messages(result.quantized)),
    )


def _hints(result: Differences, renames: Mapping[str, Mapping[str, str]], least: int = 1) -> list[Hint]:
    """Return the renames that make the most keys match, and at least ``least`` more keys than without a rename."""
    expected, found = result.expected, result.found
    hints: list[tuple[int, Hint]] = []
    for rename, names in renames.items():
        matches = sum(new in expected and expected[new].shape == found[old].shape for old, new in names.items())
        if matches >= len(result.matched) + least and len(set(names.values())) == len(names):
            hints.append((matches, Hint(_hint_message(matches, len(expected), rename), rename, matches)))
    most = max((matches for matches, _ in hints), default=0)
    return [hint for matches, hint in hints if matches == most][:_MAX_HINTS]


def _patch_hints(result: Differences) -> list[Hint]:
    sides = {"EXPECTED": result.expected_checkpoint, "FOUND": result.found_checkpoint}
    patches = [(name, side) for name, side in sides.items() if side.is_patch]
    if len(patches) != 1:
        return []
    ((name, side),) = patches
    return [Hint(f"{name} is a patch; {way_to_apply(side.argument or 'PATCH')}", "")]


def _fold_hints(result: Differences) -> list[Hint]:
    if not result.missing or not result.unexpected or result.matched or result.quantized:
        return []
    from ckptkit.adapters.keys import is_adapter

    # A live model of PEFT expects factors itself: its names differ from those of the file, and nothing is folded.
    if not is_adapter([info.key for info in result.unexpected]) or any(
        is_adapter([info.key]) for info in result.missing
    ):
        return []
    command = fold_command(result.expected_checkpoint, result.found_checkpoint)
    return [Hint(f"the tensors are an adapter; {command} adds it to its base", "")]


def _optimizer_hints(result: Differences) -> list[Hint]:
    if not result.missing or not result.unexpected or result.matched:
        return []
    sides = (
        ("EXPECTED", result.expected_checkpoint, _is_optimizer(result.expected)),
        ("FOUND", result.found_checkpoint, _is_optimizer(result.found)),
    )
    names = [name for name, _, is_optimizer in sides if is_optimizer]
    if len(names) != 1:
        return []
    # The file of the weights can have the state of an optimizer too.
    saved, live = (
        (side if is_optimizer else replace(side, envelope="") if side.is_stored else NO_CHECKPOINT).argument or name
        for name, side, is_optimizer in sides
    )
    message = f"only {names[0]} is the state of an optimizer; ckpt optim diff {saved} {live} compares two states"
    return [Hint(message, "")]


def _is_optimizer(tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether all keys are those of the state of an optimizer, as of a nested or a flattened file."""
    return all(key.startswith((FLAT_STATE, FLAT_GROUPS)) for key in tensors) and any(
        key.rpartition(".")[2] in SLOTS for key in tensors
    )


def _align_hints(result: Differences, missing: Shapes, unexpected: Shapes) -> list[Hint]:
    sides = result.expected_checkpoint, result.found_checkpoint
    is_open = bool(result.missing and result.unexpected)
    if is_open and not result.matched and "gguf" in sides[1].format and "gguf" not in sides[0].format:
        return [Hint(f"found is a GGUF file: {_gguf_command(*sides, result)} gives it the names of transformers", "")]
    alike = count_common_shapes(missing, unexpected) if is_open and not _is_renamed(result) else 0
    has_other_names = not result.quantized and alike >= least_of_many(len(result.expected))
    if is_open and (result.parted or has_other_names or not result.matched):
        by_library = library_hint(sides[0].library_names, _library_command(*sides))
        if by_library:
            return [Hint(by_library, "")]
    if result.parted:
        return [Hint(parted_hint(result.parted, *sides), "")]
    # One layer of many does not show that a prefix is replaced.
    replaced = _replacing_renames(result.names, missing, unexpected) if has_other_names else {}
    if renamed := _hints(result, replaced, alike // 2 + 1):
        return renamed
    command = f"{align_command(*sides)} looks for rules that rename them"
    if is_open and not result.matched and not result.quantized:
        return [Hint(f"no key matches; {command}", "")]
    if has_other_names:
        return [Hint(f"{alike:,} missing keys and as many unexpected ones have the same shapes; {command}", "")]
    return []


def _is_renamed(result: Differences) -> bool:
    return any(map(operator.ne, result.names, result.names.values()))


def _open_shapes(result: Differences) -> tuple[Shapes, Shapes]:
    """Return the shapes of the missing and of the unexpected keys."""
    return (
        {info.key: info.shape for info in result.missing},
        {info.key: info.shape for info in result.unexpected},
    )


def _replacing_renames(keys: Iterable[str], missing: Shapes, unexpected: Shapes) -> dict[str, dict[str, str]]:
    """Return renames that replace one prefix by another, each with the new name of every found key."""
    return {
        f"{old}*={new}*": {key: f"{new}{key[len(old) :]}" if key.startswith(old) else key for key in keys}
        for (old, new), _ in count_replaced_prefixes(missing, unexpected).most_common(_MAX_HINTS)
    }


def _library_command(expected: CheckpointSummary, found: CheckpointSummary) -> str:
    if expected.argument and found.argument:
        return f"ckpt diff {expected.argument} {found.argument} --rules transformers:auto"
    return 'ckptkit.diff(expected, found, "transformers:auto")'


def _gguf_command(expected: CheckpointSummary, found: CheckpointSummary, result: Differences) -> str:
    is_quantized = bool(result.quantized) or any(info.kind != "dense" for info in result.unexpected)
    if expected.argument and found.argument:
        command = f"ckpt diff {expected.argument} {found.argument} --rules gguf:auto"
        return f"{command} --dequantize" if is_quantized else command
    return f'ckptkit.diff(expected, found, "gguf:auto"{", dequantize=True" if is_quantized else ""})'


def joined_hint(hints: Sequence[Hint]) -> str:
    """Return the first hint, with all renames if several make equally many keys match; empty without a hint."""
    first = hints[0].message if hints else ""
    others = [f"--rename {shell_word(hint.rename)}" for hint in hints[1:] if hint.rename and hints[0].rename]
    return f"{first}, or after {', or after '.join(others)}: these fit equally" if others else first


def _hint_message(matches: int, wanted: int, rename: str) -> str:
    if wanted == 1:
        return f"the key matches after --rename {shell_word(rename)}"
    share = f"all {wanted:,}" if matches == wanted else f"{matches:,} of {wanted:,}"
    return f"{share} keys match after --rename {shell_word(rename)}"


def _candidate_renames(result: Differences, missing: Shapes, unexpected: Shapes) -> dict[str, dict[str, str]]:
    """Return renames that remove or add one prefix, each with the new name of every found key."""
    if not result.missing or not result.unexpected or _is_renamed(result):
        return {}
    removed, added = count_prefixes(missing, unexpected)
    first_segments = {key.partition(".")[0] for key in unexpected}
    prefixes = {name for name, _ in removed.most_common(3)}
    prefixes |= {prefix for prefix in PREFIXES if prefix.partition(".")[0] in first_segments}
    renames = {
        f"{prefix}*=*": {key: key.removeprefix(prefix) for key in result.names}
        for prefix in sorted(prefixes)
        if any(key.startswith(prefix) for key in unexpected)
    }
    names = "\n".join(unexpected)
    for segment in SEGMENTS:
        if f".{segment}." in names:
            rename = parse_rename(f"*.{segment}.*=*.*")
            renames[f"*.{segment}.*=*.*"] = {key: rename.apply(key) or key for key in result.names}
    for prefix, _ in added.most_common(3):
        renames[f"*={prefix}*"] = {key: f"{prefix}{key}" for key in result.names}
    return renames


def count_prefixes(expected: Shapes, found: Shapes) -> tuple[Counter[str], Counter[str]]:
    """Return two counts by prefix: how many found keys become expected keys without the prefix, and with the prefix.

    Only tensors of the same shape count, and only prefixes without special characters of the pattern language.
    """
    removed, added = Counter[str](), Counter[str]()
    for counts, keys, others in ((removed, found, expected), (added, expected, found)):
        first_segments = {key.partition(".")[0] for key in others}
        names = "\n".join(keys)
        if len(first_segments) <= _FEW_SEGMENTS and not any(f".{segment}" in names for segment in first_segments):
            continue  # no key of a large model needs a look of its own
        for key, shape in keys.items():
            if not first_segments.isdisjoint(key.split(".")[1:]):
                counts.update(_prefixes_before(key, shape, others))
    return removed, added


def _prefixes_before(key: str, shape: tuple[int, ...], others: Shapes) -> list[str]:
    """Return the prefixes of ``key`` after which a key of ``others`` with the same shape follows."""
    prefixes = []
    at = key.find(".")
    for _ in range(_MAX_PREFIX_SEGMENTS):
        if at < 0:
            break
        prefix = key[: at + 1]
        if others.get(key[at + 1 :]) == shape and literal(prefix) == prefix and "=" not in prefix:
            prefixes.append(prefix)
        at = key.find(".", at + 1)
    return prefixes
