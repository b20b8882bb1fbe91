"""Composition: a recipe's values go with its options, and the command line has the last word."""

import pytest
from hydra import compose, initialize_config_module

from knep.compose import compose_config, plain
from knep.conflicts import CONFLICTS, find_conflict
from knep.errors import InputError
from knep.listing import GROUPS, options
from knep.recipe import SLOTS, Recipe


def test_a_recipes_values_go_when_its_option_goes():
    kept = compose_config(["recipe=digits_best"]).config["optimizer"]
    assert kept["lr"] == 3e-3
    changed = compose_config(["recipe=digits_best", "optimizer=sgd"]).config["optimizer"]
    alone = compose_config(["recipe=none", "optimizer=sgd"]).config["optimizer"]
    assert changed == alone


def test_the_command_line_has_the_last_word():
    assert compose_config(["recipe=digits_best", "optimizer.lr=0.5"]).config["optimizer"]["lr"] == 0.5


def test_naming_the_recipes_own_option_keeps_its_values():
    a = compose_config(["recipe=digits_best", "optimizer=adamw"]).config
    assert a == compose_config(["recipe=digits_best"]).config


@pytest.mark.parametrize("recipe", options("recipe"))
def test_every_recipe_with_every_other_option_composes_and_instantiates(recipe):
    tried = 0
    with initialize_config_module("knep.conf", version_base="1.3"):
        for slot in SLOTS:
            for option in options(slot):
                cfg = compose("train", [f"recipe={recipe}", f"{slot}={option}", "name=x"])
                Recipe.from_config(plain(cfg))
                tried += 1
    assert tried == sum(len(options(slot)) for slot in SLOTS)


def test_conflicts_name_real_options():
    for c in CONFLICTS:
        assert set(c.options) <= set(options(c.slot)), c
        assert set(c.others) - {"*"} <= set(options(c.other)), c
        assert {c.slot, c.other} <= set(GROUPS)


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda c: f"{c.slot}-{c.other}")
def test_each_conflict_is_refused_with_its_reason(conflict):
    other = next(o for o in (conflict.others if "*" not in conflict.others else options(conflict.other)) if o != "none")
    choices = {conflict.slot: conflict.options[0], conflict.other: other}
    assert conflict.reason in (find_conflict(choices) or "")
    with pytest.raises(InputError, match="contradicts"):
        compose_config(["recipe=none", *(f"{k}={v}" for k, v in choices.items())])


def test_what_does_not_conflict_is_not_refused():
    assert find_conflict({"optimizer": "schedule_free", "scheduler": "none"}) is None
    assert find_conflict({"averaging": "swa", "scheduler": "cosine"}) is None
