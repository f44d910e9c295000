"""Reports as HTML files: the page of a result, its pictures and its JSON document, for a browser without a network."""

from __future__ import annotations
