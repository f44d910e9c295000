"""The configuration of the documentation: ``sphinx-build -W docs OUT``."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # of the extension below

project = "ckptkit"
author = "the ckptkit authors"
copyright = "the ckptkit authors, Apache-2.0"  # noqa: A001 - Sphinx reads this name
release = version = version_of("ckptkit")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_page",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ckptkit {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
smartquotes = False  # "--" is an option, and quotes are to be copied
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
