"""The documentation site: sphinx-build -W -c docs . build/site, or make docs.

The root of the sources is the project's, so that the pages' links to README.md, SECURITY.md or a source file lead
somewhere in an editor, on a code host and on the site. A line `<!-- generated: NAME -->` of a page is replaced by what
`reference_pages.GENERATED[NAME]` returns.
"""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "src")]

import reference_pages  # noqa: E402

import fusedet  # noqa: E402

project, author, release = "fusedet", "The fusedet authors", fusedet.__version__
copyright = "The fusedet authors"
root_doc = "docs/index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["docs/**.md", "examples/README.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
exclude_patterns = ["build", "dist", "runs", ".venv", "shared"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # pages of commands start a section without its parent level
napoleon_use_ivar = True  # fields of named tuples are documented once
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
highlight_language = "none"
html_theme = "furo"
html_title = f"fusedet {release}"
html_show_sourcelink = False
html_static_path = html_css_files = ["site.css"]


def insert_generated(app, docname, source):
    """Replace the line `<!-- generated: NAME -->` of a page by its text."""
    source[0] = re.sub(r"<!-- generated: (\w+) -->", lambda match: reference_pages.GENERATED[match[1]](), source[0])


def write_entry(app, exception):
    """Write index.html of the site, which leads to the first page."""
    if exception is None and app.builder.format == "html":
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html"><title>fusedet</title>\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app):
    """Register the generated pages."""
    app.connect("source-read", insert_generated)
    app.connect("build-finished", write_entry)
