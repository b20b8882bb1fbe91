"""A report as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from knep.doctor.findings import Finding, Report
from knep.doctor.report.figures import figures
from knep.utils.pages import html_page, svg

_STYLE = (
    "h1{font-size:1.5rem}.verdict{padding:.6rem 1rem;border-radius:.3rem;font-weight:600}"
    ".healthy{background:#e3f2e6;color:#14572a}.sick{background:#fbe5e3;color:#8c1d16}"
    "article{border-left:4px solid #b3261e;padding:.1rem 1rem;margin:1.2rem 0;background:#fafafa}"
    "article.suspicion{border-color:#c98a00}h2{font-size:1.1rem}small{color:#666;font-weight:400}"
    "dl{display:grid;grid-template-columns:7rem 1fr;gap:.2rem .6rem;margin:.4rem 0}dt{color:#666}dd{margin:0}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere}"
    "code{background:#eee;padding:.1rem .3rem;overflow-wrap:anywhere}dd{overflow-wrap:anywhere}"
    "svg{width:100%;height:auto}figure{margin:1rem 0}"
)
_CAPTIONS = {
    "signal propagation": "Size of each layer's output on the way forward, and of its gradient on the way back. A "
    "curve that runs off by powers of ten means a signal that vanishes or explodes.",
    "dead and saturated units": "Units that are 0 for every image of the batch, and values at the flat ends.",
    "gradient by depth": "Each weight's gradient over its own size, from the input to the head.",
    "update to weight": "How much a step changes the weights, relative to their size.",
    "loss": "The loss of the steps that were watched.",
    "learning rate range": "The loss while the learning rate grows step by step.",
}


def page(report: Report, cure: str = "") -> str:
    """The report as HTML, with its figures inside. Whatever comes from a model or a config is escaped.

    cure: what came of one, as text, "" without.
    """
    state = "sick" if report.sick else "healthy"
    parts = [
        "<h1>knep doctor</h1>",
        f'<p class="verdict {state}">{escape(report.verdict)}</p>',
        f"<p>The examination took {report.seconds:.1f} s.</p>",
        *(_finding(number, finding) for number, finding in enumerate(report.findings, 1)),
        *(f"<p>Note: {escape(note)}</p>" for note in report.notes),
        *([f"<article><h2>The cure</h2><pre>{escape(cure)}</pre></article>"] if cure else []),
        *_figures(report.measured),
    ]
    return html_page("knep doctor", _STYLE, parts)


def _finding(number: int, finding: Finding) -> str:
    about = finding.about
    began = "" if finding.began is None else f", since step {finding.began}"
    sure = "" if finding.certain else ", a suspicion"
    title = f"<h2>{number}. {escape(about.title)} <small>{escape(about.kind)}{began}{sure}</small></h2>"
    rows = "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in _rows(finding))
    kind = "" if finding.certain else ' class="suspicion"'
    return f"<article{kind}>{title}<dl>{rows}</dl></article>"


def _rows(finding: Finding) -> Iterator[tuple[str, str]]:
    yield "evidence", escape(finding.evidence)
    yield "cause", escape(finding.about.cause)
    yield "source", escape(finding.about.source)
    for i, way in enumerate(finding.overrides):
        yield "or" if i else "try", f"<code>{escape(' '.join(way))}</code>"
    if finding.mend:
        yield "mend", escape(finding.mend)
    if finding.gain is not None:
        yield "trial", finding.gained


def _figures(measured: Mapping[str, Any]) -> Iterator[str]:
    for name, figure in figures(measured).items():
        yield f"<figure><h2>{escape(name)}</h2>{svg(figure)}<figcaption>{_CAPTIONS[name]}</figcaption></figure>"
