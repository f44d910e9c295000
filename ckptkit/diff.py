"""What a model wants against what a checkpoint has: by key, shape and dtype, with no value read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ckptkit.rules import KeyMap, Rules, apply_rules, as_rules
from ckptkit.tensors import Checkpoint, TensorInfo
from ckptkit.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.wrappers import WRAPPER_PREFIXES

__all__ = ["Hint", "Pair", "StateDictDiff", "compare", "diff"]

_EXTRA_STATE = "_extra_state"
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class Pair:
    """One key on both sides; ``found`` bears the name that it has in its own file."""

    expected: TensorInfo
    found: TensorInfo

    @property
    def key(self) -> str:
        """The key that the model expects."""
        return self.expected.key

    @property
    def loads(self) -> bool:
        """Whether ``load_state_dict`` takes it: equal shapes, or the one pair that torch converts."""
        # torch keeps scalars of before 0.4, saved with one dimension, loadable: it takes their first element.
        scalar = self.expected.shape == () and len(self.found.shape) == 1 and self.found.shape[0] > 0
        return scalar or self.expected.shape == self.found.shape


@dataclass(frozen=True, slots=True)
class Hint:
    """A way to make more keys match: what it would do, and the rename that does it."""

    message: str
    rename: str


@dataclass(frozen=True)
class StateDictDiff:
    """The result of a comparison, in torch's words.

    ``missing``: expected, not found. ``unexpected``: found, not expected. ``shape_mismatched``: same key,
    other shape. ``dtype_mismatched``: a matched key with another dtype, which torch would cast; it is
    listed under ``matched`` too. ``blocked`` names expected keys whose found value is no tensor at all.
    """

    expected: Mapping[str, TensorInfo]
    found: Mapping[str, TensorInfo]
    names: Mapping[str, str]  # keys of found that the rules left -> their new names
    matched: tuple[Pair, ...]
    missing: tuple[TensorInfo, ...]
    unexpected: tuple[TensorInfo, ...]
    shape_mismatched: tuple[Pair, ...]
    dtype_mismatched: tuple[Pair, ...]
    blocked: tuple[str, ...] = ()
    extra_state: tuple[str, ...] = ()  # keys of extra state that only one side has
    filled: frozenset[str] = frozenset()  # missing keys that torch fills in for checkpoints of before 0.4.1

    @property
    def loads(self) -> bool:
        """Whether ``load_state_dict(strict=False)`` would accept the found tensors."""
        return not self.blocked and all(pair.loads for pair in self.shape_mismatched)

    @property
    def loads_strict(self) -> bool:
        """Whether ``load_state_dict(strict=True)`` would accept the found tensors."""
        missing = any(info.key not in self.filled for info in self.missing)
        return self.loads and not missing and not self.unexpected and not self.extra_state

    @property
    def different(self) -> bool:
        """Whether there is anything to report."""
        return bool(
            self.missing or self.unexpected or self.shape_mismatched or self.dtype_mismatched
            or self.blocked or self.extra_state
        )  # fmt: skip

    @property
    def coverage(self) -> float:
        """Share of the expected elements that found fills, between 0 and 1; 1 where nothing is expected."""
        wanted = sum(info.elements for info in self.expected.values())
        return sum(pair.expected.elements for pair in self.matched) / wanted if wanted else 1.0

    @cached_property
    def hints(self) -> tuple[Hint, ...]:
        """Prefixes that explain why keys do not match, best first; empty where none helps."""
        return tuple(_hints(self))


def diff(expected: StateDictLike, found: StateDictLike, rules: Rules | list[str] | None = None) -> StateDictDiff:
    """Return what ``expected`` wants and ``found`` has, as ``load_state_dict`` would see it.

    Either side is a Module, a Checkpoint, or a mapping of tensors or of ``TensorInfo``. ``rules`` rename
    and filter the keys of ``found`` first: ``["module.*=*"]``. Raises ``RuleError`` where they go wrong.
    """
    left, right = as_checkpoint(expected, "expected"), as_checkpoint(found, "found")
    return compare(left, right, apply_rules(as_rules(rules), right))


def compare(expected: Checkpoint, found: Checkpoint, key_map: KeyMap) -> StateDictDiff:
    """Return the difference, with the keys of ``found`` named as ``key_map`` says."""
    by_new_name = {new: found[old] for old, new in key_map.renamed.items()}
    matched: list[Pair] = []
    missing: list[TensorInfo] = []
    shapes: list[Pair] = []
    dtypes: list[Pair] = []
    for key, info in expected.items():
        other = by_new_name.get(key)
        if other is None:
            missing.append(info)
        elif info.shape != other.shape:
            shapes.append(Pair(info, other))
        else:
            pair = Pair(info, other)
            matched.append(pair)
            if info.dtype != other.dtype:
                dtypes.append(pair)
    unexpected = tuple(found[old] for old, new in key_map.renamed.items() if new not in expected)
    wanted_state = {entry.path for entry in expected.entries if entry.path.endswith(_EXTRA_STATE)}
    found_state = {entry.path for entry in found.entries if entry.path.endswith(_EXTRA_STATE)}
    return StateDictDiff(
        expected,
        found,
        key_map.renamed,
        tuple(matched),
        tuple(missing),
        unexpected,
        tuple(shapes),
        tuple(dtypes),
        blocked=tuple(entry.path for entry in found.entries if entry.path in expected),
        extra_state=tuple(sorted(wanted_state ^ found_state)),
        filled=_filled(missing, expected, found, key_map),
    )


def _filled(missing: Iterable[TensorInfo], expected: Checkpoint, found: Checkpoint, key_map: KeyMap) -> frozenset[str]:
    """Return the missing counters that batch norm fills in where the state_dict gives it no version, or one below 2."""
    renamed = any(old != new for old, new in key_map.renamed.items())
    versions = {} if renamed else found.versions
    counters = [info.key for info in missing if info.key.endswith(_COUNTER)]
    return frozenset(
        key
        for key in counters
        if f"{key.removesuffix(_COUNTER)}running_mean" in expected
        and versions.get(key.removesuffix(_COUNTER).removesuffix("."), 0) < 2
    )


def _hints(result: StateDictDiff) -> list[Hint]:
    expected, found = result.expected, result.found
    renamed = any(old != new for old, new in result.names.items())
    if not result.missing or not result.unexpected or renamed:
        return []
    now = len(result.matched)
    hints: list[tuple[int, Hint]] = []
    for rename, mapping in _candidates(result):
        hits = sum(new in expected and expected[new].shape == found[old].shape for old, new in mapping.items())
        if hits > now:
            hints.append((hits, Hint(_praise(hits, len(expected), rename), rename)))
    hints.sort(key=lambda pair: -pair[0])
    return [hint for hits, hint in hints if hits == hints[0][0]][:3]


def _praise(hits: int, wanted: int, rename: str) -> str:
    if hits == wanted:
        return f"all {wanted:,} keys match after --rename '{rename}'"
    return f"{hits:,} of {wanted:,} keys match after --rename '{rename}'"


def _candidates(result: StateDictDiff) -> list[tuple[str, dict[str, str]]]:
    """Return renames that strip or add one prefix, with what each makes of every found key."""
    strip, add = Counter[str](), Counter[str]()
    missing = {info.key: info.shape for info in result.missing}
    unexpected = {info.key: info.shape for info in result.unexpected}
    for key, shape in unexpected.items():
        strip.update(_prefixes(key, shape, missing))
    for key, shape in missing.items():
        add.update(_prefixes(key, shape, unexpected))
    strips = {name for name, _ in strip.most_common(3)} | set(WRAPPER_PREFIXES)
    made = {
        f"{prefix}*=*": {key: key.removeprefix(prefix) for key in result.names}
        for prefix in sorted(strips)
        if any(key.startswith(prefix) for key in unexpected)
    }
    for prefix, _ in add.most_common(3):
        made[f"*={prefix}*"] = {key: f"{prefix}{key}" for key in result.names}
    return list(made.items())


def _prefixes(key: str, shape: tuple[int, ...], others: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return what stands before those endings of ``key`` that are keys of ``others`` with the same shape."""
    found = []
    at = key.find(".")
    while at >= 0:
        if others.get(key[at + 1 :]) == shape:
            found.append(key[: at + 1])
        at = key.find(".", at + 1)
    return found
