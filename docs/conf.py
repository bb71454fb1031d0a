"""The docs site: `make docs` writes it to site/. A link that leads nowhere fails the build."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bntool import __version__

project = "bntool"
author = "bntool contributors"
copyright = "bntool contributors, MIT licence"  # noqa: A001 - Sphinx's name for it
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["seed-experiment/*"]
myst_heading_anchors = 3
default_role = "code"
smartquotes = False  # which would make one dash of the two before an option
python_maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"bntool {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


def _plain(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Docstrings here are plain text with names in backticks: a star or a bar is itself."""
    lines[:] = ["".join(_escaped(line)) for line in lines]


def _escaped(line: str) -> Iterator[str]:
    for number, part in enumerate(line.split("`")):
        yield f"`{part}`" if number % 2 else re.sub(r"[*|]", r"\\\g<0>", part)


def _outside(_app: Sphinx, _page: str, source: list[str]) -> None:
    """What lies outside docs/ is offered as a file."""
    source[0] = source[0].replace("](../samples/", "](path:../samples/")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _plain, priority=100)
    app.connect("source-read", _outside)
