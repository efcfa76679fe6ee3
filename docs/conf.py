"""Sphinx configuration."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the gallery draws the scenes of the example

project = "dlprop"
author = copyright = "The dlprop authors"  # noqa: A001 - Sphinx reads this name
release = version = installed_version("dlprop")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_custom_sections = ["Cost", "Reference"]
default_role = "code"  # single backticks in docstrings are code, as in the Markdown pages
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,  # times of whoever builds the site say nothing
    "min_reported_time": 1e9,
}

html_theme = "furo"
html_title = "dlprop"
html_static_path = ["static"]
html_css_files = ["dlprop.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"


def setup(app):
    """Render formulas as MathML while building.

    Sphinx's own renderers need a script from a server (MathJax) or LaTeX on the machine (imgmath). Browsers draw MathML
    themselves: no network, no fonts to ship, it scales and follows the dark theme, and screen readers read it.
    """

    def visit_math(translator, node):
        translator.body.append(convert(node.astext()))
        raise nodes.SkipNode

    def visit_displaymath(translator, node):
        translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
