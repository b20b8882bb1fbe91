"""One noun, three places: a trick is a name in its module, a YAML in its folder and a row in its slot's test."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object

from knep.config.catalog import CONF, GROUPS, SLOTS, TASK_SLOTS, options, reason, recipe_choices
from knep.config.stages import stages_of

TESTS = Path(__file__).parent
TRICKLESS = {"none", "default"}  # the options that are there to change nothing; and `loss=auto`, the task's own
ALL = (*SLOTS, *TASK_SLOTS)


def node(group, option):
    return yaml.safe_load((CONF / group / f"{option}.yaml").read_text())


def rows(slot):
    path = TESTS / "recipes" / f"test_{slot}.py"
    spec = importlib.util.spec_from_file_location(f"rows_{slot}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ROWS


@pytest.mark.parametrize("slot", ALL)
def test_every_yaml_has_a_row_and_every_row_a_yaml(slot):
    assert set(rows(slot)) == set(options(slot)) - TRICKLESS - ({"auto"} if slot == "loss" else set())
    assert all(callable(row) for row in rows(slot).values())


@pytest.mark.parametrize("slot", ALL)
def test_every_trick_has_a_yaml_and_every_yaml_a_target(slot):
    module = importlib.import_module(f"knep.recipes.{slot}")
    targets = {node(slot, option)["_target_"] for option in options(slot)}
    for target in targets:
        assert callable(get_object(target)), target
    own = {t.removeprefix(f"{module.__name__}.") for t in targets if t.startswith(module.__name__)}
    assert own == set(module.__all__)


@pytest.mark.parametrize("slot", SLOTS)
def test_none_exists_in_every_slot(slot):
    assert "none" in options(slot)


def test_every_group_is_listed_and_every_file_is_in_a_group():
    assert {p.name for p in CONF.iterdir() if p.is_dir()} - {"__pycache__"} == set(GROUPS)
    assert {p.name for p in CONF.glob("*.yaml")} == {"train.yaml", "knep.yaml"}


def test_every_option_says_when_to_use_it():
    silent = [(g, o) for g in GROUPS for o in options(g) if len(reason(g, o)) < 20]
    assert not silent


def test_a_recipes_values_belong_to_the_options_it_picks():
    for path in (CONF / "recipe").glob("*/*.yaml"):
        slot, _, option = path.stem.partition("-")
        picked = recipe_choices(path.parent.name)
        assert option in stages_of(picked.get(slot, option)), path
        assert option in options(slot), path
        beside = yaml.safe_load((CONF / "train.yaml").read_text()).get(slot, {})  # such as optimizer.wrap
        unknown = set(yaml.safe_load(path.read_text())) - {*known_keys(slot, option), *beside}
        assert not unknown, path


def known_keys(slot, option):
    cfg = node(slot, option)
    parents = [d for d in cfg.pop("defaults", []) if isinstance(d, str) and d != "_self_"]
    return {*cfg, *(k for parent in parents for k in known_keys(slot, parent))}


def test_a_recipes_body_sets_only_what_every_option_has():
    for option in options("recipe"):
        body = node("recipe", option)
        for group, values in body.items():
            if group != "defaults" and isinstance(values, dict):
                assert all(set(values) <= known_keys(group, o) for o in options(group)), (option, group)


def test_the_walk_saw_everything():
    files = sorted(p.relative_to(CONF) for p in CONF.rglob("*.yaml"))
    seen = [f"{g}/{o}.yaml" for g in GROUPS for o in options(g)]
    values = [str(p.relative_to(CONF)) for p in (CONF / "recipe").glob("*/*.yaml")]
    assert sorted(map(str, files)) == sorted([*seen, *values, "train.yaml", "knep.yaml"])
    assert len(files) > 120
