"""All methods of merging by name."""

from __future__ import annotations

from collections.abc import Mapping

from ckptkit.core.text import did_you_mean, quoted
from ckptkit.errors import ArgumentError
from ckptkit.plans.methods.averages.differences import AddDifference, TrainDifference
from ckptkit.plans.methods.averages.ema import Ema
from ckptkit.plans.methods.averages.linear import Average, Linear
from ckptkit.plans.methods.model import Method
from ckptkit.plans.methods.pairs.arcee_fusion import ArceeFusion
from ckptkit.plans.methods.pairs.nearswap import Nearswap
from ckptkit.plans.methods.pairs.passthrough import Passthrough
from ckptkit.plans.methods.spherical.karcher import Karcher
from ckptkit.plans.methods.spherical.multislerp import Multislerp
from ckptkit.plans.methods.spherical.nuslerp import Nuslerp
from ckptkit.plans.methods.spherical.slerp import Slerp
from ckptkit.plans.methods.task_vectors.arithmetic import TaskArithmetic
from ckptkit.plans.methods.task_vectors.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from ckptkit.plans.methods.task_vectors.dare import DareLinear, DareTies
from ckptkit.plans.methods.task_vectors.della import Della, DellaLinear
from ckptkit.plans.methods.task_vectors.model_stock import ModelStock
from ckptkit.plans.methods.task_vectors.sce import Sce
from ckptkit.plans.methods.task_vectors.ties import Ties

__all__ = ["METHODS", "method_named"]

_KINDS: tuple[type[Method], ...] = (
    Linear, Average, Ema, AddDifference, TrainDifference, Slerp, Nuslerp, Multislerp, Karcher,
    TaskArithmetic, Ties, DareLinear, DareTies, DellaLinear, Della, Breadcrumbs, BreadcrumbsTies,
    Sce, ModelStock, Nearswap, ArceeFusion, Passthrough,
)  # fmt: skip
METHODS: Mapping[str, type[Method]] = {kind.name: kind for kind in _KINDS}


def method_named(name: str) -> type[Method]:
    """Return the method of this name. Raises ``ArgumentError`` for an unknown name, with the nearest one."""
    if name in METHODS:
        return METHODS[name]
    hint = did_you_mean(name, METHODS, f"known: {', '.join(METHODS)}")
    raise ArgumentError(f"there is no method {quoted(name)}", hint=hint)
