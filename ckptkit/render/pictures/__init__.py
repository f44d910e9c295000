"""Results as pictures: SVG of our own, for the HTML report and for notebooks."""

from __future__ import annotations
