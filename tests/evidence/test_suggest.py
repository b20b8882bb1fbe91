"""`knep suggest`: effects of the ledger against any option, their prediction for a problem, and what is left out."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from knep.cli.main import main
from knep.config.compose import compose_config
from knep.config.instantiate import instantiate
from knep.evidence.auto.budget import Budget
from knep.evidence.meta.verdicts import spec
from knep.evidence.suggest import command, features, kriging
from knep.evidence.suggest.command import Candidate, Problem, suggestions
from knep.evidence.suggest.features import Features, of_run
from knep.evidence.suggest.kriging import Model, Predicted
from knep.evidence.suggest.leave_out import leave_out, significant, table
from knep.evidence.suggest.measured import measured, share

PAGE = Path(__file__).parents[2] / "docs" / "suggest.md"

PLACES = {"a": (0.0, 0.0), "b": (1.0, 0.0), "c": (0.0, 2.0)}


def cell(option, workload, accuracies, **more):
    return {
        "option": option,
        "workload": workload,
        "test_acc": accuracies,
        "seeds": list(range(len(accuracies))),
        **more,
    }


LEDGER = {
    "norm": [
        cell("none", "a", [0.9, 0.9, 0.9], test_images=1000),
        cell("batch", "a", [0.95, 0.94, 0.96], test_images=1000),
        cell("layer", "a", [0.8, 0.8, 0.8], test_images=1000),
        cell("spectral", "a", [0.5, 0.5, 0.5], test_images=1000, against=True),
        {"option": "weight", "workload": "a", "refused": "no"},
    ]
}


def test_an_effect_is_the_logarithm_of_what_the_error_is_divided_by():
    found = measured(LEDGER, {"norm": "none"})
    assert set(found) == {("norm", "batch"), ("norm", "layer")}
    one = found["norm", "batch"]["a"]
    assert one.value == pytest.approx(math.log(0.1 / 0.05))
    assert one.error == pytest.approx(np.std([1.0, 1.2, 0.8], ddof=1) / 3**0.5)  # errors over their mean
    assert share(one.value) == pytest.approx(0.5)
    assert share(found["norm", "layer"]["a"].value) == pytest.approx(-1)


def test_effects_are_against_what_the_lines_have():
    found = measured(LEDGER, {"norm": "layer"})
    assert found["norm", "none"]["a"].value == pytest.approx(math.log(2))
    assert measured(LEDGER, {"norm": "mine"}) == {}


def model(tau=0.35, reach=1.0, spread=0.3):
    weights = np.full(len(kriging._TAUS), 1e-300)
    weights[kriging._TAUS.index(tau)] = 1.0
    return Model(PLACES, reach, spread, weights)


def test_with_one_tau_a_prediction_is_the_conditional_normal_law():
    trick = {"a": (0.5, 0.1), "b": (-0.2, 0.05)}
    at, tau, spread = (0.3, 0.4), 0.35, 0.3
    points = [PLACES["a"], PLACES["b"], at]
    untold = kriging._UNTOLD
    errors = (0.1, 0.05, 0.0)

    def covariance(i, j):
        alike = (1 - untold) * math.exp(-(math.dist(points[i], points[j]) ** 2) / 2) + untold * (i == j)
        return spread**2 + tau**2 * alike + errors[i] ** 2 * (i == j)

    joint = np.array([[covariance(i, j) for j in range(3)] for i in range(3)])
    gain = joint[2, :2] @ np.linalg.inv(joint[:2, :2])
    mean, deviation = gain @ [0.5, -0.2], (joint[2, 2] - gain @ joint[:2, 2]) ** 0.5
    found = model().predict(trick, at)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - 1.96 * deviation, mean + 1.96 * deviation), abs=1e-3)


def test_far_from_all_the_interval_is_wider_and_the_mean_shrinks():
    trick = dict.fromkeys(PLACES, (0.8, 0.05))
    near, far = (model(reach=0.5).predict(trick, at) for at in ((0.0, 0.0), (50.0, 50.0)))
    assert 0 < far.mean < near.mean < 0.8
    assert far.high - far.low > near.high - near.low
    assert sum(near.weights.values()) == pytest.approx(1)
    assert max(near.weights, key=near.weights.get) == "a"


def test_a_spread_of_effects_widens_every_interval():
    calm = [dict.fromkeys(PLACES, (0.1, 0.02)) for _ in range(20)]
    wild = [{"a": (1.0 * s, 0.02), "b": (-1.0 * s, 0.02), "c": (0.5 * s, 0.02)} for s in (1, -1) * 10]
    asked = {"a": (0.1, 0.02), "b": (0.1, 0.02)}
    widths = []
    for tricks in (calm, wild):
        found = Model.fitted(tricks, PLACES).predict(asked, PLACES["c"])
        widths.append(found.high - found.low)
    assert widths[1] > 2 * widths[0]


@pytest.mark.slow
def test_predictions_of_a_workload_left_out_keep_their_bars_and_the_page_says_so():
    controls = {slot: about["control"] for slot, about in spec()["slots"].items()}
    left = leave_out(
        measured(command.stored(), controls | {"optimizer": "adamw", "scaling": "standardize"}), features.stored()
    )
    rows = [row for one in left for row in one.rows]
    assert len(rows) > 200
    assert 0.90 <= np.mean([row.covered for row in rows]) <= 0.98
    assert np.mean([row.right for row in significant(left, corrected=False)]) >= 0.8
    assert np.mean([one.gain / one.best for one in left]) >= 0.6
    assert table(left) in PAGE.read_text(encoding="utf-8")


def test_stored_features_are_those_of_the_ledgers_workloads():
    about = spec()
    assert set(features.stored()) == set(about["workloads"])
    made = compose_config([*about["base"], *about["workloads"]["digits/mlp"], "threads=1"])
    data = instantiate(made.config["data"])
    data.prepare()
    found, kept = of_run(made.run, data), features.stored()["digits/mlp"]
    assert found.vector == pytest.approx(kept.vector, abs=0.05)


class Asked(Problem):
    """A problem that refuses batch norm, and composes nothing."""

    def refusal(self, way):
        return "no batches here" if way == ["norm=batch"] else None


def candidate(line, mean):
    slot, _, option = line.partition("=")
    return Candidate(slot, option, Predicted(mean, mean - 1, mean + 1, {"a": 1.0}), {"a": mean})


def test_suggestions_skip_what_cannot_be_and_take_a_slot_once(monkeypatch):
    lines = ["norm=batch", "norm=layer", "norm=group", "optimizer=soap", "init=lsuv", "clip=norm"]
    ranks = [candidate(line, 0.5 - 0.1 * i) for i, line in enumerate(lines)]
    monkeypatch.setattr(command, "ranked", lambda problem: ranks)
    problem = Asked((), compose_config(["recipe=none"]), None, Features(1, 1, 0.0, 0.0, 1.0, 1.0, 1, 0.0))
    found = suggestions(problem)
    assert [one.line for one in found.suggestions] == ["norm=layer", "optimizer=soap", "init=lsuv"]
    assert found.left_out == {"norm=batch": "no batches here"}
    monkeypatch.setattr(command, "ranked", lambda problem: [candidate("clip=norm", -0.1)])
    assert suggestions(problem).suggestions == []


def test_the_command_says_what_to_write_and_that_tables_were_not_measured(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    rng = np.random.default_rng(0)
    rows = ["x,y,target", *(f"{x:.3f},{y:.3f},{x - y:.3f}" for x, y in rng.normal(size=(60, 2)))]
    path.write_text("\n".join(rows), encoding="utf-8")
    lines = ["recipe=none", "data=csv", f"data.path={path}", "data.target=target", "task=regression", "model=mlp"]
    main(["suggest", "--json", *lines, "model.widths=[8]", "data.batch_size=16", "threads=1", "optimizer=adamw"])
    said = json.loads(capsys.readouterr().out)
    assert 1 <= len(said["suggestions"]) <= 3
    for one in said["suggestions"]:
        assert one["command"].endswith(one["line"])
        assert one["error_removed"]["low"] < one["error_removed"]["mean"] < one["error_removed"]["high"] < 1
        assert not one["line"].startswith(("regularization=label_smoothing", "augment="))
    assert "image classification only" in said["caveats"][-1]


def test_the_pages_commands_are_ones():
    blocks = PAGE.read_text(encoding="utf-8").split("```sh\n")[1:]
    lines = [line.split() for block in blocks for line in block.partition("```")[0].splitlines()]
    assert len(lines) == 4
    for words in lines:
        assert words[:2] in (["knep", "suggest"], ["python", "train.py"], ["knep", "train"])
        budget = [word.partition("=")[2] for word in words if word.startswith("budget=")]
        assert len(budget) == ("recipe=auto" in words)
        assert all(Budget.read(word) for word in budget)
        typed = [w for w in words[2:] if "=" in w and not w.startswith(("budget=", "recipe=auto"))]
        compose_config(typed)
