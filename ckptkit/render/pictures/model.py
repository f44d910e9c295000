"""``Picture``: one SVG of a result, with its numbers in words."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Picture"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a result.

    Attributes:
        kind: What the picture shows: ``coverage``, ``changes``, ``rates``, ``sizes`` or ``magnitudes``. It is also a
            class of the ``<svg>``.
        title: A heading, without markup.
        description: The most important numbers as sentences, without markup.
        svg: The ``<svg>`` element. It has no ids, no scripts and no ``style``, so that several stand on one page. Its
            colours are attributes, which the rules of ``picture_style`` override.
    """

    kind: str
    title: str
    description: str
    svg: str
