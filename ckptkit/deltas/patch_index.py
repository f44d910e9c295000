"""The index of a patch as JSON, which has each key, dtype and shape once, and the patch that an index describes."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.checkpoint.provenance import DELTA
from ckptkit.core.text import quoted
from ckptkit.deltas.patch import Patch, Side, contents_of
from ckptkit.deltas.patch_table import Look, Table
from ckptkit.digests.hashing import hash_function, header_of
from ckptkit.errors import FormatError

__all__ = ["Facts", "index_of", "patch_of"]

_hash: Final = hash_function("sha256")
_LONGEST_NAME: Final = 1000  # characters
_MOST_SIZES: Final = 4_000_000  # in the shapes of all tensors, which an output writes; 210,000 weights have a million


class Facts(NamedTuple):
    """What the document of a patch says: the digests of both sides, the compression, and what wrote the patch."""

    base: str
    result: str
    compression: str
    library: str


def index_of(patch: Patch) -> dict[str, object]:
    """Return the index of a patch. Tensors that are equal on both sides are in it once."""
    looks: dict[Look, int] = {}

    def look(info: TensorInfo) -> int:
        return looks.setdefault((info.dtype, info.shape), len(looks))

    base, result = patch.base, patch.result
    base_looks = [look(info) for info in base.infos.values()]
    place_in_base = {key: number for number, key in enumerate(base.infos)}
    place = {key: number for number, key in enumerate(result.infos)}
    is_same_order = list(base.infos) == list(result.infos)
    new = [key for key in result.infos if not _is_equal(key, key, base, result)]
    return {
        "base": {"keys": list(base.infos), "looks": base_looks, "digests": _joined(base.digests, base.infos)},
        "result": {
            "keys": None if is_same_order else [place_in_base.get(key, key) for key in result.infos],
            "new": [place[key] for key in new],
            "looks": [look(result.infos[key]) for key in new],
            "digests": _joined(result.digests, new),
        },
        "changed": sorted(place[key] for key in patch.changed),
        "whole": sorted(place[key] for key in patch.whole),
        "ties": [[place[key] for key in group] for group in patch.ties],
        "renamed": [[place[key], place_in_base[old]] for key, old in patch.renamed.items()],
        "metadata": dict(patch.metadata),
        "versions": dict(patch.versions),
        "base_name": patch.base_name[:_LONGEST_NAME],
        "result_format": patch.result_format[:_LONGEST_NAME],
        "looks": [[dtype, list(shape)] for dtype, shape in looks],
    }


def patch_of(table: Table, facts: Facts) -> Patch:
    """Return the patch that an index describes. Raises ``FormatError`` where it contradicts itself."""
    looks = table.looks("looks")
    part = table.part("base")
    keys = part.texts("keys")
    base = Side(*_tensors(part, keys, looks), facts.base)
    patch = _with_result(table, base, looks, facts)
    _check(patch)
    return patch


def _joined(digests: Mapping[str, str], keys: Iterable[str]) -> str:
    return base64.b64encode(bytes.fromhex("".join(digests[key] for key in keys))).decode()


def _is_equal(key: str, base_key: str, base: Side, result: Side) -> bool:
    """Return whether the tensor of the result is that of the base, where it has the key ``base_key``."""
    old, new = base.infos.get(base_key), result.infos[key]
    if old is None or (old.dtype, old.shape) != (new.dtype, new.shape):
        return False
    return base.digests[base_key] == result.digests[key]


def _tensors(part: Table, keys: Sequence[str], looks: Sequence[Look]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return dtype and shape of each key, and its digest."""
    places = part.numbers("looks", len(looks))
    if len(places) != len(keys):
        raise part.wrong("looks")
    if sum(len(looks[place][1]) for place in places) > _MOST_SIZES:
        raise FormatError(f"the shapes of the tensors in the patch have more than {_MOST_SIZES:,} sizes, the limit")
    infos = {key: TensorInfo(key, *looks[place]) for key, place in zip(keys, places, strict=True)}
    return infos, dict(zip(keys, part.digests("digests", len(keys)), strict=True))


def _with_result(table: Table, base: Side, looks: Sequence[Look], facts: Facts) -> Patch:
    part, base_keys = table.part("result"), list(base.infos)
    keys = part.keys("keys", base_keys)
    infos, digests = _tensors(part, [keys[number] for number in part.numbers("new", len(keys))], looks)
    missing = next((key for key in keys if key not in infos and key not in base.infos), None)
    if missing is not None:
        raise FormatError(f"the index of the patch has no dtype and shape of {quoted(missing)}")
    result = Side(
        {key: infos.get(key) or base.infos[key] for key in keys},
        {key: digests.get(key) or base.digests[key] for key in keys},
        facts.result,
    )
    changed, whole = ([keys[number] for number in table.numbers(name, len(keys))] for name in ("changed", "whole"))
    ties = tuple(tuple(keys[number] for number in group) for group in table.groups("ties", len(keys)))
    renamed = {keys[new]: base_keys[old] for new, old in table.moves("renamed", len(keys), len(base_keys))}
    later = [key for group in ties for key in group[1:]]
    stored = [*changed, *whole, *renamed, *later]
    if len(set(stored)) != len(stored) or min(map(len, ties), default=2) < 2:
        raise FormatError("the index of the patch says of a tensor twice how it is made")
    return Patch(
        base,
        result,
        frozenset(changed),
        frozenset(whole),
        ties,
        table.texts_by_name("metadata"),
        facts.compression,
        facts.library[:_LONGEST_NAME],
        renamed,
        table.numbers_by_name("versions"),
        table.text("base_name")[:_LONGEST_NAME],
        table.text("result_format")[:_LONGEST_NAME],
    )


def _check(patch: Patch) -> None:
    """Raise ``FormatError`` for a result that cannot be made as the index says, and for a digest of other contents."""
    if DELTA in patch.metadata:
        raise FormatError("the patch would make a patch, and not a checkpoint")
    base, result = patch.base, patch.result
    first_of_tie = {key: group[0] for group in patch.ties for key in group[1:]}
    for key, info in result.infos.items():
        if key in patch.whole:
            continue
        if key in first_of_tie:
            first = first_of_tie[key]
            other, digest = result.infos[first], result.digests[first]
            is_made = (other.dtype, other.shape, digest) == (info.dtype, info.shape, result.digests[key])
        elif key in patch.changed:
            is_made = key in base.infos and base.infos[key].dtype == info.dtype
        else:
            is_made = _is_equal(key, patch.renamed.get(key, key), base, result)
        if not is_made:
            raise FormatError(f"the index of the patch does not say how {quoted(key)} is made")
    for name, side in (("base", base), ("result", result)):
        if contents_of(side.digests) != side.contents:
            raise FormatError(f"the patch has another digest of the {name} than follows from its tensors")
        for key, info in side.infos.items():  # nothing is read of a tensor without bytes, so nothing else compares it
            if not info.nbytes and side.digests[key] != _hash(header_of(info.dtype, info.shape)).hexdigest():
                raise FormatError(f"the patch has the digest of another tensor for {quoted(key)} of the {name}")
