"""`augment=[flip,erase]`: composed in order, from a command line or a file, and refused where it makes no sense."""

import signal

import pytest
import torch

import knep
from knep.cli.main import main as knep_command
from knep.config.compose import compose_config, compose_recipe
from knep.config.external_app import refuse_contradictions
from knep.config.schema import config_hash
from knep.doctor.cure.result import recipe_yaml
from knep.errors import InputError
from knep.evidence.arms import ablation
from knep.recipes.augment import Erase, Flip, RandAugment
from tests.exhaustive import resume_matrix as matrix
from tests.exhaustive.members_exact import BAR, RunConfig, composed, members_of, together_and_in_turn

RECIPE = """# @package _global_
# A recipe of somebody's.
defaults:
  - override /optimizer: adamw
  - override /augment: [shift, rand_augment, erase]
  - _self_
augment:
  rand_augment: {magnitude: 5.0}
"""


@pytest.fixture
def search(tmp_path):
    """A folder with a recipe that has a list, and values for one of its stages."""
    (tmp_path / "recipe" / "mine").mkdir(parents=True)
    (tmp_path / "recipe" / "mine.yaml").write_text(RECIPE)
    (tmp_path / "recipe" / "mine" / "augment-shift.yaml").write_text("pixels: 4\n")
    return [f"file://{tmp_path}"]


def test_a_list_is_a_node_for_each_stage_and_their_order():
    made = compose_config(["augment=[flip, erase]", "augment.erase.mode=pixel"])
    assert made.choices["augment"] == "[flip,erase]"
    node = made.config["augment"]
    assert node["order"] == ["flip", "erase"]
    assert node["erase"]["mode"] == "pixel"
    assert list(node["flip"]) == ["_target_", "p", "alternate", "off_epoch"]
    assert compose_config(made.overrides).config == made.config  # as a run's folder keeps its lines


def test_the_order_is_a_part_of_the_hash():
    one, other = (compose_config([f"augment={o}"]).config for o in ("[erase,mixup]", "[mixup,erase]"))
    assert config_hash(one) != config_hash(other)


def test_one_option_is_what_it_was():
    node = compose_config(["augment=flip", "augment.p=0.3"]).config["augment"]
    assert node == {"_target_": "knep.recipes.augment.Flip", "p": 0.3, "alternate": False, "off_epoch": None}


def test_a_recipe_s_file_has_a_list_and_values_for_its_stages(search):
    made = compose_config(["recipe=mine"], search)
    assert made.choices["augment"] == "[shift,rand_augment,erase]"
    assert made.config["augment"]["shift"]["pixels"] == 4
    assert made.config["augment"]["rand_augment"]["magnitude"] == 5.0
    fewer = compose_recipe("mine", ["augment=[shift,rand_augment]", "augment.shift.pixels=1"], search)["augment"]
    assert fewer["order"] == ["shift", "rand_augment"]
    assert fewer["shift"]["pixels"] == 1


def test_values_of_a_recipe_s_option_count_for_the_stage():
    node = compose_config(["recipe=fashion_fast", "augment=[shift_flip,erase]"]).config["augment"]
    assert node["shift_flip"]["pixels"] == compose_config(["recipe=fashion_fast"]).config["augment"]["pixels"] == 1


def test_load_gives_the_stages():
    augment = knep.load("modern", ["augment=[flip,rand_augment,erase]", "augment.flip.p=1.0"]).augment
    assert [type(s) for s in augment.stages.values()] == [Flip, RandAugment, Erase]
    x, y = torch.arange(50).reshape(1, 2, 5, 5).float(), torch.zeros(1).long()
    assert torch.equal(augment.stages["flip"](x, y, 3)[0], x.flip(3))


REFUSED = {
    "augment=[]": "write augment=none",
    "augment=[none,flip]": "write augment=[flip]",
    "augment=[flip,flip,erase]": "names flip twice: write augment=[flip,erase]",
    "augment=[erase,flip]": "write augment=[flip,erase]",
    "augment=[mixup,rand_augment,flip]": "write augment=[rand_augment,flip,mixup]",
    "augment=[flip,repeats]": "write augment=[repeats,flip]",
    "augment=[mixup,cutmix]": "write augment=[mixup_cutmix]",
    "augment=[mixup,mixup_cutmix]": "write augment=[mixup]",
    "augment=[flip,shift_flip]": "mirrors images",
    "augment=[shift,shift_flip]": "shifts images",
    "augment=[trivial,rand_augment]": "is a policy of operations",
    "augment=[flip,eraze]": "augment=eraze is not an option: did you mean erase?",
    "augment=[flip,erase],flip": "write -m",
    "augment=[flip,erase] augment.p=0.3": "write augment.flip.p=0.3",
    "augment=[flip,erase] augment.mode=pixel": "write augment.erase.mode=pixel",
    "augment=[flip,erase] augment.mixup.alpha=1": "write augment=[flip,erase,mixup] augment.mixup.alpha=1",
    "augment=flip augment.erase.p=1": "write augment=[flip,erase] augment.erase.p=1",
    "augment=flip augment.flip.p=1": "write augment.p=1",
    "augment=[flip,erase] augment.flip.q=1": "there is no key augment.flip.q",
    "augment=[flip,erase] +augment.mine=1": "augment.mine is no stage",
    "augment=[flip,erase] augment.order=[erase,flip]": "write augment=[flip,erase]",
    "augment=[flip,erase] augment.order=[flip]": "augment.erase is no stage",
    "augment=[flip,mixup_cutmix] augment.mixup_cutmix.smoothing=0.1 regularization=label_smoothing": "smoothed twice",
    "augment=[random_resized_crop,flip] augment.random_resized_crop.size=5 model=mlp": "size=null",
}


