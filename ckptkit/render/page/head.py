"""The head of a report: what was looked at, the verdict, and the most important numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptkit.core.text import plural
from ckptkit.render.page import Line, Tone

__all__ = ["Fact", "Head", "Subject"]


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint or a model that a result is about, with the line of the page that describes it.

    ``label`` says which of several it is, such as ``expected``. The line begins with it.
    """

    label: str
    line: Line

    @property
    def description(self) -> Line:
        """The line without its label."""
        first, *others = self.line.parts
        return Line(tuple(others)) if self.label and first.strip() == self.label else self.line


@dataclass(frozen=True, slots=True)
class Fact:
    """One important number, in printable form, and the words for it."""

    value: str
    name: str
    tone: Tone = ""

    @classmethod
    def of_count(cls, count: int, noun: str, more: str = "", tone: Tone = "") -> Fact:
        """Return how many there are; ``more`` are words behind the noun, which is in the plural where that is right."""
        number, _, nouns = plural(count, noun).partition(" ")
        return cls(number, f"{nouns} {more}".strip(), tone)


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a report; its lines are also on the page of the result, which a report does not repeat.

    Attributes:
        name: The command that gives the result, such as ``diff``, or a name of the result.
        verdict: The sentence that answers the question of the reader.
        subjects: What the result is about.
        facts: The most important numbers.
        tone: Whether the verdict is good.
        same_as: The line of the page that says the same as the verdict in other words, if there is one.
        is_command: Whether ``name`` is that of a command.
    """

    name: str
    verdict: Line
    subjects: tuple[Subject, ...] = ()
    facts: tuple[Fact, ...] = ()
    tone: Tone = ""
    same_as: Line | None = None
    is_command: bool = True

    def lines(self) -> Iterator[Line]:
        """Yield the lines of the page that the head has already said."""
        yield self.verdict
        yield from (subject.line for subject in self.subjects)
        if self.same_as is not None:
            yield self.same_as
