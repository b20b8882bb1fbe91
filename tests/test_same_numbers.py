"""The same seed gives the same numbers, whoever decodes, watches, or shares the work: a slice of same_numbers."""

import pytest

from tests.exhaustive import resume_matrix as matrix
from tests.exhaustive import same_numbers as same


@pytest.mark.parametrize("name", [pytest.param("modern", marks=pytest.mark.slow), "digits_best"])
def test_a_recipe_repeats_itself_and_another_seed_differs(name, tmp_path):
    lines = [f"recipe={name}", *matrix.BESIDE[f"recipe={name}"]]
    assert same.compare(lines, lines, tmp_path) == "identical"
    matrix.fit([*lines, "seed=1"], tmp_path / "third")
    assert same.difference(same.weights(tmp_path / "one"), same.weights(tmp_path / "third")).startswith("differs by")


def test_who_decodes_and_who_watches_changes_nothing():
    outcomes = dict([*same.workers(), *same.watched()])
    assert len(outcomes) == 7
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "identical"} == {}


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    assert same.pair_of_processes("cnn", tmp_path).startswith("identical in images and metrics")
