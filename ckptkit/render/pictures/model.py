"""``Picture``: one SVG of a result, with its numbers in words."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Picture"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a result.

    Attributes:
        kind: What the picture shows: ``coverage``, ``training``, ``changes``, ``rates``, ``sizes`` or
            ``magnitudes``. The ``<svg>`` has the class ``ck-`` and this name.
        title: A heading, without markup.
        summary: The most important numbers as one or two sentences, without markup.
        description: All numbers as sentences, without markup; it is the ``<desc>`` of the ``<svg>``.
        svg: The ``<svg>`` element. It has no ids, no scripts and no ``style``, so that several stand on one page. Its
            colours are attributes, which the rules of ``picture_style`` override.
    """

    kind: str
    title: str
    summary: str
    description: str
    svg: str
