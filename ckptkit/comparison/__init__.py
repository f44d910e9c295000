"""What a model wants against what a checkpoint has: by key, shape and dtype, with no value read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.patterns import literal, parse_rename
from ckptkit.core.text import html_table, printable, shell_word
from ckptkit.core.torch_bridge import ABSENT, CASTABLE, StateDictLike, as_checkpoint
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import KeyMap, Rules
from ckptkit.rules.parse import as_rules
from ckptkit.wrappers.table import PREFIXES, SEGMENTS

__all__ = ["Hint", "KeyPair", "StateDictDiff", "diff", "diff_checkpoints", "prefix_counts"]


_MOST_SEGMENTS = 64  # of a prefix: a hostile name can have a million
Shapes = Mapping[str, tuple[int, ...]]


def prefix_counts(expected: Shapes, found: Shapes) -> tuple[Counter[str], Counter[str]]:
    """Return for how many keys of ``found`` leaving out a prefix makes one of ``expected``, and adding one does.

    Only tensors of one shape count, and only prefixes that a pattern takes as they stand.
    """
    strip, add = Counter[str](), Counter[str]()
    for key, shape in found.items():
        strip.update(_prefixes(key, shape, expected))
    for key, shape in expected.items():
        add.update(_prefixes(key, shape, found))
    return strip, add


def _prefixes(key: str, shape: tuple[int, ...], others: Shapes) -> list[str]:
    """Return what stands before those endings of ``key`` that are keys of ``others`` with the same shape."""
    found = []
    at = key.find(".")
    for _ in range(_MOST_SEGMENTS):
        if at < 0:
            break
        prefix = key[: at + 1]
        if others.get(key[at + 1 :]) == shape and literal(prefix) == prefix and "=" not in prefix:
            found.append(prefix)
        at = key.find(".", at + 1)
    return found


_EXTRA_STATE = "_extra_state"
_STATE_KEY = re.compile(r"(?:.*?\.)?_extra_state(?=\.|$)", re.DOTALL)
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One key on both sides; ``found`` bears the name that it has in its own file."""

    expected: TensorInfo
    found: TensorInfo

    @property
    def key(self) -> str:
        """The key that the model expects."""
        return self.expected.key

    @property
    def loads(self) -> bool:
        """Whether ``load_state_dict`` takes its shape: an equal one, or one of the two cases that torch makes fit."""
        # Scalars of before torch 0.4 were saved with one dimension; extra state may have any shape.
        scalar = self.expected.shape == () and self.found.shape == (1,)
        return scalar or self.expected.shape == self.found.shape or _state_key(self.key) is not None


@dataclass(frozen=True, slots=True)
class Hint:
    """A way to make more keys match: what it would do, and the rename that does it."""

    message: str
    rename: str


