"""Remove the pairs of a quantised and a plain tensor: codes become numbers by no rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ckptkit.align.evidence import ModuleMatch, TensorLink
from ckptkit.align.matching import Matching
from ckptkit.align.pairing import ModulePair
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import quoted
from ckptkit.quantized import Quantized, quantized_weights

__all__ = ["QuantizedSides"]


@dataclass(frozen=True)
class QuantizedSides:
    """The quantised weights of both checkpoints."""

    expected: Checkpoint
    found: Checkpoint
    in_expected: Quantized = field(init=False)
    in_found: Quantized = field(init=False)

    def __post_init__(self) -> None:
        """Find the weights, from headers only."""
        object.__setattr__(self, "in_expected", quantized_weights(self.expected))
        object.__setattr__(self, "in_found", quantized_weights(self.found))

    def __bool__(self) -> bool:
        """Return whether any weight is quantised."""
        return bool(self.in_expected or self.in_found)

    @property
    def note(self) -> str:
        """A sentence about weights that are quantised on one side only, or an empty string."""
        if bool(self.in_expected) == bool(self.in_found):
            return ""
        side, weights = ("expected", self.in_expected.weights) if self.in_expected else ("found", self.in_found.weights)
        are = "weight is" if len(weights) == 1 else "weights are"
        return (
            f"{len(weights):,} {are} quantised only in {side}, such as {quoted(weights[0].key)} ({weights[0].scheme}): "
            "no rule makes numbers of codes"
        )

    def without_wrong_pairs(self, matching: Matching) -> Matching:
        """Return the matching without pairs of a part of a quantised weight and any other tensor."""
        if not self:
            return matching
        undecided = [
            replace(group, pair=None if group.pair is None else self.without_wrong_links(group.pair))
            for group in matching.undecided
        ]
        pairs = [pair for pair in map(self.without_wrong_links, matching.pairs) if pair is not None]
        return replace(matching, pairs=pairs, undecided=undecided)

    def without_wrong_links(self, pair: ModulePair) -> ModulePair | None:
        """Return the pair without wrong tensors, or None if no tensor is left."""
        links = tuple(self._right_links(pair.match))
        if links == pair.match.links:
            return pair
        return replace(pair, match=replace(pair.match, links=links, is_complete=False)) if links else None

    def _right_links(self, match: ModuleMatch) -> Iterator[TensorLink]:
        for link in match.links:
            if link.operations or len(link.expected) != 1 or len(link.found) != 1:
                if not self._has_parts(link):
                    yield link
                continue
            expected, found = link.expected[0], link.found[0]
            pairs = [(expected.tensors[shifted], found.tensors[index]) for shifted, index in match.index_pairs(link)]
            right = [pair for pair in pairs if self.are_alike(*pair)]
            if len(right) == len(pairs):
                yield link
            elif right and all(wanted.key == given.key for wanted, given in right):
                # A rule would rename the tensors of the other layers too, but equal names need no rule.
                kept = {wanted.key for wanted, _ in right}
                tensors = {index: info for index, info in expected.tensors.items() if info.key in kept}
                yield replace(link, expected=(replace(expected, tensors=tensors),))

    def _has_parts(self, link: TensorLink) -> bool:
        sides = ((link.expected, self.in_expected), (link.found, self.in_found))
        return any(
            info.key in quantized.by_key
            for members, quantized in sides
            for member in members
            for info in member.tensors.values()
        )

    def are_alike(self, expected: TensorInfo, found: TensorInfo) -> bool:
        """Return whether both tensors are plain, or both are the same part of weights of one form."""
        first, second = self.in_expected.by_key.get(expected.key), self.in_found.by_key.get(found.key)
        if first is None or second is None:
            return first is second
        if len(first.parts) != len(second.parts) or expected.dtype != found.dtype:
            return False
        return (expected.key == first.coded) == (found.key == second.coded)
