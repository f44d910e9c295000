"""The page, the JSON document and the pictures of every result: one table, for ``print``, notebooks and commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.result import Result
from ckptkit.errors import hint_for_python, message_for_python
from ckptkit.render.page import Block, Hint, Line, Listing, Message, Page, as_code, as_text

if TYPE_CHECKING:
    from ckptkit.render.html.histograms import BothSides
    from ckptkit.render.page.head import Head
    from ckptkit.render.pictures.model import Picture

__all__ = ["document_of", "html_of", "page_of", "pictures_of", "report_of", "text_of"]


class _Renderer(NamedTuple):
    """The module of ``render`` that has the functions ``page`` and ``document`` for a class of results.

    ``pictures`` is a function of ``render.pictures.of_results``, or empty where a result has no pictures. ``head`` is a
    function of the module, or empty where the head of a report has no more than the name of the class. ``all_rows`` are
    the options of a page that leaves no row out.
    """

    module: str
    page: str
    document: str
    pictures: str = ""
    head: str = ""
    all_rows: Mapping[str, object] = MappingProxyType({})


_EXPANDED: Final[Mapping[str, object]] = MappingProxyType({"expand": True})


# By name, so that a page loads neither the other pages nor the packages of their results.
_RENDERERS: Final[Mapping[str, _Renderer]] = {
    "align.model.Alignment": _Renderer("align", "align_page", "align_document", all_rows=_EXPANDED),
    "checks.report.CheckReport": _Renderer("checks", "check_page", "check_document", head="check_head"),
    "checks.report.CheckReports": _Renderer("checks", "checks_page", "checks_document", head="checks_head"),
    "comparison.state_dict_diff.StateDictDiff": _Renderer(
        "diff", "diff_page", "diff_document", "diff_pictures", "diff_head", {"expand": True, "everything": True}
    ),
    "comparison.values.ValueDiff": _Renderer(
        "values", "values_page", "values_document", "values_pictures", all_rows=_EXPANDED
    ),
    "core.checkpoint.Checkpoint": _Renderer(
        "show", "show_page", "show_document", "show_pictures", "show_head", _EXPANDED
    ),
    "core.findings.Report": _Renderer("findings", "findings_page", "findings_document", head="findings_head"),
    "deltas.delta.Delta": _Renderer("delta", "delta_page", "delta_document", all_rows=_EXPANDED),
    "digests.check.DigestCheck": _Renderer("digests", "check_page", "check_document"),
    "digests.model.Digests": _Renderer("digests", "digests_page", "digests_document"),
    "loading.report.LoadReport": _Renderer("loads", "load_page", "load_document", "load_pictures"),
    "optimizer_state.loading.report.OptimizerLoadReport": _Renderer(
        "loads", "optimizer_load_page", "optimizer_load_document"
    ),
    "optimizer_state.model.OptimizerState": _Renderer("optim", "state_page", "state_document", all_rows=_EXPANDED),
    "optimizer_state.write.WrittenState": _Renderer("optim", "written_state_page", "written_state_document"),
    "param_groups.explain.Explanation": _Renderer("groups", "explain_page", "explain_document"),
    "param_groups.lock.ParamGroupsLock": _Renderer("groups", "lock_page", "lock_document"),
    "param_groups.plan.ParamGroupsPlan": _Renderer(
        "groups", "groups_page", "groups_document", "groups_pictures", "groups_head", _EXPANDED
    ),
    "param_groups.spec.ParamGroupSpec": _Renderer("groups", "spec_page", "spec_document"),
    "plans.plan.Plan": _Renderer("plan", "plan_page", "plan_document", all_rows=_EXPANDED),
    "plans.writing.written.Written": _Renderer(
        "plan", "written_page", "written_document", all_rows={"tensors": True, "expand": True}
    ),
    "readiness.model.Preflight": _Renderer(
        "preflight", "preflight_page", "preflight_document", "preflight_pictures", "preflight_head", _EXPANDED
    ),
    "statistics.state_dict_stats.StateDictStats": _Renderer(
        "stats", "stats_page", "stats_document", "stats_pictures", "stats_head", _EXPANDED
    ),
}


def page_of(result: Result, **options: object) -> Page:
    """Return the page of a result; ``options`` are those of the page function of its class."""
    renderer = _renderer_of(result)
    page: Page = getattr(import_module(f"ckptkit.render.{renderer.module}"), renderer.page)(result, **options)
    return page


def document_of(result: Result, **options: object) -> dict[str, Any]:
    """Return the JSON document of a result; ``options`` are those of the document function of its class."""
    renderer = _renderer_of(result)
    module = import_module(f"ckptkit.render.{renderer.module}")
    document: dict[str, Any] = getattr(module, renderer.document)(result, **options)
    return document


def pictures_of(result: Result, **options: object) -> tuple[Picture, ...]:
    """Return the pictures of a result, the most important first; ``options`` are those of the function of its class."""
    name = _renderer_of(result).pictures
    if not name:
        return ()
    pictures: tuple[Picture, ...] = getattr(import_module("ckptkit.render.pictures.of_results"), name)(
        result, **options
    )
    return pictures


@pause_gc()
def report_of(
    result: Result,
    *,
    both_sides: BothSides | None = None,
    for_python: bool = False,
    chosen: Mapping[str, object] = MappingProxyType({}),
    about: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the report of a result: one HTML file with its page, with all rows, its pictures and its document.

    ``both_sides`` are the statistics of tensors on both sides. ``chosen`` are options of the page and of the document.
    ``about`` says in the head what a result is about that does not know it, such as the path of a model.
    With ``for_python``, the report names functions and arguments of Python.
    """
    from ckptkit.render.html.report import as_report
    from ckptkit.render.page.head import Subject

    renderer = _renderer_of(result)
    page = page_of(result, **{**renderer.all_rows, **chosen})
    head = _head_of(result, renderer)
    if about:
        head = replace(head, subjects=tuple(Subject(name, Line((as_code(text),))) for name, text in about.items()))
    document = document_of(result, **chosen)
    if for_python:
        page, head = list(map(_block_in_python, page)), _head_in_python(head)
    pictures = pictures_of(result) if both_sides is None else pictures_of(result, totals=both_sides.totals)
    page = _without_drawn(page, pictures)
    return as_report(page, head, document, pictures, None if both_sides is None else both_sides.rows)


