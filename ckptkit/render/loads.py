"""The reports of loading into a live model and a live optimizer, as pages and as JSON documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.core.text import printable
from ckptkit.render.findings import findings_document, findings_page
from ckptkit.render.page import Block, Line, Page, Table
from ckptkit.render.summary import coverage_documents, names_in_short, share_cell

if TYPE_CHECKING:
    from ckptkit.loading.report import LoadReport
    from ckptkit.optimizer_state.loading.report import OptimizerLoadReport

__all__ = ["load_document", "load_page", "optimizer_load_document", "optimizer_load_page"]

_KINDS = ("loaded", "reshaped", "dropped", "missing", "unused")


def load_page(report: LoadReport) -> Page:
    """Return what was loaded, a row per module, and the findings."""
    page: list[Block] = [Line((report.in_short,))]
    rows = tuple(
        (
            printable(module.module),
            f"{module.loaded:,} of {module.tensors:,}",
            f"{module.elements:,}",
            share_cell(module.loaded_elements, module.elements),
        )
        for module in report.modules
    )
    if rows:
        page.append(
            Table(("module", "tensors", "elements", "share"), rows, frozenset({"tensors", "elements", "share"}))
        )
    page += findings_page(report)
    return [*page, *([Line((f"kept as they were: {names_in_short(report.kept)}",))] if report.kept else [])]


def load_document(report: LoadReport) -> dict[str, object]:
    """Return the JSON document of a load into a model."""
    findings = findings_document(report)
    return {
        "schema": "ckptkit.load/1",
        "loaded": list(report.loaded),
        "kept": list(report.kept),
        "coverage": report.coverage,
        "modules": coverage_documents(report.modules),
        "findings": findings["findings"],
        "summary": findings["summary"],
    }


def optimizer_load_page(report: OptimizerLoadReport) -> Page:
    """Return the number of parameters of each kind, and the findings."""
    return [Line((report.in_short,)), *findings_page(report)]


def optimizer_load_document(report: OptimizerLoadReport) -> dict[str, object]:
    """Return the JSON document of a load into an optimizer."""
    findings = findings_document(report)
    return {
        "schema": "ckptkit.optim-load/1",
        **{kind: list(getattr(report, kind)) for kind in _KINDS},
        "findings": findings["findings"],
        "summary": findings["summary"],
    }
