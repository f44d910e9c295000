"""What the user chose for a load, and the errors where a state does not meet it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ckptkit.core.patterns import pattern_for
from ckptkit.core.text import listed, quoted
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.compatibility import StateMatch
from ckptkit.optimizer_state.model import OptimizerState
from ckptkit.plans.policies import MissingAction, Policy

__all__ = ["SKIP_ACTIONS", "OnSkip", "Policies", "SkipAction", "refuse_by_policy", "refuse_unexpected"]

SkipAction: TypeAlias = Literal["skip", "error"]
SKIP_ACTIONS: tuple[SkipAction, ...] = get_args(SkipAction)
# One action for every parameter, or an action for each pattern of names.
OnSkip: TypeAlias = SkipAction | Mapping[str, SkipAction]


@dataclass(frozen=True, slots=True)
class Policies:
    """The three policies of a load, by the names of parameters."""

    on_missing: Policy[MissingAction]
    on_unexpected: Policy[SkipAction]
    on_mismatch: Policy[SkipAction]

    def refuse_unused(self, saved: Collection[str], live: Collection[str], *, allow_unused: bool) -> None:
        """Raise ``RuleError`` for a pattern that decides about no name, unless ``allow_unused``."""
        self.on_missing.unused(live, "the optimizer", allow_unused=allow_unused)
        self.on_mismatch.unused(live, "the optimizer", allow_unused=allow_unused)
        self.on_unexpected.unused(saved, "the state", allow_unused=allow_unused)


def refuse_unexpected(names: Sequence[str]) -> None:
    """Raise ``PlanError`` for state of parameters that the optimizer does not have, if there is such a name."""
    if names:
        skip = f'on_unexpected={{"{pattern_for(names[0], names)}": "skip"}}'
        raise PlanError(
            f"the state has {listed(names)}, which the optimizer does not have",
            hint=f"rename it with rules, or leave it out: {skip}",
        )


def refuse_by_policy(match: StateMatch, saved: OptimizerState, policies: Policies) -> None:
    """Raise ``PlanError`` where a policy demands it, or where nothing would be loaded."""
    missing = [name for name in match.missing if policies.on_missing.action(name) == "error"]
    if missing:
        keep = f'on_missing={{"{pattern_for(missing[0], missing)}": "keep"}}'
        raise PlanError(
            f"the file has no state for {listed(missing)}",
            hint=f"rename with rules what has another name in the file, or start without state: {keep}",
        )
    refused = [name for name in match.dropped if policies.on_mismatch.action(name) == "error"]
    if refused:
        more = f" (and {len(refused) - 1:,} more do not fit)" if len(refused) > 1 else ""
        skip = f'on_mismatch={{"{pattern_for(refused[0], refused)}": "skip"}}'
        raise PlanError(
            f"the state of {quoted(refused[0])} {match.dropped[refused[0]]}{more}",
            hint=f"move it with the rules that moved the weights, or start without this state: {skip}",
        )
    if not match.state and match.missing and not saved.state and saved.names:
        raise PlanError(
            "nothing would be loaded: the file has groups but no state",
            hint="it was saved before the first step, so start without it",
        )
    if not match.state and (match.missing or match.dropped):
        raise PlanError(
            "nothing would be loaded: the file has no state that fits a parameter of the optimizer",
            hint="the file has the names of another model: rename them with rules",
        )
