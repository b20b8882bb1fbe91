"""Many cells at once: pooling against published numbers, seeds x images against a known spread, corrected verdicts."""

import json

import numpy as np
import pytest

from knep.evidence import ledger
from knep.evidence.meta import verdicts
from knep.evidence.meta.images import two_way
from knep.evidence.meta.random_effects import pool
from knep.utils.bits import packed, unpacked

# Colditz et al. 1994, 13 trials of the BCG vaccine: cases and others, vaccinated and not.
BCG = """4 119 11 128; 6 300 29 274; 3 228 11 209; 62 13536 248 12619; 33 5036 47 5761; 180 1361 372 1079; 8 2537 10 619
505 87886 499 87892; 29 7470 45 7232; 17 1699 65 1600; 186 50448 141 27197; 5 2493 3 2338; 27 16886 29 17825"""


def bcg():
    """Log risk ratios and their standard errors."""
    a, b, c, d = np.array([list(map(int, row.split())) for row in BCG.replace("\n", ";").split(";")]).T
    return np.log(a / (a + b) / (c / (c + d))), np.sqrt(1 / a - 1 / (a + b) + 1 / c - 1 / (c + d))


def test_pooling_gives_what_metafor_and_stata_publish_for_the_bcg_trials():
    """metafor's test of rma(method="DL") against Stata's metan: -0.7141 [-1.0644, -0.3638], Q = 152.2330."""
    found = pool(*bcg())
    assert found.mean == pytest.approx(-0.7141, abs=5e-5)
    assert found.q == pytest.approx(152.2330, abs=5e-5)
    assert found.tau**2 == pytest.approx(0.3088, abs=5e-5)
    assert found.i2 == pytest.approx(0.9212, abs=5e-5)
    wald = (1.0644 - 0.3638) / 2 / 1.959964  # their standard error; Hartung and Knapp's is at least as large
    assert (found.high - found.low) / 2 / 2.178813 >= wald - 1e-4
    assert found.new_low < found.low < found.high < found.new_high


def test_three_workloads_by_hand():
    # Errors of 1: Q = 2 * 3^2 = 18, C = 3 - 1 = 2, tau^2 = (18 - 2) / 2 = 8; the mean's error is sqrt((8 + 1) / 3), and
    # Hartung and Knapp's scale is (9 + 0 + 9) / 9 / 2 = 1.
    found = pool([1.0, 4.0, 7.0], [1.0, 1.0, 1.0])
    assert (found.mean, found.q, found.tau**2) == pytest.approx((4, 18, 8))
    assert found.i2 == pytest.approx(1 - 2 / 18)
    assert found.high - 4 == pytest.approx(4.302653 * 3**0.5, rel=1e-6)
    assert found.new_high - 4 == pytest.approx(4.302653 * (8 + 3) ** 0.5, rel=1e-6)
    agree = pool([4.0, 4.0, 4.0], [1.0, 1.0, 1.0])  # by chance: no narrower than the usual interval
    assert (agree.tau, agree.i2) == (0, 0)
    assert agree.high - 4 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


@pytest.mark.parametrize("given", [([1, 2], [1, 1]), ([1, 2, 3], [1, 1]), ([1, 2, 3], [1, 0, 1])])
def test_what_cannot_be_pooled_is_refused(given):
    with pytest.raises(ValueError, match="pooling takes 3 effects"):
        pool(*given)


def test_intervals_of_a_new_workload_hold_it():
    rng, held, held_mean = np.random.default_rng(0), 0, 0
    for _ in range(600):
        errors = rng.uniform(0.5, 1.5, 5)
        found = pool(rng.normal(2, 2, 5) + rng.normal(0, errors), errors)
        held += found.new_low <= rng.normal(2, 2) <= found.new_high
        held_mean += found.low <= 2 <= found.high
    assert held >= 0.90 * 600
    assert held_mean >= 0.93 * 600


def test_seeds_and_images_widen_an_interval_to_what_both_scatter():
    rng, held = np.random.default_rng(1), 0
    for _ in range(60):
        hard = rng.uniform(0.5, 1, 200)  # how likely an image is right, for both
        gain = rng.normal(0.02, 0.05, 200)  # and what the trick does to it: 0.02 in the mean of all images
        control, treated = rng.random((10, 200)) < hard, rng.random((10, 200)) < np.clip(hard + gain, 0, 1)
        low, high = two_way(treated, control, rounds=300)
        truth = float(np.mean(np.clip(hard + gain, 0, 1) - hard))
        held += low <= truth <= high
    assert held >= 54
    with pytest.raises(ValueError, match="seeds x images of both sides"):
        two_way(np.zeros((2, 5)), np.zeros((3, 5)))


