"""What names, shapes and dtypes tell without the numbers: layers that lack something, dtypes that others have not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural, quoted

__all__ = ["FLOATS", "dtype_mix", "index_holes", "lacking", "not_dense", "numbered"]

FLOATS = frozenset(
    {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"}
)
_LEAST_SIBLINGS = 4
# What transformers call their stack: nothing without parameters stands in one of these.
_STACKS = frozenset({"layers", "layer", "blocks", "block", "h", "resblocks", "transformer_blocks"})
_LEAST_IN_STACK = 3
_MOST_LEVELS = 4  # numbered lists inside each other that are looked at
_LONGEST_NUMBER = 6
_LOST = "ckpt diff with the model as EXPECTED says what would not load"
Lists = Mapping[str, Mapping[int, frozenset[str]]]


def not_dense(infos: Iterable[TensorInfo]) -> Iterator[Finding]:
    """Yield a note for each kind of tensor that is listed and not read as numbers: ``not-dense``."""
    kinds: dict[str, list[str]] = {}
    for info in infos:
        if info.kind != "dense":
            kinds.setdefault(info.kind, []).append(info.key)
    for kind, keys in kinds.items():
        said = f"{plural(len(keys), f'{kind} tensor')} listed, and not read or written as numbers: {listed(keys)}"
        yield Finding("not-dense", "note", keys[0], said)


def dtype_mix(infos: Iterable[TensorInfo]) -> Iterator[Finding]:
    """Yield a note where not all floating-point tensors have one dtype: ``dtype-mix``, naming the odd ones."""
    found: dict[str, list[str]] = {}
    elements: Counter[str] = Counter()
    for info in infos:
        if info.dtype in FLOATS and info.elements:
            found.setdefault(info.dtype, []).append(info.key)
            elements[info.dtype] += info.elements
    if len(found) < 2:
        return
    usual, *others = (dtype for dtype, _ in elements.most_common())
    odd = "; ".join(f"{dtype} in {len(found[dtype]):,}: {listed(found[dtype])}" for dtype in others)
    yield Finding("dtype-mix", "note", found[others[0]][0], f"{usual} in {plural(len(found[usual]), 'tensor')}, {odd}")


def numbered(keys: Iterable[str]) -> Lists:
    """Return the numbered lists of modules among these keys: prefix → number → what lies below it."""
    lists: dict[str, dict[int, set[str]]] = {}
    for key in keys:
        parts = key.split(".")
        levels = 0
        for at, part in enumerate(parts[1:-1], 1):
            if part.isdecimal() and part.isascii() and len(part) <= _LONGEST_NUMBER:
                below = lists.setdefault(".".join(parts[:at]), {}).setdefault(int(part), set())
                below.add(".".join(parts[at + 1 :]))
                levels += 1
                if levels == _MOST_LEVELS:
                    break
    return {prefix: {number: frozenset(below) for number, below in of.items()} for prefix, of in lists.items()}


def index_holes(lists: Lists) -> Iterator[Finding]:
    """Yield a warning for each list of like modules that goes on behind a missing number: ``index-hole``.

    A ``Sequential`` has numbers without parameters too: holes are only those between two modules of the same names, in
    a list of modules of modules that are mostly alike, where no more than one of five is missing; in a list named as
    a stack of layers is, one of four.
    """
    for prefix, members in lists.items():
        last, first = max(members), min(members)
        count = last - first + 1 - len(members)
        stack = prefix.rpartition(".")[2] in _STACKS and len(members) >= _LEAST_IN_STACK
        most = max(len(members) // _LEAST_SIBLINGS, int(stack))
        if not 0 < count <= most or not _alike(members):
            continue
        order = sorted(members)
        for below, above in pairwise(order):
            if above - below > 1 and members[below] == members[above]:
                lost = range(below + 1, above)
                what = f"{lost[0]}" if len(lost) == 1 else f"{lost[0]}-{lost[-1]}"
                said = f"{quoted(prefix)} has modules {first}-{last} and no {what}"
                yield Finding("index-hole", "warning", f"{prefix}.{lost[0]}", said, _LOST)


def _alike(members: Mapping[int, frozenset[str]]) -> bool:
    (names, times), *_ = Counter(members.values()).most_common(1)
    return 2 * times >= len(members) and any("." in name for name in names)


def lacking(lists: Lists) -> Iterator[Finding]:
    """Yield a warning for each module of a list that lacks what every sibling has: ``sibling-lacks``.

    What a first or last module leaves out as a whole, and what any leaves out together with all that lies beside it, is
    how networks are built; the same is never done to one of many in the middle, nor to half of a layer.
    """
    for prefix, members in lists.items():
        if len(members) < _LEAST_SIBLINGS or not any("." in name for below in members.values() for name in below):
            continue
        times = Counter(name for below in members.values() for name in below)
        nearly = [name for name, count in times.items() if count == len(members) - 1]
        everywhere = sum(count == len(members) for count in times.values())
        lost: dict[int, list[str]] = {}
        for name in nearly:
            number = next(number for number, below in members.items() if name not in below)
            if _is_lost(name, members[number], at_an_end=number in (min(members), max(members))):
                lost.setdefault(number, []).append(name)
        for number, names in lost.items():
            if len(names) > everywhere:  # it is a module of another kind
                continue
            said = f"{quoted(f'{prefix}.{number}')} lacks {listed(sorted(names))}, which all its "
            siblings = f"{len(members) - 1:,} siblings have"
            yield Finding("sibling-lacks", "warning", f"{prefix}.{number}.{min(names)}", said + siblings, _LOST)


def _is_lost(name: str, below: frozenset[str], *, at_an_end: bool) -> bool:
    layer = name.rpartition(".")[0]
    if layer and any(other.startswith(f"{layer}.") for other in below):
        return True
    block = layer.rpartition(".")[0]
    return not at_an_end and (not block or any(other.startswith(f"{block}.") for other in below))