@dataclass(frozen=True, repr=False)
class StateDictDiff:
    """The result of a comparison, in torch's words.

    ``missing``: expected, not found. ``unexpected``: found, not expected. ``shape_mismatched``: same key,
    other shape. ``dtype_mismatched``: a matched key with another dtype, which torch would cast; it is
    listed under ``matched`` too, as is ``uncopyable``: torch cannot copy the found values, since they are sparse,
    quantised or none, or of a dtype that nothing is cast from. ``blocked`` names expected keys whose found value
    is no tensor at all.
    """

    expected: Mapping[str, TensorInfo]
    found: Mapping[str, TensorInfo]
    names: Mapping[str, str]  # keys of found that the rules left -> their new names
    matched: tuple[KeyPair, ...]
    missing: tuple[TensorInfo, ...]
    unexpected: tuple[TensorInfo, ...]
    shape_mismatched: tuple[KeyPair, ...]
    dtype_mismatched: tuple[KeyPair, ...]
    blocked: tuple[str, ...] = ()
    uncopyable: tuple[KeyPair, ...] = ()
    foreign: tuple[str, ...] = ()  # keys of found that are not expected and hold no tensor
    extra_state: tuple[str, ...] = ()  # keys of extra state that only one side has
    filled: frozenset[str] = frozenset()  # missing keys that torch fills in for checkpoints of before 0.4.1
    notes: tuple[str, ...] = ()  # what the rules have to say
    unseen: frozenset[str] = frozenset()  # unexpected keys below a submodule that is None: torch looks at none of them

    def __repr__(self) -> str:
        """Show what was found in numbers, and never key by key."""
        return (
            f"<StateDictDiff: {len(self.matched)} matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.shape_mismatched)} shape-mismatched, "
            f"{len(self.dtype_mismatched)} dtype-mismatched>"
        )

    @property
    def loads(self) -> bool:
        """Whether ``load_state_dict(strict=False)`` would accept the found tensors."""
        return not self.blocked and not self.uncopyable and all(pair.loads for pair in self.shape_mismatched)

    @property
    def loads_strict(self) -> bool:
        """Whether ``load_state_dict(strict=True)`` would accept the found tensors."""
        missing = any(info.key not in self.filled for info in self.missing)
        unexpected = any(info.key not in self.unseen for info in self.unexpected)
        return self.loads and not missing and not unexpected and not self.foreign and not self.extra_state

    @property
    def different(self) -> bool:
        """Whether there is anything to report."""
        return bool(
            self.missing or self.unexpected or self.shape_mismatched or self.dtype_mismatched
            or self.uncopyable or self.blocked or self.foreign or self.extra_state
        )  # fmt: skip

    @property
    def coverage(self) -> float:
        """Share of the expected elements that found fills, between 0 and 1; 1 where nothing is expected."""
        wanted = sum(info.elements for info in self.expected.values())
        return sum(pair.expected.elements for pair in self.matched) / wanted if wanted else 1.0

    def _repr_html_(self) -> str:
        rows = [("missing", info.key, str(info), "") for info in self.missing]
        rows += [("unexpected", info.key, "", str(info)) for info in self.unexpected]
        for how, pairs in (
            ("shape-mismatched", self.shape_mismatched),
            ("dtype-mismatched", self.dtype_mismatched),
            ("cannot be copied", self.uncopyable),
        ):
            rows += [(how, pair.key, str(pair.expected), str(pair.found)) for pair in pairs]
        rows += [("no tensor", key, "", "") for key in (*self.blocked, *self.foreign)]
        rows += [("extra state on one side", key, "", "") for key in self.extra_state]
        table = html_table(("", "key", "expected", "found"), [(how, printable(key), *rest) for how, key, *rest in rows])
        return f"<p>{len(self.matched):,} matched, {len(rows):,} that differ</p>{table}"

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
    return diff_checkpoints(left, right, apply_rules(as_rules(rules), right))


def diff_checkpoints(expected: Checkpoint, found: Checkpoint, key_map: KeyMap) -> StateDictDiff:
    """Return the difference, with the keys of ``found`` named as ``key_map`` says."""
    by_new_name = key_map.describe(dict(found.items()))
    values = _values_elsewhere(found, by_new_name)
    wanted_state = _states(expected, expected)
    found_state = _states(found, by_new_name)
    absent = tuple(f"{entry.path}." for entry in expected.entries if entry.type == ABSENT)
    matched: list[KeyPair] = []
    missing: list[TensorInfo] = []
    shapes: list[KeyPair] = []
    dtypes: list[KeyPair] = []
    uncopyable: list[KeyPair] = []
    blocked: list[str] = []
    for key, info in expected.items():
        other = by_new_name.get(key)
        if other is None:
            if _state_key(key, expected) not in found_state:
                missing.append(info)
                if key in values:
                    blocked.append(key)
        elif info.shape != other.shape:
            shapes.append(KeyPair(info, other))
        else:
            pair = KeyPair(info, other)
            matched.append(pair)
            if info.dtype != other.dtype:
                dtypes.append(pair)
            if (info.dtype != other.dtype or info.kind != other.kind) and not _copies(pair):
                uncopyable.append(pair)
    unexpected = {
        new: other
        for new, other in by_new_name.items()
        if new not in expected and _state_key(new, found) not in wanted_state
    }
    foreign = [key for key in values if key not in expected and _state_key(key, found) is None]
    told = {info.key for info in missing} | unexpected.keys()
    return StateDictDiff(
        expected,
        found,
        key_map.renamed,
        tuple(matched),
        tuple(missing),
        tuple(unexpected.values()),
        tuple(shapes),
        tuple(dtypes),
        blocked=tuple(blocked),
        uncopyable=tuple(uncopyable),
        foreign=tuple(key for key in foreign if not key.startswith(absent)),
        extra_state=tuple(sorted(key for key in (wanted_state ^ found_state) - told if not key.startswith(absent))),
        filled=_filled(missing, expected, found, key_map),
        notes=key_map.notes,
        unseen=frozenset(info.key for new, info in unexpected.items() if new.startswith(absent)),
    )


