"""The report as a page, and its figures from plain data."""

import math
from html.parser import HTMLParser

import pytest

from knep.doctor.findings import Finding, Report
from knep.doctor.report.figures import figures
from knep.doctor.report.html import page

LAYERS = [
    {"path": "0", "kind": "Linear", "mean": 0.1, "std": 1.0, "similarity": 0.1, "grad_std": 1e-9},
    {"path": "1", "kind": "ReLU", "mean": 0.4, "std": 0.6, "dead": 0.25, "similarity": 0.4, "grad_std": 1e-6},
    {"path": "2", "kind": "Tanh", "mean": 0.0, "std": 0.9, "saturated": 0.5, "grad_std": 1e-4},
    {"path": "3", "kind": "Linear", "mean": math.nan, "std": 2.0, "grad_std": None},
]
WEIGHTS = [{"path": f"{i}.weight", "grad_norm": 10.0**-i, "weight_norm": 2.0} for i in range(3)]
MEASURED = {
    "signals": {"layers": LAYERS, "weights": WEIGHTS},
    "trial": {
        "losses": [2.3, 2.0, math.nan, 1.5],
        "updates": [[0, 1e-3], [2, 0.0], [3, 2e-3]],
        "curve": [[2, 2.1, 0.3]],
    },
    "range": {"rates": [1e-4, 1e-3, 1e-2, 1e-1], "losses": [2.3, 2.0, 1.0, math.inf]},
}
NAMES = {
    "signal propagation": ("signals", "layers"),
    "dead and saturated units": ("signals", "layers"),
    "gradient by depth": ("signals", "weights"),
    "update to weight": ("trial", "updates"),
    "loss": ("trial", "losses"),
    "learning rate range": ("range", "rates"),
}
SPOILED = "<script>alert('x')</script> & \"quoted\""


class Tags(HTMLParser):
    """The elements of a page and the addresses that they name."""

    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]


def read(text):
    tags = Tags()
    tags.feed(text)
    return tags


def test_every_figure_is_drawn_from_plain_data():
    assert list(figures(MEASURED)) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_leaves_its_figure_out(name):
    part, key = NAMES[name]
    measured = MEASURED | {part: {k: v for k, v in MEASURED[part].items() if k != key}}
    drawn = figures(measured)
    assert name not in drawn
    assert {n for n, at in NAMES.items() if at != (part, key)} <= set(drawn)
    assert figures({}) == {}


@pytest.mark.parametrize("name", NAMES)
def test_each_figure_has_the_healthy_band(name):
    figure = figures(MEASURED)[name]
    for axes in figure.axes:
        assert any(text.get_text().startswith("healthy") for text in axes.get_legend().get_texts()), name


def test_the_lines_are_the_numbers():
    axes = figures(MEASURED)["update to weight"].axes[0]
    [line] = axes.get_lines()
    assert line.get_xydata().tolist() == [[0, 1e-3], [3, 2e-3]]
    backward = figures(MEASURED)["signal propagation"].axes[1]
    assert backward.get_lines()[0].get_ydata().tolist() == [1e-9, 1e-6, 1e-4]


def test_numbers_that_are_not_finite_leave_an_empty_page_whole():
    broken = {"signals": {"layers": [{"path": "a", "mean": math.nan, "std": math.inf}], "weights": []}}
    broken |= {"trial": {"losses": [math.nan] * 3, "updates": [[0, math.nan]], "curve": [[0, math.nan, 0.0]]}}
    assert "<svg" in page(Report((), broken | {"range": {"rates": [0.1], "losses": [math.nan]}}))


def test_the_page_shows_the_findings_in_order():
    first = Finding(
        "lr_too_high", "the loss rises to 90", 0.9, began=12, overrides=(("optimizer.lr=0.01",),), gain=12.5
    )
    second = Finding(
        "dying_relu", "80% of the units", 0.6, certain=False, mend="start anew", overrides=(("a=1",), ("b=2",))
    )
    text = page(Report((first, second), MEASURED, 1.25, ("one layer was not seen",)))
    wanted = [
        "the learning rate is too high",
        "since step 12",
        "the loss rises to 90",
        "optimizer.lr=0.01",
        "+12.5 points",
    ]
    wanted += [
        "most ReLU units",
        "a suspicion",
        "80% of the units",
        "a=1",
        "b=2",
        "start anew",
        "one layer was not seen",
    ]
    places = [text.find(part) for part in wanted]
    assert -1 not in places
    assert places == sorted(places)
    assert text.count("<svg") == len(NAMES)


def test_a_healthy_page_says_so():
    text = page(Report((), {}))
    assert "healthy: nothing found" in text
    assert "<article" not in text
    assert "<svg" not in text


def test_text_from_a_model_is_escaped():
    found = Finding("cut_off", SPOILED, 0.9, layers=(SPOILED,), overrides=((SPOILED,),), mend=SPOILED)
    spoiled = [{"path": SPOILED, "kind": "$x$", "mean": 0.1, "std": 1.0, "dead": 0.2, "grad_std": 1.0}]
    weights = [{"path": SPOILED, "grad_norm": 1.0, "weight_norm": 1.0}]
    tags = read(page(Report((found,), {"signals": {"layers": spoiled, "weights": weights}}, 0.0, (SPOILED,))))
    assert "script" not in tags.tags


def test_the_page_needs_nothing_beside_it():
    found = Finding("lr_too_low", "slow", 0.5, overrides=(("optimizer.lr=1",),))
    tags = read(page(Report((found,), MEASURED)))
    assert not tags.links
    assert not {"script", "link", "iframe", "img"} & set(tags.tags)


def test_the_same_report_gives_the_same_page():
    report = Report((), MEASURED)
    assert page(report) == page(report)
