"""Checks that read no values: missing layers, layers that lack a tensor, mixed dtypes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice, pairwise

from ckptkit.checks import codes
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural, quoted
from ckptkit.quantized import Quantized

__all__ = ["FLOATS", "check_structure"]

FLOATS = frozenset(
    {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"}
)
_MIN_SIBLINGS = 4
# The names that model libraries give to a stack of layers. Every module of such a list has parameters.
_STACK_NAMES = frozenset({"layers", "layer", "blocks", "block", "h", "resblocks", "transformer_blocks"})
_MIN_IN_STACK = 3
_MAX_NESTED_LISTS = 4
_MODULE_NUMBER = re.compile(r"\.[0-9]{1,6}(?=\.)")
_NumberedModules = Mapping[str, Mapping[int, frozenset[str]]]


def check_structure(infos: Mapping[str, TensorInfo], quantized: Quantized, path: str) -> Iterator[Finding]:
    """Yield the findings of every check of names, shapes and dtypes; all parts of a quantised weight count as one.

    ``path`` is the word that gives the checkpoint to a command, or empty.
    """
    yield from _check_not_dense(infos.values())
    parts = quantized.by_key
    plain = [info for key, info in infos.items() if key not in parts] if parts else infos.values()
    yield from _check_dtype_mix(plain)
    keys: Iterable[str] = dict.fromkeys(parts[key].key if key in parts else key for key in infos) if parts else infos
    lists = _numbered_modules(keys)
    hint = f"ckpt diff MODEL {path or 'PATH'} lists all keys that would not load"
    yield from _check_index_holes(lists, hint)
    yield from _check_siblings(lists, hint)


def _check_not_dense(infos: Iterable[TensorInfo]) -> Iterator[Finding]:
    """Yield a ``not-dense`` note for each kind of tensor that is listed without its values, such as sparse tensors."""
    by_kind: dict[str, list[str]] = {}
    for info in infos:
        if info.kind != "dense":
            by_kind.setdefault(info.kind, []).append(info.key)
    for kind, keys in by_kind.items():
        count = plural(len(keys), f"{kind} tensor")
        message = f"{count} listed, but the values are not read or written: {listed(keys)}"
        yield codes.NOT_DENSE.finding(keys[0], message, keys=keys)


def _check_dtype_mix(infos: Collection[TensorInfo]) -> Iterator[Finding]:
    """Yield a ``dtype-mix`` note that names the tensors without the usual dtype; only floating-point dtypes count."""
    if len(FLOATS.intersection([info.dtype for info in infos])) < 2:
        return
    by_dtype: dict[str, list[str]] = {}
    elements: Counter[str] = Counter()
    for info in infos:
        count = info.elements if info.dtype in FLOATS else 0
        if count:
            by_dtype.setdefault(info.dtype, []).append(info.key)
            elements[info.dtype] += count
    if len(by_dtype) < 2:
        return
    usual, *others = (dtype for dtype, _ in elements.most_common())
    rest = "; ".join(f"{dtype} in {len(by_dtype[dtype]):,}: {listed(by_dtype[dtype])}" for dtype in others)
    message = f"{usual} in {plural(len(by_dtype[usual]), 'tensor')}, {rest}"
    yield codes.DTYPE_MIX.finding(
        by_dtype[others[0]][0], message, keys=(key for dtype in others for key in by_dtype[dtype])
    )


def _numbered_modules(keys: Iterable[str]) -> _NumberedModules:
    """Return the numbered lists of modules in these keys: prefix → number → names of the tensors below it."""
    modules: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        for match in islice(_MODULE_NUMBER.finditer(key), _MAX_NESTED_LISTS):
            end = match.end()
            modules[key[:end]].add(key[end + 1 :])
    lists: dict[str, dict[int, frozenset[str]]] = defaultdict(dict)
    for module, names in modules.items():
        prefix, _, text = module.rpartition(".")
        members, number = lists[prefix], int(text)
        members[number] = members[number] | names if number in members else frozenset(names)  # "01" is 1, too
    return lists


def _check_index_holes(lists: _NumberedModules, hint: str) -> Iterator[Finding]:
    """Yield an ``index-hole`` warning for each missing number between two layers that have the same tensors.

    A ``Sequential`` also skips the numbers of modules without parameters. Therefore most layers of the list must be
    alike and have submodules, and at most one number in five may be missing. In a list that is named like a stack of
    layers, one missing number is always reported.
    """
    for prefix, members in lists.items():
        last, first = max(members), min(members)
        missing = last - first + 1 - len(members)
        in_stack = prefix.rpartition(".")[2] in _STACK_NAMES and len(members) >= _MIN_IN_STACK
        most = max(len(members) // _MIN_SIBLINGS, int(in_stack))
        if not 0 < missing <= most or not _are_alike(members):
            continue
        for below, above in pairwise(sorted(members)):
            if above - below > 1 and members[below] == members[above]:
                hole = range(below + 1, above)
                numbers = f"{hole[0]}" if len(hole) == 1 else f"{hole[0]}-{hole[-1]}"
                message = f"{quoted(prefix)} has modules {first}-{last}, but not {numbers}"
                yield codes.INDEX_HOLE.finding(f"{prefix}.{hole[0]}", message, hint)


def _are_alike(members: Mapping[int, frozenset[str]]) -> bool:
    """Return whether most members have the same tensors, and these are in submodules."""
    (names, count), *_ = Counter(members.values()).most_common(1)
    return 2 * count >= len(members) and any("." in name for name in names)


def _check_siblings(lists: _NumberedModules, hint: str) -> Iterator[Finding]:
    """Yield a ``sibling-lacks`` warning for each module of a list that lacks a tensor which all its siblings have.

    Two cases are usual and not reported. The first or the last module of a list may lack a whole submodule, and any
    module may lack a whole block of submodules.
    """
    for prefix, members in lists.items():
        if len(members) < _MIN_SIBLINGS or not any("." in name for names in members.values() for name in names):
            continue
        count = Counter(name for names in members.values() for name in names)
        in_all_but_one = [name for name, times in count.items() if times == len(members) - 1]
        in_all = sum(times == len(members) for times in count.values())
        lacking: dict[int, list[str]] = {}
        for name in in_all_but_one:
            number = next(number for number, names in members.items() if name not in names)
            if _is_lost(name, members[number], at_an_end=number in (min(members), max(members))):
                lacking.setdefault(number, []).append(name)
        for number, names in sorted(lacking.items()):  # names come from sets, in another order in every process
            if len(names) > in_all:  # the module is of another class
                continue
            module = f"{prefix}.{number}"
            siblings = f"all its {len(members) - 1:,} siblings have"
            message = f"{quoted(module)} lacks {listed(sorted(names))}, which {siblings}"
            yield codes.SIBLING_LACKS.finding(f"{module}.{min(names)}", message, hint)


def _is_lost(name: str, names: frozenset[str], *, at_an_end: bool) -> bool:
    """Return whether the module still has other tensors of the same submodule.

    Between the ends of a list, other tensors of the same block of submodules are enough.
    """
    layer = name.rpartition(".")[0]
    if layer and any(other.startswith(f"{layer}.") for other in names):
        return True
    block = layer.rpartition(".")[0]
    return not at_an_end and (not block or any(other.startswith(f"{block}.") for other in names))
