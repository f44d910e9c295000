"""The result of ``load_optimizer_state``, and its findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import plural, quoted, short_number
from ckptkit.core.torch_optim import initial_lr, scheduled_options
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.compatibility import StateMatch
from ckptkit.optimizer_state.groups import equal_values
from ckptkit.optimizer_state.model import NamedGroup

__all__ = ["OptimizerLoadReport", "initial_lr_findings", "match_findings"]


@dataclass(frozen=True, repr=False)
class OptimizerLoadReport(Report):
    """The result of a load, by FQN of the live model.

    - ``loaded``: the state was loaded.
    - ``missing``: the file has no state for the parameter.
    - ``dropped``: the state in the file does not fit.
    - ``unused``: the file has state, but the optimizer has no such parameter.
    - ``reshaped``: rules made the state from the state of other parameters, for example by a split.

    A parameter in ``missing`` or ``dropped`` keeps the state that the optimizer had for it, if any.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> old, new = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
        >>> model(torch.ones(2)).sum().backward()
        >>> old.step()
        >>> report = ckptkit.load_optimizer_state(new, model, old.state_dict())
        >>> report.loaded, report.missing
        (('weight', 'bias'), ())
    """

    loaded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        counts = [f"{len(getattr(self, word))} {word}" for word in ("reshaped", "dropped", "missing", "unused")]
        return f"loaded the state of {plural(len(self.loaded), 'parameter')}: {', '.join(counts)}"


def match_findings(match: StateMatch, unused: Sequence[str]) -> Iterator[Finding]:
    """Yield a finding for each parameter that gets no state, and for each state that is not loaded."""
    for name in match.missing:
        yield codes.MISSING.finding(
            name,
            f"the file has no state for {quoted(name)}, so it keeps the state that the optimizer has, if any",
            "if it has another name in the file, rename it with rules",
        )
    for name, reason in match.dropped.items():
        yield codes.DROPPED.finding(
            name,
            f"the state of {quoted(name)} was not loaded: it {reason}",
            "to keep it, move it with the rules that moved the weights",
        )
    for name in unused:
        yield codes.UNUSED.finding(
            name,
            f"the state of {quoted(name)} was not loaded: the optimizer has no such parameter",
            "if it has another name in the model, rename it with rules",
        )


def initial_lr_findings(live_groups: Sequence[NamedGroup], groups: Sequence[NamedGroup]) -> Iterator[Finding]:
    """Yield a finding for each group whose schedule would start from another rate than the group was built with."""
    for number, (before, after) in enumerate(zip(live_groups, groups, strict=True)):
        lr, loaded = initial_lr(before.options), after.options.get("initial_lr")
        if "initial_lr" in scheduled_options(before.options, after.options, equal_values):
            continue
        if isinstance(lr, int | float) and isinstance(loaded, int | float) and lr != loaded:
            yield codes.INITIAL_LR.finding(
                "",
                f"group {number} was built with lr={short_number(lr)} and now has "
                f"initial_lr={short_number(loaded)} from the file: a scheduler "
                "that is built from now on starts from that",
                "for the schedule of the run, build its scheduler before the load and load its state too; for a new "
                'schedule, load with hyper="live"',
            )
