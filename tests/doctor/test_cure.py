"""A cure keeps the prescriptions that help, and writes them as a line and as a recipe."""

from __future__ import annotations

import yaml

from knep.compose import compose_config
from knep.doctor.cure import cure, merged, recipe_yaml

_SICK = [
    "recipe=baseline",
    "model=mlp",
    "model.widths=[32]",
    "optimizer=sgd",
    "optimizer.lr=1e-5",
    "data=synthetic",
    "data.images=800",
    "data.image_size=8",
    "trainer.max_epochs=5",
    "threads=1",
]


def test_a_line_gives_way_to_what_a_prescription_says():
    lines = ["recipe=none", "init=unit_normal", "optimizer.lr=1", "clip=norm", "clip.theta=0.1"]
    assert merged(lines, ["init=he_normal"]) == (
        "recipe=none",
        "optimizer.lr=1",
        "clip=norm",
        "clip.theta=0.1",
        "init=he_normal",
    )
    assert merged(lines, ["optimizer.lr=0.1"])[-2:] == ("clip.theta=0.1", "optimizer.lr=0.1")
    assert merged(lines, ["clip=none"]) == ("recipe=none", "init=unit_normal", "optimizer.lr=1", "clip=none")


def test_a_rate_far_too_low_is_found_and_cured(tmp_path):
    cured = cure(_SICK)
    assert cured.report.findings[0].disease == "lr_too_low"
    assert cured.after > cured.before + 0.2
    assert any(line.startswith("optimizer.lr=") for way, _ in cured.kept for line in way)
    assert "optimizer.lr=1e-5" not in cured.overrides
    again = cure(_SICK)
    assert (again.overrides, again.after) == (cured.overrides, cured.after)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "cured.yaml").write_text(recipe_yaml(compose_config(cured.overrides), "Cured."))
    config = compose_config(["recipe=cured", "model=mlp"], [f"file://{tmp_path}"]).config
    wanted = compose_config(cured.overrides).config
    assert config["optimizer"] == wanted["optimizer"]
    assert config["scaling"] == wanted["scaling"]


def test_the_recipe_of_a_cure_is_plain_yaml():
    text = recipe_yaml(compose_config(["recipe=modern", "model=cnn"]), "A note.")
    assert text.startswith("# @package _global_")
    loaded = yaml.safe_load(text)
    choices = compose_config(["recipe=modern", "model=cnn"]).choices
    assert {"override /init": choices["init"]} in loaded["defaults"]
    assert {"override /optimizer": choices["optimizer"]} in loaded["defaults"]
    assert "_target_" not in text


def test_what_is_not_sick_is_left_as_it_is():
    lines = [*_SICK[:3], "optimizer=adam", "optimizer.lr=1e-2", *_SICK[5:-2], "trainer.max_epochs=20", "threads=1"]
    cured = cure(lines)
    assert not cured.kept
    assert cured.overrides == tuple(lines)
