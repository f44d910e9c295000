"""Spherical linear interpolation of two tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.core.text import short_number
from ckptkit.plans.methods.model import MergedTensor, Method, Paper, number

if TYPE_CHECKING:
    from ckptkit.values.merging.gram import Factors
    from ckptkit.values.merging.model import Array, Merging

__all__ = ["Slerp"]

_PARALLEL = 0.9995  # the cosine from which the arc is taken for its chord
_NO_NORM = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Slerp(Method):
    """``(sin((1-t) o) a + sin(t o) b) / sin o`` with the angle o; ``(1-t) a + t b`` where ``|cos o|`` is above 0.9995.

    The second is a straight line, which does not keep the length. Many fine-tuned copies of one base are that near. It
    is also taken where one of the norms is at most 1e-8. The tensors are taken as they are, and not scaled to unit
    length.

    Source: Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985.
    """

    t: float = number("place between the first input (0) and the second (1)")
    name: ClassVar[str] = "slerp"
    paper: ClassVar[Paper | None] = Paper("Animating Rotation with Quaternion Curves")
    fewest: ClassVar[int] = 2
    most: ClassVar[int | None] = 2
    for_more: ClassVar[str | None] = "multislerp and karcher merge more, by the weight of each input"

    def notes(self) -> tuple[str, ...]:
        """Say where the result lies beyond one of the inputs."""
        if 0 <= self.t <= 1:
            return ()
        return (f"slerp: t is {short_number(self.t)}, so the result lies beyond one of the inputs",)

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the interpolation; at the ends, one of the inputs."""
        from ckptkit.values.merging.combination import combination
        from ckptkit.values.merging.gram import ByAngles

        if self.t in (0, 1):
            return combination([1 - self.t, self.t], is_mean=True)
        return ByAngles(tuple(tensor.positions), tensor.has_base, self.factors)

    def factors(self, gram: Array) -> Factors:
        """Return the factors of both tensors."""
        from ckptkit.values.merging.gram import Factors
        from ckptkit.values.merging.model import Facts

        t, norms = self.t, [math.sqrt(gram[i, i]) for i in range(2)]
        if min(norms) <= _NO_NORM:
            return Factors((1 - t, t))
        cosine = max(-1.0, min(1.0, float(gram[0, 1]) / (norms[0] * norms[1])))
        if abs(cosine) > _PARALLEL:
            return Factors((1 - t, t), Facts("the inputs are opposite: interpolated linearly" if cosine < 0 else ""))
        angle = math.acos(cosine)
        return Factors((math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)))
