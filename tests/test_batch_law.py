"""optimizer.lr_per: the rate grows with the batch by the law of its rule."""

import pytest

import knep
from knep.config.compose import compose_config
from knep.config.schema import config_hash
from knep.errors import InputError
from knep.optim.batch_law import factor, law
from knep.recipes.recipe import Recipe


def rates(*lines):
    cfg = compose_config(["recipe=none", "optimizer.lr_per=256", *lines]).config
    recipe = Recipe.from_config(cfg)
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    return cfg, [group["lr"] for group in recipe.optimizer(net).param_groups]


@pytest.mark.parametrize(
    ("rule", "times"),
    [("sgd", 4), ("momentum", 4), ("sam", 4), ("adamw", 2), ("lamb", 2), ("lion", 2), ("normalized_sgd", 2)],
)
def test_the_rate_follows_the_law_of_its_rule(rule, times):
    cfg, found = rates(f"optimizer={rule}", "data.batch_size=1024")
    assert found == pytest.approx([times * cfg["optimizer"]["lr"]] * len(found))


def test_micro_batches_count_as_one_batch():
    cfg, found = rates("optimizer=sgd", "data.batch_size=128", "accumulate=4")
    assert found == pytest.approx([2 * cfg["optimizer"]["lr"]] * len(found))


def test_both_rates_of_muon_grow():
    cfg, found = rates("optimizer=muon", "data.batch_size=1024")
    assert sorted(set(found)) == pytest.approx(sorted({2 * cfg["optimizer"]["lr"], 2 * cfg["optimizer"]["adamw_lr"]}))


def test_smaller_batches_take_smaller_steps():
    assert factor("torch.optim.SGD", 64, 256) == 0.25
    assert factor("torch.optim.AdamW", 64, 256) == 0.5
    assert law("pytorch_optimizer.SOAP") == "sqrt"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true"])
def test_no_number_of_images_is_refused(value):
    with pytest.raises(InputError, match="lr_per"):
        rates(f"optimizer.lr_per={value}")


def test_a_batch_that_nobody_knows_is_refused():
    with pytest.raises(InputError, match="which this recipe does not know: leave it out"):
        knep.load("modern", ["optimizer.lr_per=256"])


def test_runs_without_it_keep_their_hash():
    made = compose_config([]).config
    before = {**made, "optimizer": {k: v for k, v in made["optimizer"].items() if k != "lr_per"}}
    assert config_hash(made) == config_hash(before)
    assert config_hash(compose_config(["optimizer.lr_per=256"]).config) != config_hash(made)


def test_a_config_of_a_folder_of_ones_own_may_scale_its_rate(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\n# Mine.\ndefaults:\n  - _self_\n")
    made = compose_config(["recipe=mine", "optimizer.lr_per=256"], [f"file://{tmp_path}"])
    assert made.config["optimizer"]["lr_per"] == 256
