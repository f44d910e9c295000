"""Checks for equal tensors that are stored separately: lost ties, and duplicates."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Protocol

from ckptkit.checks import codes
from ckptkit.checks.meant import is_mask
from ckptkit.checks.structure import FLOATS
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding, Severity
from ckptkit.core.text import human_bytes, listed, plural, quoted
from ckptkit.values.extremes import Extremes

__all__ = ["Bytes", "check_duplicates", "check_recorded_ties", "equal_groups"]

_MIN_BYTES = 1024  # smaller tensors can be equal by chance, and their copies cost nothing
_LARGEST_NUMBER = 8  # bytes
_MAX_COMPARED = 8  # distinct tensors with one fingerprint; further tensors are skipped
# Buffers that every module computes for itself.
_COMPUTED = re.compile(r"(?:cos|sin)_?cached?|inv_freq|freqs|coords|grid|anchor|kernel|window|sinusoid|A_log")
_SECOND_BIAS = re.compile(r"(?:^|(?<=\.))bias_hh(?=_l\d+(?:_reverse)?$|$)")
_EMBEDDING = re.compile(r"(?:^|[._])(?:embed\w*|wte|word_embeddings|tok_embeddings|token_embedding|shared)\.weight")
_HEAD = re.compile(r"(?:^|[._])(?:lm_head|head|output|embed_out|decoder|proj_out|generator|classifier)\.weight")
_TIE_HINT = "tie them in the model before training (tie_weights): otherwise they diverge"
EqualBytes = Callable[[str, str], bool]


class Bytes(Protocol):
    """Ways to look at the bytes of the tensors, which are read again only where that is needed."""

    def are_equal(self, first: str, second: str) -> bool:
        """Return whether two tensors have equal bytes."""
        ...

    def begin(self, key: str) -> bytes:
        """Return the first bytes of a tensor."""
        ...

    def have_one_magnitude(self, key: str) -> bool:
        """Return whether all finite numbers of a tensor that are not zero have the same magnitude."""
        ...


def equal_groups(infos: Mapping[str, TensorInfo], stats: Mapping[str, Extremes], contents: Bytes) -> list[list[str]]:
    """Return groups of keys with equal tensors that are stored separately; of tied keys, only the first counts.

    Tensors that are often equal in healthy networks are skipped: small tensors, integers, masks, computed buffers, and
    tensors with only one magnitude apart from zeros.
    """
    candidates = [
        key
        for key, found in stats.items()
        if found.count * _LARGEST_NUMBER >= _MIN_BYTES  # much faster to ask than the size of a tensor
        and infos[key].dtype in FLOATS
        and infos[key].nbytes >= _MIN_BYTES
        and found.abs_max
        and not _is_computed(key)
    ]
    alike = _grouped(candidates, lambda key: _sign(infos[key], stats[key]))
    groups: list[list[str]] = []
    for keys in (group for some in alike for group in _grouped(some, contents.begin)):
        if _may_have_one_magnitude(stats[keys[0]]) and contents.have_one_magnitude(keys[0]):
            keys = [key for key in keys[1:] if not contents.have_one_magnitude(key)]  # noqa: PLW2901
        distinct: list[list[str]] = []
        for key in keys if len(keys) > 1 else ():
            for group in distinct[:_MAX_COMPARED]:
                if _are_equal(infos, group[0], key, contents.are_equal):
                    group.append(key)
                    break
            else:
                distinct.append([key])
        separate = (_without_twins(_without_tied_keys(infos, group)) for group in distinct)
        groups += [group for group in separate if len(group) > 1]
    return groups


def _sign(info: TensorInfo, found: Extremes) -> tuple[object, ...]:
    """Return exact counts and extremes: equal tensors agree in all of them, other tensors rarely do."""
    return info.dtype, info.shape, found.nan, found.posinf, found.zeros, found.subnormal, found.min, found.max


def _grouped(keys: Iterable[str], sign_of: Callable[[str], Hashable]) -> list[list[str]]:
    """Return groups of at least two keys with one sign, such as the same counts and extremes."""
    by_sign: dict[Hashable, list[str]] = {}
    for key in keys:
        by_sign.setdefault(sign_of(key), []).append(key)
    return [group for group in by_sign.values() if len(group) > 1]


def _are_equal(infos: Mapping[str, TensorInfo], first: str, second: str, have_equal_bytes: EqualBytes) -> bool:
    return infos[first].view == infos[second].view is not None or have_equal_bytes(first, second)


def _without_tied_keys(infos: Mapping[str, TensorInfo], keys: list[str]) -> list[str]:
    """Return the keys without those that share the memory of an earlier key."""
    places: dict[object, str] = {}
    for key in keys:
        places.setdefault(infos[key].view or key, key)
    return list(places.values())


def _without_twins(keys: list[str]) -> list[str]:
    """Return the keys without the second bias of an LSTM or RNN that is equal to the first of the same layer.

    The two are added, so they have the same gradient: where both began with zeros, training keeps them equal.
    """
    return [key for key in keys if _SECOND_BIAS.sub("bias_ih", key) not in keys or not _SECOND_BIAS.search(key)]


def _may_have_one_magnitude(found: Extremes) -> bool:
    """Return whether the extremes allow that all values that are not zero have the same magnitude, as in a mask."""
    return found.min in (found.max, 0) or found.max == 0 or found.min == -(found.max or 0)


def _is_computed(key: str) -> bool:
    return is_mask(key) or _COMPUTED.search(key.rpartition(".")[2]) is not None


def check_duplicates(infos: Mapping[str, TensorInfo], groups: list[list[str]]) -> Iterator[Finding]:
    """Yield a ``lost-tie`` for an embedding and an output head, and a ``duplicate`` for other equal tensors.

    The findings are warnings in formats that record ties, such as torch's: the saved model had two tensors. They are
    notes in formats that store every key separately.
    """
    for keys in groups:
        info = infos[keys[0]]
        severity: Severity = "warning" if info.view is not None else "note"
        cost = f"{human_bytes((len(keys) - 1) * info.nbytes)} more than once"
        if any(map(_EMBEDDING.search, keys)) and any(map(_HEAD.search, keys)):
            message = f"{listed(keys)} are equal, but not tied ({cost}): an embedding and a head are often tied"
            yield codes.LOST_TIE.finding(keys[0], message, _TIE_HINT, severity=severity)
        else:
            message = f"{plural(len(keys), 'equal tensor')}, {quoted(str(info))}, not tied ({cost}): {listed(keys)}"
            hint = "was one of them copied instead of trained, or was a tie lost?" if severity == "warning" else ""
            yield codes.DUPLICATE.finding(keys[0], message, hint, severity=severity)


def check_recorded_ties(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], have_equal_bytes: EqualBytes
) -> Iterator[Finding]:
    """Yield a ``lost-tie`` if the metadata ties two keys, but both are in the file and differ.

    ``safetensors.torch.save_model`` records in the metadata which key holds a tensor that had several names.
    """
    for name, stored_as in metadata.items():
        if name in infos and stored_as in infos and name != stored_as:
            info, other = infos[name], infos[stored_as]
            if (info.dtype, info.shape) != (other.dtype, other.shape) or not have_equal_bytes(name, stored_as):
                message = f"the metadata ties {quoted(name)} to {quoted(stored_as)}, but both are stored and differ"
                yield codes.LOST_TIE.finding(name, message, _TIE_HINT)
