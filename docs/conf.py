"""Settings of Sphinx."""

import re

import hf_slim

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


def name_publicly(app, env, node, contnode):
    """Let a type be found by its public name, whatever module it is defined in; the reference has no other names."""
    name = node["reftarget"].rpartition(".")[2]
    if node.get("refdomain") == "py" and name in hf_slim.__all__ and node["reftarget"] != f"hf_slim.{name}":
        contnode[:] = [type(contnode[0])(name)]
        node["reftarget"] = f"hf_slim.{name}"
        return env.get_domain("py").resolve_xref(
            env, node["refdoc"], app.builder, "obj", node["reftarget"], node, contnode
        )
    return None


def setup(app):
    """Have Sphinx call the functions above."""
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("missing-reference", name_publicly)