def test_an_image_that_all_seeds_get_wrong_counts_as_one():
    """All seeds differ from the control in the same images: over seeds alone there is no scatter at all."""
    treated = np.zeros((10, 100), bool)
    treated[:, :10] = True
    low, high = two_way(treated, np.zeros((10, 100), bool))
    binomial = (0.1 * 0.9 / 100) ** 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * binomial, rel=0.15)


@pytest.mark.parametrize("n", [0, 1, 8, 359])
def test_bits_come_back(n):
    bits = np.random.default_rng(n).random(n) < 0.9
    assert (unpacked(packed(bits)) == bits).all()
    assert len(packed(np.ones(10_000, bool))) < 60


@pytest.mark.parametrize("text", ["", "3", "3:%%", "900:" + packed(np.ones(9, bool)).partition(":")[2], "8:eJw="])
def test_what_is_no_row_of_bits_is_refused(text):
    with pytest.raises(ValueError, match=r"bits|invalid literal"):
        unpacked(text)


def test_every_stored_verdict_is_that_of_its_accuracies_corrected_over_the_ledger():
    found, again = verdicts.stored(), verdicts.judged(json.loads(json.dumps(verdicts.stored())))
    count = 0
    for slot, rows in found.items():
        for cell, anew in zip(rows, again[slot], strict=True):
            if cell.get("effect"):
                count += 1
                assert cell["effect"]["verdict"] == anew["effect"]["verdict"], (slot, cell["option"])
                assert cell["effect"]["corrected_p"] == pytest.approx(anew["effect"]["corrected_p"], abs=1e-6)
                for key in ("mean", "low", "high", "p", "p_flip"):
                    assert cell["effect"]["accuracy"][key] == pytest.approx(anew["effect"]["accuracy"][key], abs=1e-6)
    assert count == verdicts.count(found) > 300


def test_uses_that_a_card_advises_against_exist_and_are_marked():
    about = verdicts.spec()
    wanted = {(s, o, w) for s, some in about["against"].items() for o, on in some.items() for w in on}
    marked = {
        (s, c["option"], c["workload"]) for s, rows in verdicts.stored().items() for c in rows if c.get("against")
    }
    assert marked <= wanted
    assert {(s, o) for s, o, _ in wanted} == {(s, o) for s, o, _ in marked}  # each names an option that was measured
    for slot, some in about["shown"].items():
        for option in some:
            assert verdicts.pooled(slot, option, verdicts.stored()) is not None, (slot, option)


def test_a_cell_more_changes_the_verdicts_of_all(tmp_path):
    def cell(option, control, accs, workload="digits/mlp"):
        seeds = list(range(len(accs)))
        effect = {"failed": 0, "steps": None, "unreached": 0, "control_unreached": 0} if control else None
        return {"option": option, "workload": workload, "control": control, "n": len(accs), "seeds": seeds,
                "test_acc": accs, "test_images": 359, "effect": effect}  # fmt: skip

    rng = np.random.default_rng(0)
    plain = list(0.9 + rng.normal(0, 0.003, 10))
    gain = [a + 0.005 + e for a, e in zip(plain, rng.normal(0, 0.003, 10), strict=True)]
    alone = {"clip": [cell("none", "", plain), cell("norm", "none", gain)]}
    one = verdicts.judged(json.loads(json.dumps(alone)))["clip"][1]["effect"]
    assert one["corrected_p"] == one["accuracy"]["p"] < 0.05
    many = alone | {"init": [cell("default", "", plain), *(cell(f"x{i}", "default", plain) for i in range(40))]}
    among = verdicts.judged(json.loads(json.dumps(many)))["clip"][1]["effect"]
    assert among["corrected_p"] == pytest.approx(min(1, 41 * one["accuracy"]["p"]))
    assert (one["verdict"], among["verdict"]) == ("helps", "no evidence")
    for slot, cells in many.items():
        (tmp_path / f"{slot}.json").write_text(json.dumps({"slot": slot, "cells": cells}))
    ledger.judge(tmp_path, verdicts.spec())
    kept = json.loads((tmp_path / "clip.json").read_text())["cells"][1]["effect"]
    assert kept["corrected_p"] == pytest.approx(among["corrected_p"], abs=1e-6)
