"""A page of HTML that needs nothing beside it and links to nothing outside."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_STYLE = "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"


def html_page(title: str, style: str, parts: Iterable[str]) -> str:
    """style: CSS rules beside those of the body; parts: elements whose text is escaped. The title is escaped here."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    style, body = _STYLE + style, "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head>\n<body>{body}</body></html>\n'
