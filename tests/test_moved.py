"""Runs and trials of earlier versions: the names that their targets had, and the hashes by which they are found."""

import copy

import pytest

from knep.config.compose import compose_config
from knep.config.instantiate import instantiate
from knep.config.moved import MOVED, with_current_names, with_first_names
from knep.config.schema import config_hash

# Of `recipe=<name>` and nothing else when the rooms were built: a stored trial and `resume=auto` look for these.
HASHES = {
    "baseline": "53b048a3aa05",
    "cifar_speedrun": "cfcb5c4f5ee9",
    "classic_2012": "74776174051c",
    "digits_best": "e3f886ca975f",
    "fashion_best": "78a1df6add13",
    "fashion_fast": "736a71f8c1e3",
    "fashion_speedrun": "16f9bdb4d96f",
    "modern": "5b130d419776",
    "none": "26fafea739b9",
    "resnet20_fashion": "83ad5a9cf4f5",
}


@pytest.mark.parametrize("name", HASHES)
def test_the_hash_of_a_recipe_is_the_one_that_stored_runs_have(name):
    assert config_hash(compose_config([f"recipe={name}"]).config) == HASHES[name]


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_today_s_and_hashes_as_it_did(old):
    stored = {"data": {"_target_": old, "listed": [{"_target_": old}]}, "seed": 0}
    today = with_current_names(copy.deepcopy(stored))
    assert today["data"]["_target_"] == today["data"]["listed"][0]["_target_"] == MOVED[old]
    assert with_first_names(today) == stored
    assert config_hash(today) == config_hash(stored)
    module, _, name = MOVED[old].rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name)


def test_an_old_name_builds_what_it_built():
    stored = {"_target_": "knep.models.zoo.torchvision", "name": "squeezenet1_1"}
    assert type(instantiate(stored, num_classes=3, in_channels=3, image_size=32)).__name__ == "SqueezeNet"
