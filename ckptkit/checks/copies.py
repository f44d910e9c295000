"""Tensors of equal content that are stored apart: ties that were lost, and copies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from ckptkit.checks.numbers import is_mask
from ckptkit.checks.structure import FLOATS
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding, Severity
from ckptkit.core.text import human_bytes, listed, plural, quoted
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["copies", "equal_groups", "untied"]

_SMALLEST = 1024  # bytes: small tensors are equal by chance, and cost nothing
_MOST_COMPARED = 8  # of one fingerprint: what is not equal to these is left
_COMPUTED = re.compile(
    r"(?:cos|sin)_?cached?|inv_freq|freqs|coords|grid|anchor|kernel|window|sinusoid|A_log"
)  # by each module alike
_EMBEDDING = re.compile(r"(?:^|[._])(?:embed\w*|wte|word_embeddings|tok_embeddings|token_embedding|shared)\.weight")
_HEAD = re.compile(r"(?:^|[._])(?:lm_head|head|output|embed_out|decoder|proj_out|generator|classifier)\.weight")
_TIE = "tie them again in the model before training (tie_weights), or training moves them apart"


def _fingerprint(info: TensorInfo, found: ValueStats) -> tuple[object, ...]:
    """Return what equal tensors have in common and others hardly ever: exact counts, extremes and magnitudes."""
    bins = tuple(found.histogram.items())
    return info.dtype, info.shape, found.nan, found.posinf, found.zeros, found.min, found.max, bins


def equal_groups(
    infos: Mapping[str, TensorInfo], numbers: Mapping[str, ValueStats], same: Callable[[str, str], bool]
) -> list[list[str]]:
    """Return the groups of keys whose tensors lie apart and are equal; ``same`` compares the bytes of two.

    Left out are small tensors, integers, masks, tables that each module computes for itself, and what holds one
    magnitude alone beside zeros: all of these are equal in honest networks.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for key, found in numbers.items():
        info = infos[key]
        if info.dtype in FLOATS and info.nbytes >= _SMALLEST and not _is_plain(found) and not _is_computed(key):
            alike.setdefault(_fingerprint(info, found), []).append(key)
    groups: list[list[str]] = []
    for keys in alike.values():
        kinds: list[list[str]] = []
        for key in keys if len(keys) > 1 else ():
            kind = next((kind for kind in kinds[:_MOST_COMPARED] if _equal(infos, kind, key, same)), None)
            if kind is None:
                kinds.append([key])
            else:
                kind.append(key)
        groups += [apart for kind in kinds if len(apart := _apart(infos, kind)) > 1]
    return groups


def _equal(infos: Mapping[str, TensorInfo], kind: list[str], key: str, same: Callable[[str, str], bool]) -> bool:
    return infos[kind[0]].view == infos[key].view is not None or same(kind[0], key)


def _apart(infos: Mapping[str, TensorInfo], keys: list[str]) -> list[str]:
    """Return the first key of each place."""
    places: dict[object, str] = {}
    for key in keys:
        places.setdefault(infos[key].view or key, key)
    return list(places.values())


def _is_plain(found: ValueStats) -> bool:
    most = found.abs_max
    return not most or found.l1 is None or abs(found.l1 - most * (found.finite - found.zeros)) <= 1e-9 * found.l1


def _is_computed(key: str) -> bool:
    return is_mask(key) or _COMPUTED.search(key.rpartition(".")[2]) is not None


def copies(infos: Mapping[str, TensorInfo], groups: list[list[str]]) -> Iterator[Finding]:
    """Yield ``lost-tie`` for an embedding and a head, and ``duplicate`` for other tensors of equal content.

    Warnings where the file could have kept them in one place, as torch's can: who saved it had two. Notes in other
    formats, which have no ties and store each key for itself.
    """
    for keys in groups:
        info = infos[keys[0]]
        severity: Severity = "warning" if info.view is not None else "note"
        spare = f"{human_bytes((len(keys) - 1) * info.nbytes)} more than once"
        if any(map(_EMBEDDING.search, keys)) and any(map(_HEAD.search, keys)):
            said = f"{listed(keys)} are equal and stored apart ({spare}): an embedding and a head that are mostly tied"
            yield Finding("lost-tie", severity, keys[0], said, _TIE)
        else:
            said = f"{plural(len(keys), 'tensor')} of equal content, {quoted(str(info))}, stored apart ({spare}): "
            hint = "one that was copied instead of trained, or a tie that was lost?" if severity == "warning" else ""
            yield Finding("duplicate", severity, keys[0], said + listed(keys), hint)


def untied(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], same: Callable[[str, str], bool]
) -> Iterator[Finding]:
    """Yield a ``lost-tie`` where the metadata says that two keys are one tensor, and both are there and differ.

    ``safetensors.torch.save_model`` records there under which key it kept a tensor that had several.
    """
    for name, kept in metadata.items():
        if name in infos and kept in infos and name != kept:
            one, other = infos[name], infos[kept]
            if (one.dtype, one.shape) != (other.dtype, other.shape) or not same(name, kept):
                said = f"{quoted(name)} is tied to {quoted(kept)}, the metadata says, and both are there and differ"
                yield Finding("lost-tie", "warning", name, said, _TIE)
