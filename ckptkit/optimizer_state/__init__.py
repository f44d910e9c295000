"""The state of an optimizer by the names of its parameters: read in each of torch's forms, edited as weights are.

Everything here takes values and gives values; ``open_optimizer`` opens a file for it.
"""

from __future__ import annotations

from ckptkit.optimizer_state.compare import optimizer_state_diff, state_findings
from ckptkit.optimizer_state.forms import FoundState, lay_out, read_state, to_dict
from ckptkit.optimizer_state.groups import order_like, resplit
from ckptkit.optimizer_state.load import OptimizerLoadReport, load_optimizer_state
from ckptkit.optimizer_state.model import (
    ELEMENTWISE,
    FORMS,
    Change,
    LazyTensor,
    NamedGroup,
    OptimizerState,
    Unknown,
    number_of,
    parameter_shape,
    slot_kind,
    tensors_in,
)
from ckptkit.optimizer_state.naming import positions, structure_findings, to_named
from ckptkit.optimizer_state.prune import prune
from ckptkit.optimizer_state.remap import remap
from ckptkit.optimizer_state.write import write_optimizer_state

__all__ = [
    "ELEMENTWISE",
    "FORMS",
    "Change",
    "FoundState",
    "LazyTensor",
    "NamedGroup",
    "OptimizerLoadReport",
    "OptimizerState",
    "Unknown",
    "lay_out",
    "load_optimizer_state",
    "number_of",
    "optimizer_state_diff",
    "order_like",
    "parameter_shape",
    "positions",
    "prune",
    "read_state",
    "remap",
    "resplit",
    "slot_kind",
    "state_findings",
    "structure_findings",
    "tensors_in",
    "to_dict",
    "to_named",
    "write_optimizer_state",
]
