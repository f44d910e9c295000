"""What the user chose for an overlay: its policies, and what errors call its inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import default_error_path
from ckptkit.plans.policies import (
    MISMATCH_ACTIONS,
    MISSING_ACTIONS,
    UNEXPECTED_ACTIONS,
    MismatchAction,
    MissingAction,
    OnMismatch,
    OnMissing,
    OnUnexpected,
    Policy,
    UnexpectedAction,
    parse_policy,
)

__all__ = ["Policies", "Sides", "in_words_of", "parse_policies"]


@dataclass(frozen=True, slots=True)
class Sides:
    """What errors call the base and the donor; a donor without a name is called by its role."""

    base: str = "base"
    donor: str = ""

    @property
    def is_loading(self) -> bool:
        """Whether the base is a live model, which cannot get further keys."""
        return self.base == "model"


@dataclass(frozen=True, slots=True)
class Policies:
    """The three policies of an overlay, and what errors call the base and the donor."""

    on_missing: Policy[MissingAction]
    on_unexpected: Policy[UnexpectedAction]
    on_mismatch: Policy[MismatchAction]
    sides: Sides
    keeps_parted: bool  # keep a missing key also where a donor has its values in parts, as the user wrote

    def unused(self, base: Checkpoint, donors: Mapping[str, Checkpoint], *, allow_unused: bool) -> list[str]:
        """Return a note for each pattern that decides about no key; raise ``RuleError`` unless ``allow_unused``."""
        found = list(dict.fromkeys(key for donor in donors.values() for key in donor))
        owner = " and ".join(f"the {self.sides.donor or role}" for role in donors)
        with default_error_path(base.path):
            notes = [
                *self.on_missing.unused(base, f"the {self.sides.base}", allow_unused=allow_unused),
                *self.on_mismatch.unused(base, f"the {self.sides.base}", allow_unused=allow_unused),
            ]
        return [*notes, *self.on_unexpected.unused(found, owner, allow_unused=allow_unused)]


def parse_policies(
    on_missing: OnMissing | None, on_unexpected: OnUnexpected, on_mismatch: OnMismatch, sides: Sides
) -> Policies:
    """Return the policies that the arguments of a merge or a load choose."""
    return Policies(
        parse_policy("on_missing", "keep" if on_missing is None else on_missing, MISSING_ACTIONS),
        parse_policy("on_unexpected", on_unexpected, UNEXPECTED_ACTIONS),
        parse_policy("on_mismatch", on_mismatch, MISMATCH_ACTIONS),
        sides,
        on_missing is not None,
    )


def in_words_of(sides: Sides, role: str, hint: str) -> str:
    """Return a hint of a diff with what this call takes in place of EXPECTED and FOUND."""
    return re.sub(r"\bEXPECTED\b", sides.base.upper(), re.sub(r"\bFOUND\b", (sides.donor or role).upper(), hint))
