"""Figures, and pages of HTML that need nothing beside them and link to nothing outside."""

from __future__ import annotations

import io
from collections.abc import Iterable
from html import escape
from typing import Any

_STYLE = "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"


def figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches."""
    # The object-oriented interface: no global state, no display, safe beside a user's own pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def svg(figure: Any) -> str:
    """The figure as an <svg> element for a page; the same figure gives the same text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "knep", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def html_page(title: str, style: str, parts: Iterable[str]) -> str:
    """style: CSS rules beside those of the body; parts: elements whose text is escaped. The title is escaped here."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    style, body = _STYLE + style, "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head>\n<body>{body}</body></html>\n'