def _head_of(result: Result, renderer: _Renderer) -> Head:
    from ckptkit.render.page.head import Head

    if not renderer.head:
        return Head(type(result).__name__, Line((Message(result.in_short),)), is_command=False)
    head: Head = getattr(import_module(f"ckptkit.render.{renderer.module}"), renderer.head)(result)
    return head


def _head_in_python(head: Head) -> Head:
    return replace(head, verdict=_line_in_python(head.verdict), same_as=head.same_as and _line_in_python(head.same_as))


def text_of(result: Result) -> str:
    """Return the page of a result as text; it names functions and arguments of Python."""
    return "\n".join(as_text(_page_in_python(result)))


@pause_gc()
def html_of(result: Result) -> str:
    """Return the page and the pictures of a result for a notebook; it names functions and arguments of Python."""
    from ckptkit.render.page.html import as_html
    from ckptkit.render.pictures.style import picture_style

    pictures = pictures_of(result)
    page = _without_drawn(_page_in_python(result), pictures)
    return as_html(page, pictures, picture_style(in_notebook=True) if pictures else "")


def _without_drawn(page: Page, pictures: Iterable[Picture]) -> Page:
    drawn = {picture.kind for picture in pictures}
    return [block for block in page if not (isinstance(block, Listing) and block.drawn_as in drawn)]


def _page_in_python(result: Result) -> Page:
    return list(map(_block_in_python, page_of(result)))


def _block_in_python(block: Block) -> Block:
    return _line_in_python(block) if isinstance(block, Line) else block


def _line_in_python(line: Line) -> Line:
    return replace(line, parts=tuple(map(_in_python, line.parts)))


def _in_python(text: str) -> str:
    if isinstance(text, Hint):
        return Hint(hint_for_python(text))
    return Message(message_for_python(text)) if isinstance(text, Message) else text


def _renderer_of(result: Result) -> _Renderer:
    """Return the row of the class of a result, or of the nearest base class that has a row."""
    names = (f"{kind.__module__}.{kind.__qualname__}".removeprefix("ckptkit.") for kind in type(result).__mro__)
    return next(_RENDERERS[name] for name in names if name in _RENDERERS)
