"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "dlprop"
author = copyright = "The dlprop authors"  # noqa: A001 - Sphinx reads this name
release = version = installed_version("dlprop")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_custom_sections = ["Cost", "Reference"]
# Single backticks in docstrings are code, as in the Markdown pages.
default_role = "code"

html_theme = "furo"
html_title = "dlprop"
exclude_patterns = ["_build"]
