"""The line that a refusal offers is tried with all that was typed beside it; rows of tables end in their report."""

import pytest

from knep.config.command_line.hints import with_doubt
from knep.config.compose import compose_config
from knep.errors import InputError

LINES = {
    "a loss of another task": ["task=binary", "loss=mse", "model=mlp", "data=synthetic"],
    "a network of another task": ["task=segmentation", "model=cnn", "data=synthetic", "augment=none", "recipe=none"],
}


@pytest.mark.parametrize("row", LINES)
def test_a_line_that_works_is_offered_without_doubt(row):
    lines = LINES[row]
    with pytest.raises(InputError) as error:
        compose_config(lines)
    assert "but then" not in with_doubt(str(error.value), lines, compose_config)


@pytest.mark.parametrize("model", ["torchvision", "timm", "import"])
def test_arguments_of_a_builder_are_set_as_a_whole_or_one_by_one(model):
    lines = ["recipe=none", f"model={model}", *(["model.path=mypkg.nets:build"] if model == "import" else [])]
    assert compose_config([*lines, "model.args={width: 3}"]).config["model"]["args"] == {"width": 3}
