"""Figures as SVG."""

from __future__ import annotations

import io
from typing import Any


def svg(figure: Any) -> str:
    """The figure as an <svg> element for a page; the same figure gives the same text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "knep", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