@pytest.mark.parametrize("lines", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(lines):
    with pytest.raises(InputError) as refused:
        compose_config(lines.split(" "))
    assert REFUSED[lines] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("order", ["[mixup_cutmix,erase]", "[erase,mixup_cutmix]", "[repeats,color_jitter,erase]"])
def test_either_order_of_erasing_and_mixing_is_taken(order):
    assert compose_config([f"augment={order}"]).choices["augment"] == order


def test_other_words_are_taken_in_a_list_too(capsys):
    assert compose_config(["augment=[hflip,randomerasing]"]).choices["augment"] == "[flip,erase]"
    assert "augment=hflip is taken as augment=flip" in capsys.readouterr().err


def test_another_project_s_stages_are_checked():
    node = compose_config(["augment=[flip,mixup]"]).config["augment"]
    refuse_contradictions({"augment": node, "optimizer": {}})
    with pytest.raises(InputError, match="write augment="):
        refuse_contradictions({"augment": {**node, "order": ["mixup", "flip"]}, "optimizer": {}})


def test_ablation_takes_each_stage_away():
    lines = ["augment=[shift,rand_augment,erase]", "augment.erase.p=0.5"]
    arms = {arm.name: arm for arm in ablation("modern", lines, ["augment"])}
    made = {name: compose_config(arm.overrides) for name, arm in arms.items()}
    assert {name: found.choices["augment"] for name, found in made.items()} == {
        "all": "[shift,rand_augment,erase]",
        "bare": "none",
        "without augment.shift": "[rand_augment,erase]",
        "only augment.shift": "[shift]",
        "without augment.rand_augment": "[shift,erase]",
        "only augment.rand_augment": "[rand_augment]",
        "without augment.erase": "[shift,rand_augment]",
        "only augment.erase": "[erase]",
    }
    assert made["only augment.erase"].config["augment"]["erase"]["p"] == 0.5
    assert arms["without augment.erase"].option == "erase"
    assert arms["without augment.erase"].sign == -1


def test_a_cured_recipe_keeps_its_stages(tmp_path):
    made = compose_config(["recipe=modern", "augment=[shift,erase]", "augment.erase.p=0.7"])
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "cured.yaml").write_text(recipe_yaml(made, "cured"))
    again = compose_config(["recipe=cured"], [f"file://{tmp_path}"])
    assert again.config["augment"] == made.config["augment"]
    assert again.choices["augment"] == "[shift,erase]"


def test_show_has_the_keys_of_a_stage(capsys):
    knep_command(["show", "augment/rand_augment"])
    assert "magnitude: 9.0" in capsys.readouterr().out


STAGES = "augment=[repeats,random_resized_crop,flip,color_jitter,rand_augment,mixup_cutmix,erase]"


@pytest.mark.parametrize(
    "lines",
    [
        [STAGES, "augment.erase.mode=pixel", "augment.erase.count=3", "augment.mixup_cutmix.mode=elem"],
        ["augment=[shift,aug_mix,mixup]", "augment.mixup.off_epoch=2"],
        ["augment=[three_augment,erase]", "augment.three_augment.off_epoch=1", "lean=false"],
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_bit(lines, tmp_path):
    matrix.fit(lines, tmp_path / "whole")
    for i, batch in enumerate((4, 12)):
        strike = [matrix.Strike(batch, signal.SIGINT)]
        assert matrix.fit(lines, tmp_path / "parts", strike, resume=i > 0) == signal.SIGINT
    assert matrix.fit(lines, tmp_path / "parts", resume=True) == 0
    assert matrix.difference(matrix.traces(tmp_path / "whole"), matrix.traces(tmp_path / "parts")) == "identical"


def test_members_in_one_pass_draw_what_they_would_alone():
    run = RunConfig.of(composed("mlp", "augment=[repeats,flip,rand_augment,mixup_cutmix,erase]"))
    assert together_and_in_turn(members_of(run, 2), "mlp") <= BAR


def test_a_net_that_cannot_read_the_sizes_of_training_is_refused(tmp_path):
    from knep.config.compose import compose_config
    from knep.run.run import run

    for line in ("augment=progressive_resize", "augment=[random_resized_crop] augment.random_resized_crop.size=6"):
        lines = ["data=digits", "recipe=none", "model=cnn", "scaling=unit", "progress=false", *line.split()]
        made = compose_config(lines)
        with pytest.raises(InputError, match="which this model cannot read"):
            run(made.config, tmp_path / "run", made.choices, made.overrides, figures=False)
