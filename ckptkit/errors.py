"""Every way in which ckptkit can refuse: one sentence, and a hint with the way out."""

from __future__ import annotations

__all__ = [
    "ChangedError",
    "CkptkitError",
    "FormatError",
    "GroupsError",
    "ModelError",
    "OutputError",
    "PathError",
    "PlanError",
    "RuleError",
    "one_line",
]


def one_line(sentence: str) -> str:
    """Return ``sentence`` without line breaks and control characters; what is escaped in it already stays as it is."""
    joined = sentence.replace("\n", " ")
    # Names quoted in it have their backslashes doubled already, so those are left alone.
    return joined if joined.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


class CkptkitError(Exception):
    """A refusal: ``reason`` says why in one sentence, ``hint`` what to do instead, ``path`` which file."""

    def __init__(self, reason: str, *, hint: str | None = None, path: str | None = None) -> None:
        """Keep the three parts apart, so that whoever prints them can lay them out."""
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.path = path

    def __str__(self) -> str:
        """Everything on one line, for a traceback or a log."""
        where = f"{self.path}: " if self.path else ""
        way_out = f" ({self.hint})" if self.hint else ""
        return one_line(f"{where}{self.reason}{way_out}")


class PathError(CkptkitError):
    """Nothing readable is there: missing, unreadable, or not a regular file."""


class FormatError(CkptkitError):
    """The bytes are not a checkpoint, or not a whole and honest one."""


class ChangedError(FormatError):
    """The file changed while it was being read."""


class ModelError(CkptkitError):
    """A live model could not be built, described or loaded."""


class RuleError(CkptkitError):
    """A pattern or a rule is wrong, matches nothing, or gives two keys one name."""


class PlanError(CkptkitError):
    """What was asked for would lose or mix up something, so no plan was made."""


class OutputError(CkptkitError):
    """The output cannot be written there, or not without harm."""


class GroupsError(CkptkitError):
    """A param-group spec does not fit the model, or live groups failed their validation."""
