"""The errors that ckptkit raises.

Each error has a reason in one sentence, and usually a hint that says what to do instead::

    CkptkitError
    ├── PathError          the path cannot be read
    ├── FormatError        the bytes are not a complete and consistent checkpoint
    │   └── ChangedError   the file changed while it was read
    ├── ModelError         a live model cannot be built, described or loaded
    ├── RuleError          a pattern or a rule is wrong
    ├── PlanError          the request would lose or mix up tensors
    ├── OutputError        the output cannot be written
    └── GroupsError        param groups do not fit the model

Every other exception that leaves ckptkit is a bug.
"""

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
    """Return ``sentence`` without line breaks and control characters; backslashes in it are unchanged."""
    joined = sentence.replace("\n", " ")
    # Names in the sentence are escaped already, with doubled backslashes, so backslashes are not escaped again.
    return joined if joined.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


class CkptkitError(Exception):
    """The base class of all errors of ckptkit.

    ``reason`` is one sentence that says why ckptkit refused, ``hint`` says what to do instead, and ``path`` is the
    file, or None.
    """

    def __init__(self, reason: str, *, hint: str | None = None, path: str | None = None) -> None:
        """Set the attributes ``reason``, ``hint`` and ``path``."""
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.path = path

    def __str__(self) -> str:
        """Return path, reason and hint on one line."""
        where = f"{self.path}: " if self.path else ""
        hint = f" ({self.hint})" if self.hint else ""
        return one_line(f"{where}{self.reason}{hint}")


class PathError(CkptkitError):
    """The path does not exist, cannot be read, or is not a regular file."""


class FormatError(CkptkitError):
    """The bytes are not a checkpoint, or the checkpoint is incomplete or contradicts itself."""


class ChangedError(FormatError):
    """The file changed while it was being read."""


class ModelError(CkptkitError):
    """A live model cannot be built, described or loaded."""


class RuleError(CkptkitError):
    """A pattern or a rule is not valid, matches nothing, or gives two keys the same name."""


class PlanError(CkptkitError):
    """The request would lose or mix up tensors or state, so no plan was made."""


class OutputError(CkptkitError):
    """The output cannot be written to this path, or only by overwriting something."""


class GroupsError(CkptkitError):
    """A spec of param groups does not fit the model, or live groups failed validation."""
