"""``Result``: the base class of every result, which prints as the page that the command line shows."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from ckptkit.errors import message_for_python

__all__ = ["Result"]

# Results stand below the renderer, and cannot import it. This is the only place that reaches up to it.
_RENDERER = "ckptkit.render.results"


class Result:
    """A result: ``print`` shows the page of the command line, a notebook shows the same page, ``repr`` is one line.

    A result has no truth value, because readers would not know which question it answers. ``Report.ok`` and
    ``StateDictDiff.different`` are such questions.

    Example:
        >>> import torch, ckptkit
        >>> result = ckptkit.diff(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> result
        <StateDictDiff: 2 matched, 0 missing, 0 unexpected, 0 shape-mismatched, 0 dtype-mismatched>
        >>> print(str(result).splitlines()[-1])
        load_state_dict accepts the checkpoint
        >>> result.to_dict()["summary"]["coverage"]
        1.0
    """

    __slots__ = ()

    _truth: ClassVar[str] = "compare it with None"  # what to write instead of bool()

    def __str__(self) -> str:
        """Return the page that the command line prints, as text; it names functions and arguments of Python."""
        text: str = import_module(_RENDERER).text_of(self)
        return text

    def __repr__(self) -> str:
        """Return the class and the most important numbers, on one line."""
        return f"<{type(self).__name__}: {message_for_python(self.in_short)}>"

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """Return the page as HTML, which a notebook shows."""
        html: str = import_module(_RENDERER).html_of(self)
        return html

    def to_html(self) -> str:
        """Return a report as the text of one HTML file that needs nothing else: the page, its pictures and numbers.

        It is the file that ``--html FILE`` writes, with the names of functions and arguments of Python. Its tables sort
        and filter in a browser, and it has the document of ``to_dict()``. The same result gives the same text.

        Example:
            >>> report = ckptkit.stats("fixtures/lenet_10class.pth").to_html()
            >>> report.splitlines()[0]
            '<!doctype html>'
        """
        html: str = import_module(_RENDERER).report_of(self, for_python=True)
        return html

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document that the command line prints with ``--json``, with its ``"schema"``.

        Every value is a string, a number, a bool, None, a list or a dict; NaN and Inf are strings.
        """
        document: dict[str, Any] = import_module(_RENDERER).document_of(self)
        return document

    def __bool__(self) -> bool:
        """Raise ``TypeError``: a result has no truth value."""
        raise TypeError(f"{type(self).__name__} has no truth value: {self._truth}")
