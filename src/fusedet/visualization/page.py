"""The frame of a self-contained HTML page: one style, light or dark, and nothing that is loaded."""

import base64
from collections.abc import Iterable
from html import escape
from importlib.resources import files


def make_page(title: str, parts: Iterable[str], css: str = "", script: str = "") -> str:
    """Return a page of these parts of HTML.

    Args:
        title: Its title, as text.
        parts: Its content, as HTML; empty parts are left out.
        css: Rules after those that all pages share.
        script: JavaScript at its end.
    """
    shared = (files("fusedet.visualization") / "page.css").read_text(encoding="utf-8")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title>"
    # A browser requests an icon unless the page names an empty one.
    head += f'<link rel="icon" href="data:,"><style>{shared}{css}</style>'
    content = "".join(f"{part}\n" for part in parts if part)
    content += f"<script>\n{script}</script>\n" if script else ""
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{content}</body></html>\n'


def make_section(title: str, content: str, name: str = "") -> str:
    """Return a section with a heading; `name` is its id, to which links lead."""
    own = f' id="{escape(name)}"' if name else ""
    return f"<section{own}><h2>{escape(title)}</h2>{content}</section>"


def make_plain_table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of two columns of text."""
    lines = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>\n" for name, text in rows)
    return f'<div class="scroll"><table class="plain"><tbody>\n{lines}</tbody></table></div>'


def make_jpeg_uri(content: bytes) -> str:
    """Return a JPEG file as a data URI, so that the page holds the image."""
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def make_faint(text: str) -> str:
    """Return a paragraph of faint text."""
    return f'<p class="faint">{escape(text)}</p>'
