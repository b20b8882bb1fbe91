"""Composition: a recipe's values go with its options, and the command line has the last word."""

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from knep.config import compose as composing
from knep.config.catalog import CONF, GROUPS, options
from knep.config.compose import compose_config, plain
from knep.config.conflicts import CONFLICTS, find_conflict
from knep.config.overrides import parse
from knep.config.search_path import own_hydra
from knep.errors import InputError
from knep.recipes.recipe import SLOTS, Recipe
from tests.cells import thinned


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


@pytest.mark.parametrize("recipe", thinned(options("recipe"), 3))
def test_every_recipe_with_every_other_option_composes_and_instantiates(recipe):
    known = {slot: options(slot) for slot in SLOTS}
    tried = set()
    with initialize_config_module("knep.conf", version_base="1.3"):
        for i in range(max(map(len, known.values()))):  # an option of every slot at a time
            chosen = {slot: names[i % len(names)] for slot, names in known.items()}
            cfg = compose("train", [f"recipe={recipe}", *(f"{k}={v}" for k, v in chosen.items()), "name=x"])
            Recipe.from_config(plain(cfg))
            tried |= set(chosen.items())
    assert tried == {(slot, name) for slot, names in known.items() for name in names}


TYPED = {
    "values": ["model=mlp", "model.widths=[8]", "trainer.max_epochs=2", "hydra.run.dir=x/y", "seed=3"],
    "added and deleted": ["recipe=modern", "+optimizer.x=3", "~optimizer.lr", "++a.b=[1,{c:2}]", "callbacks=doctor"],
    **{group: [f"{group}={options(group)[-1]}", "seed=5", "name=${seed}"] for group in GROUPS},
}


@pytest.mark.parametrize("name", TYPED)
def test_values_set_on_composed_options_are_what_hydra_composes_of_all_lines(name):
    """In their order, with OmegaConf's flags and types, so that later lines are taken and refused as Hydra does."""

    def nodes(node, at=""):
        meta = node._metadata
        flags = {flag: on for flag, on in (meta.flags or {}).items() if on is not None}
        yield at, type(node), flags, meta.ref_type, meta.object_type, meta.optional
        if OmegaConf.is_dict(node) and not node._is_none() and not node._is_missing():
            for key in node:
                yield from nodes(node._get_node(key), f"{at}.{key}")

    with own_hydra([], False):
        parsed = parse(TYPED[name])
        groups = [o for o in parsed if composing._is_group(o, composing._groups())]
        assert all(composing._sets_a_value(o) for o in parsed if o not in groups)
        set_on = composing._with_values("train", parsed, groups)
        whole = composing._compose("train", TYPED[name])
    assert OmegaConf.to_yaml(set_on) == OmegaConf.to_yaml(whole)
    assert list(nodes(set_on)) == list(nodes(whole))


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


def test_both_tables_of_contents_list_every_slot():
    tables = {name: yaml.safe_load((CONF / f"{name}.yaml").read_text())["defaults"] for name in ("train", "knep")}
    for name, lines in tables.items():
        slots = {k: v for line in lines if isinstance(line, dict) for k, v in line.items() if k in SLOTS}
        values = {k.removeprefix("optional recipe@") for line in lines if isinstance(line, dict) for k in line}
        assert set(slots) == set(SLOTS), name
        assert set(SLOTS) <= values, name
    picked = [{k: v for line in lines if isinstance(line, dict) for k, v in line.items()} for lines in tables.values()]
    assert {slot: picked[0][slot] for slot in SLOTS} == {slot: picked[1][slot] for slot in SLOTS}


def test_a_folder_on_the_search_path_adds_options_and_recipes(tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("_target_: torch.optim.SGD\n_partial_: true\nlr: 0.7\n")
    for line in ([f"file://{tmp_path}"], []), ([], [f"hydra.searchpath=[file://{tmp_path}]"]):
        search, extra = line
        config = compose_config(["recipe=none", "optimizer=mine", *extra], search).config
        assert config["optimizer"]["lr"] == 0.7
    with pytest.raises(InputError, match="did you mean mine"):
        compose_config(["optimizer=mien"], [f"file://{tmp_path}"])
    with pytest.raises(InputError, match="not there"):
        compose_config(["optimizer=mine"], [f"file://{tmp_path}/nowhere"])


@pytest.mark.parametrize(
    ("task", "loss", "remedy"),
    [("regression", "huber", "write augment=none"), ("multiclass", "focal", "cross_entropy, or")],
)
def test_mixing_beside_a_loss_has_a_remedy_that_fits_the_task(task, loss, remedy):
    with pytest.raises(InputError, match=f"augment=mixup contradicts loss={loss}.*{remedy}"):
        compose_config([f"task={task}", f"loss={loss}", "augment=mixup"])