def _values_elsewhere(found: Checkpoint, tensors: Mapping[str, TensorInfo]) -> dict[str, None]:
    """Return the keys of found's own mapping that hold no tensor, in order."""
    paths = [entry.path for entry in found.entries if not entry.is_outside]
    return dict.fromkeys(path for path in paths if path not in tensors and path != "_metadata")


def _states(side: Checkpoint, tensors: Iterable[str]) -> set[str]:
    """Return the keys of extra state on one side."""
    keys = (_state_key(key, side) for key in (*(entry.path for entry in side.entries), *tensors))
    return {key for key in keys if key is not None}


def _state_key(key: str, side: Checkpoint | None = None) -> str | None:
    """Return the key of the extra state that ``key`` is, or lies inside of; None where it is anything else."""
    match = _STATE_KEY.match(key) if _EXTRA_STATE in key else None
    # Nested mappings of a file are listed flat, so what lies inside a state is that state; live keys are exact.
    if match is None or (side is not None and not side.files and match.end() < len(key)):
        return None
    return match[0]


def _copies(pair: KeyPair) -> bool:
    """Whether torch copies the found values into the expected ones, as far as their kinds and dtypes decide."""
    kinds = {pair.expected.kind, pair.found.kind}
    dtypes = {pair.expected.dtype, pair.found.dtype}
    kinds_fit = len(kinds) == 1 or not kinds & {"sparse", "quantized", "meta", "nested"}
    return _state_key(pair.key) is not None or (kinds_fit and (len(dtypes) == 1 or dtypes <= CASTABLE))


def _filled(missing: Iterable[TensorInfo], expected: Checkpoint, found: Checkpoint, key_map: KeyMap) -> frozenset[str]:
    """Return the missing counters that batch norm fills in where the state_dict gives it no version, or one below 2."""
    renamed = bool(key_map.derived) or any(old != new for old, new in key_map.renamed.items())
    versions = {} if renamed else found.versions
    filled = set()
    for key in (info.key for info in missing):
        prefix, _, name = key.rpartition(".")
        mean = f"{prefix}.running_mean" if prefix else "running_mean"
        # A live model tells the versions of its own modules: batch norm has 2, a look-alike has 1.
        is_norm = mean in expected and expected.versions.get(prefix, 2) >= 2
        if name == _COUNTER and is_norm and versions.get(prefix, 0) < 2:
            filled.add(key)
    return frozenset(filled)


def _hints(result: StateDictDiff) -> list[Hint]:
    expected, found = result.expected, result.found
    renamed = any(old != new for old, new in result.names.items())
    if not result.missing or not result.unexpected or renamed:
        return []
    now = len(result.matched)
    hints: list[tuple[int, Hint]] = []
    for rename, mapping in _candidates(result):
        hits = sum(new in expected and expected[new].shape == found[old].shape for old, new in mapping.items())
        if hits > now and len(set(mapping.values())) == len(mapping):
            hints.append((hits, Hint(_praise(hits, len(expected), rename), rename)))
    hints.sort(key=lambda pair: -pair[0])
    return [hint for hits, hint in hints if hits == hints[0][0]][:3]


def _praise(hits: int, wanted: int, rename: str) -> str:
    share = f"all {wanted:,}" if hits == wanted else f"{hits:,} of {wanted:,}"
    return f"{share} keys match after --rename {shell_word(rename)}"


def _candidates(result: StateDictDiff) -> list[tuple[str, dict[str, str]]]:
    """Return renames that strip or add one prefix, with what each makes of every found key."""
    missing = {info.key: info.shape for info in result.missing}
    unexpected = {info.key: info.shape for info in result.unexpected}
    strip, add = prefix_counts(missing, unexpected)
    strips = {name for name, _ in strip.most_common(3)} | set(PREFIXES)
    made = {
        f"{prefix}*=*": {key: key.removeprefix(prefix) for key in result.names}
        for prefix in sorted(strips)
        if any(key.startswith(prefix) for key in unexpected)
    }
    for segment in SEGMENTS:
        if any(f".{segment}." in key for key in unexpected):
            rename = parse_rename(f"*.{segment}.*=*.*")
            made[f"*.{segment}.*=*.*"] = {key: rename.apply(key) or key for key in result.names}
    for prefix, _ in add.most_common(3):
        made[f"*={prefix}*"] = {key: f"{prefix}{key}" for key in result.names}
    return list(made.items())
