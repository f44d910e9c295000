"""What the search finds of a weight, and the parts that configuration, metadata or other weights say it should have."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from ckptkit.quantized.configuration import Configuration
from ckptkit.quantized.known import weights_of_groups
from ckptkit.quantized.table import SCHEMES, Scheme

__all__ = ["Found", "with_expected_parts"]

_ROLE: Final = "zeros"  # without zero points, codes of an asymmetric scheme become other numbers
_NAMES: Final = "_tensor_data_names"  # in what torchao says of each tensor
_FLATTENED: Final = tuple(scheme for scheme in SCHEMES if scheme.name == "torchao")


class Found(NamedTuple):
    """A weight that is found: the row of the table, the stem of the keys, the parts, and the name of the scheme."""

    scheme: Scheme
    stem: str
    parts: tuple[str, ...]
    missing: tuple[str, ...] = ()
    name: str = ""

    @property
    def key(self) -> str:
        """Return the name of the weight."""
        parent, dot, name = self.stem.rpartition(".")
        stem = f"{parent}{dot}{name.removeprefix('_')}" if self.scheme.is_private else self.stem
        return stem + self.scheme.weight

    @property
    def roles(self) -> tuple[tuple[str, str], ...]:
        """Return the key of the part that has each role for the decoder; broken weights have two for one role."""
        coding = self.scheme.coding
        keys = ((role, self.stem + ending) for role, endings in (coding.roles if coding else ()) for ending in endings)
        return tuple((role, key) for role, key in keys if key in self.parts)


def with_expected_parts(
    found: Iterable[Found], keys: Collection[str], metadata: Mapping[str, str], configuration: Configuration
) -> list[Found]:
    """Return the weights, each with the expected parts that it lacks as ``missing``.

    Zero points are expected where the configuration says that codes are not symmetric, or where at least half of the
    weights of a scheme have them and the configuration does not say. The metadata of torchao names the parts of each
    weight; a weight of which only companions are left is added.
    """
    weights = list(found)
    by_scheme: dict[str, list[Found]] = {}
    for weight in weights:
        if weight.scheme not in _FLATTENED:
            by_scheme.setdefault(weight.scheme.name, []).append(weight)
    missing: dict[str, tuple[str, ...]] = {}
    for alike in by_scheme.values():
        missing.update(_missing_zeros(alike, configuration))
    parts_of = {part: weight.key for weight in weights for part in weight.parts}
    for scheme, key, stem, names in (
        _flattened(keys, metadata) if any(weight.scheme in _FLATTENED for weight in weights) else ()
    ):
        wanted = [stem + name for name in names]
        lacking = tuple(name for name in wanted if name not in keys)
        there = tuple(name for name in wanted if name in keys)
        if lacking and there and key not in map(parts_of.get, there):
            weights.append(Found(scheme, stem, there, lacking))
        elif lacking and there:
            missing[key] = lacking
    return [
        weight._replace(missing=tuple(dict.fromkeys((*weight.missing, *missing.get(weight.key, ())))))
        for weight in weights
    ]


def _missing_zeros(alike: list[Found], configuration: Configuration) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the key of each weight of one scheme that lacks zero points, with the key that they would have."""
    coding = alike[0].scheme.coding
    endings = dict(coding.roles).get(_ROLE, ()) if coding else ()
    if not endings:
        return
    zeros = [next((weight.stem + end for end in endings if weight.stem + end in weight.parts), "") for weight in alike]
    said = {
        group.get("symmetric", True) is not False
        for section in configuration.sections
        for group in weights_of_groups(section)
    }
    is_configured = said == {False}
    is_usual = not said and 2 * sum(map(bool, zeros)) >= len(zeros)
    for weight, key in zip(alike, zeros, strict=True) if is_configured or is_usual else ():
        if not key:
            yield weight.key, (weight.stem + endings[0],)


def _flattened(
    keys: Collection[str], metadata: Mapping[str, str]
) -> Iterator[tuple[Scheme, str, str, tuple[str, ...]]]:
    """Yield each tensor that torchao flattened: a row of the table, its key, the stem and the endings of its parts."""
    for key, text in metadata.items():
        if _NAMES not in text:
            continue
        try:
            described = json.loads(text)
        except (ValueError, RecursionError):
            continue
        names = described.get(_NAMES) if isinstance(described, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            continue
        parent, dot, name = key.rpartition(".")
        for scheme in _FLATTENED:
            stem = f"{parent}{dot}_{name}" if scheme.is_private else key
            endings = tuple(f"{scheme.coded[0]}{name}" for name in names)
            if scheme.coded in endings and any(stem + ending in keys for ending in endings):
                yield scheme, key, stem, endings
                break
