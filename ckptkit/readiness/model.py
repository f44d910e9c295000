"""The result of a preflight: sections, findings, and one verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ckptkit.core.coverage import ModuleCoverage
from ckptkit.core.findings import Report
from ckptkit.core.text import plural, printable

__all__ = [
    "DryStep",
    "InModel",
    "Init",
    "Kept",
    "Memory",
    "ModuleTraining",
    "Preflight",
    "Resume",
    "StateMemory",
    "TrainingGroup",
]

InModel = Literal["all", "part", "none", "unknown"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor of the model that ``init`` does not fill, the reason, and the probable origin of its values.

    ``looks`` is empty where the values were not judged.
    """

    key: str
    why: str
    elements: int
    looks: str = ""


@dataclass(frozen=True, slots=True)
class Init:
    """The tensors that ``init`` fills, counted by module, and the tensors that it does not fill.

    ``in_model`` says which of these tensors have the values of ``init`` already: all, part or none of them. It is
    ``"unknown"`` where values could not be compared.
    """

    loaded: int
    tensors: int
    loaded_elements: int
    elements: int
    modules: tuple[ModuleCoverage, ...]
    kept: tuple[Kept, ...]
    in_model: InModel

    @property
    def coverage(self) -> float:
        """Share of the model's elements that ``init`` fills, between 0 and 1."""
        return self.loaded_elements / self.elements if self.elements else 1.0


@dataclass(frozen=True, slots=True)
class ModuleTraining:
    """The number of parameters and elements that train in one module, or of one parameter outside any module."""

    module: str
    trainable: int
    parameters: int
    trainable_elements: int
    elements: int


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """One param group: the names of its parameters in order, its options, and the class of its optimizer.

    A tensor that is not in the model has an empty name. ``optimizer`` is empty where the class is not known.
    """

    name: str
    names: tuple[str, ...]
    elements: int
    options: Mapping[str, Any]
    optimizer: str = ""


@dataclass(frozen=True, slots=True)
class StateMemory:
    """The bytes of the state of one optimizer after its first step; None where the class is not of torch.optim."""

    optimizer: str
    slots: tuple[str, ...]
    nbytes: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes of parameters, buffers, gradients and optimizer states; activations are not included."""

    parameters: int
    buffers: int
    gradients: int
    states: tuple[StateMemory, ...] = ()

    @property
    def total(self) -> int:
        """The sum of all known sizes, in bytes."""
        return self.parameters + self.buffers + self.gradients + sum(state.nbytes or 0 for state in self.states)


@dataclass(frozen=True, slots=True)
class Resume:
    """How far the checkpoint of a run fits: it has a tensor for ``matched`` of the ``expected`` keys of the model.

    ``positions`` is the number of parameters in its optimizer state, or None without such a state or without groups.
    ``with_state`` is the number of parameters that have state.
    """

    matched: int
    expected: int
    positions: int | None = None
    with_state: int = 0
    form: str = ""


@dataclass(frozen=True, slots=True)
class DryStep:
    """One step on a copy of the model: how many trainable parameters got a gradient, and how many changed.

    ``loss`` is None where no loss was computed. ``optimizer`` is empty where no optimizer was given and no step made.
    """

    loss: float | None
    optimizer: str
    trainable: int
    gradients: int
    moved: int


@dataclass(frozen=True, repr=False)
class Preflight(Report):
    """The findings and sections of a preflight; a section is None or empty where its argument was not given.

    ``not_judged`` names the checks that were skipped. ``ok`` is True where no finding is an error.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> ready = ckptkit.preflight(model, optimizer=torch.optim.SGD([model.weight], lr=0.1))
        >>> ready.ok, [finding.code for finding in ready.errors]
        (False, ['groups.missing'])
    """

    init: Init | None = None
    training: tuple[ModuleTraining, ...] = ()
    groups: tuple[TrainingGroup, ...] = ()
    memory: Memory | None = None
    resume: Resume | None = None
    step: DryStep | None = None
    not_judged: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """``ready``, or ``ready, with N warnings``, or ``not ready`` with the first error."""
        if reason := self.not_ready_reason:
            return f"not ready: {reason}"
        warnings = self.summary["warnings"]
        return f"ready, with {plural(warnings, 'warning')}" if warnings else "ready"

    @property
    def not_ready_reason(self) -> str:
        """The message of the first error, and the number of other errors; empty without an error."""
        count = self.summary["errors"]
        if not count:
            return ""
        first = next(finding for finding in self.findings if finding.severity == "error")
        more = f" (and {plural(count - 1, 'more error')})" if count > 1 else ""
        return f"{first.message}{more}"

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        return printable(self.verdict)
