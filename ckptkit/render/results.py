"""The page, the JSON document and the pictures of every result: one table, for ``print``, notebooks and commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.core.result import Result
from ckptkit.errors import hint_for_python, message_for_python
from ckptkit.render.page import Block, Hint, Line, Message, Page, as_text

if TYPE_CHECKING:
    from ckptkit.render.pictures.model import Picture

__all__ = ["document_of", "html_of", "page_of", "pictures_of", "text_of"]


class _Renderer(NamedTuple):
    """The module of ``render`` that has the functions ``page`` and ``document`` for a class of results.

    ``pictures`` is a function of ``render.pictures.of_results``, or empty where a result has no pictures.
    """

    module: str
    page: str
    document: str
    pictures: str = ""


# By name, so that a page loads neither the other pages nor the packages of their results.
_RENDERERS: Final[Mapping[str, _Renderer]] = {
    "align.model.Alignment": _Renderer("align", "align_page", "align_document"),
    "checks.report.CheckReport": _Renderer("checks", "check_page", "check_document"),
    "checks.report.CheckReports": _Renderer("checks", "checks_page", "checks_document"),
    "comparison.state_dict_diff.StateDictDiff": _Renderer("diff", "diff_page", "diff_document", "diff_pictures"),
    "comparison.values.ValueDiff": _Renderer("values", "values_page", "values_document", "values_pictures"),
    "core.checkpoint.Checkpoint": _Renderer("show", "show_page", "show_document", "show_pictures"),
    "core.findings.Report": _Renderer("findings", "findings_page", "findings_document"),
    "digests.check.DigestCheck": _Renderer("digests", "check_page", "check_document"),
    "digests.model.Digests": _Renderer("digests", "digests_page", "digests_document"),
    "loading.report.LoadReport": _Renderer("loads", "load_page", "load_document", "load_pictures"),
    "optimizer_state.loading.report.OptimizerLoadReport": _Renderer(
        "loads", "optimizer_load_page", "optimizer_load_document"
    ),
    "optimizer_state.model.OptimizerState": _Renderer("optim", "state_page", "state_document"),
    "optimizer_state.write.WrittenState": _Renderer("optim", "written_state_page", "written_state_document"),
    "param_groups.explain.Explanation": _Renderer("groups", "explain_page", "explain_document"),
    "param_groups.lock.ParamGroupsLock": _Renderer("groups", "lock_page", "lock_document"),
    "param_groups.plan.ParamGroupsPlan": _Renderer("groups", "groups_page", "groups_document"),
    "param_groups.spec.ParamGroupSpec": _Renderer("groups", "spec_page", "spec_document"),
    "plans.plan.Plan": _Renderer("plan", "plan_page", "plan_document"),
    "plans.writing.written.Written": _Renderer("plan", "written_page", "written_document"),
    "readiness.model.Preflight": _Renderer("preflight", "preflight_page", "preflight_document", "preflight_pictures"),
    "statistics.state_dict_stats.StateDictStats": _Renderer("stats", "stats_page", "stats_document", "stats_pictures"),
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


def text_of(result: Result) -> str:
    """Return the page of a result as text; it names functions and arguments of Python."""
    return "\n".join(as_text(_page_in_python(result)))


def html_of(result: Result) -> str:
    """Return the page of a result as HTML for a notebook; it names functions and arguments of Python."""
    from ckptkit.render.page.html import as_html

    return as_html(_page_in_python(result))


def _page_in_python(result: Result) -> Page:
    return list(map(_block_in_python, page_of(result)))


def _block_in_python(block: Block) -> Block:
    return replace(block, parts=tuple(map(_in_python, block.parts))) if isinstance(block, Line) else block


def _in_python(text: str) -> str:
    if isinstance(text, Hint):
        return Hint(hint_for_python(text))
    return Message(message_for_python(text)) if isinstance(text, Message) else text


def _renderer_of(result: Result) -> _Renderer:
    """Return the row of the class of a result, or of the nearest base class that has a row."""
    names = (f"{kind.__module__}.{kind.__qualname__}".removeprefix("ckptkit.") for kind in type(result).__mro__)
    return next(_RENDERERS[name] for name in names if name in _RENDERERS)
