"""Reports say what they found in order of gravity, and every disease has all that a reader needs."""

from __future__ import annotations

import json

import pytest

from knep.config.compose import compose_config
from knep.doctor.findings import Finding, Report, diseases, ordered


@pytest.mark.parametrize("name", sorted(diseases()))
def test_a_disease_says_its_cause_its_source_and_what_mends_it(name):
    disease = diseases()[name]
    assert disease.kind in ("data", "model", "optimisation", "regularization", "speed")
    assert disease.title
    assert disease.cause
    assert disease.source
    assert all(part.isprintable() for part in (disease.title, disease.cause, disease.source, disease.mend))


@pytest.mark.parametrize("name", sorted(n for n, d in diseases().items() if d.overrides))
def test_what_the_table_prescribes_can_be_typed(name):
    for way in diseases()[name].overrides:
        compose_config(["recipe=none", "model=mlp", "optimizer=sgd", *way])


def test_the_gravest_comes_first_and_a_disease_once():
    findings = ordered(
        [Finding("lr_too_low", "a", 0.3), Finding("overfitting", "b", 0.9), Finding("lr_too_low", "c", 0.5)]
    )
    assert [(f.disease, f.evidence) for f in findings] == [("overfitting", "b"), ("lr_too_low", "c")]


def test_a_report_reads_in_the_terminal_and_as_data():
    finding = Finding("lr_too_high", "loss 2 to 90", 0.7, overrides=(("optimizer.lr=0.1",), ("clip=norm",)), gain=12.3)
    report = Report((finding,), {"trial": {"losses": [1.0]}}, 1.5)
    text = str(report)
    for word in (
        "sick: the learning rate is too high",
        "loss 2 to 90",
        "try",
        "optimizer.lr=0.1",
        "or",
        "+12.3 points",
    ):
        assert word in text
    data = json.loads(json.dumps(report.as_dict()))
    assert data["sick"]
    assert data["findings"][0]["disease"] == "lr_too_high"
    assert data["findings"][0]["overrides"] == [["optimizer.lr=0.1"], ["clip=norm"]]
    assert not Report(()).sick
    assert str(Report(())).startswith("healthy")


def test_names_from_strangers_do_no_harm_in_the_terminal():
    evidence = "layer \x1b[31mred\x07\nnext"
    text = str(Report((Finding("cut_off", evidence, 1.0),)))
    assert "\x1b" not in text
    assert "\x07" not in text
