"""Settings of Sphinx."""

import re

project = "hf_slim"
author = "The hf_slim authors"
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "hf_slim"
html_static_path = ["_static"]
html_js_files = ["filter.js"]

# Links to headings of a page, and from a page to files of the repository.
myst_heading_anchors = 3
myst_footnote_transition = False

# Docstrings write code in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False


def escape_bars(app, what, name, obj, options, lines):
    """Let |x| in a docstring be an absolute value: escape the bars that are outside of code."""
    lines[:] = [re.sub(r"(`[^`]*`)|\|", lambda match: match[1] or r"\|", line) for line in lines]


def setup(app):
    """Have Sphinx call the function above."""
    app.connect("autodoc-process-docstring", escape_bars)
