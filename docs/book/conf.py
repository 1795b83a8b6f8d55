"""The notebooks as a book of web pages: their stored outputs are shown, nothing is run. docs/course.md says how."""
import shutil

project = html_title = "Pictures and words: TGDT and USER"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # of outputs, so that their tables are tables
myst_enable_extensions = ["dollarmath"]
html_theme = "furo"
html_static_path, html_css_files = ["static"], ["book.css"]
root_doc = "README"  # of notebooks/, the front page
exclude_patterns = ["photographs"]
suppress_warnings = ["myst.xref_missing"]  # docs/*.md are no pages of the book


def contents(app, page, source):
    """The front page lists all notebooks, in the order of their numbers."""
    if page == root_doc:
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n[0-9]*\n```\n"


def front_page(app, error):
    """Servers look for index.html, and GitHub's looks for .nojekyll."""
    if error is None:
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")
        (app.outdir / ".nojekyll").touch()


def setup(app):
    app.connect("source-read", contents)
    app.connect("build-finished", front_page)
