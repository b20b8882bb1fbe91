"""What a config may build: a row per attack, a canary that proves that none of them ran, and every YAML of ours."""

import shutil
import sys
from dataclasses import make_dataclass

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from knep.cli.train import main
from knep.config import instantiate
from knep.config.catalog import CONF, GROUPS, options
from knep.config.compose import compose_config, plain
from knep.engine.load import load_module
from knep.errors import InputError

# A project of somebody else's. Importing it and calling it both leave a file behind.
PACKAGE = """
import os
from torch.nn import ReLU
from knep.models.cnn import cnn
from torch.optim import SGD
from pathlib import Path
def touch(*args, **kwargs):
    Path({canary!r}).touch()
class Mine(SGD):
    pass
class Tools:
    run = staticmethod(touch)
def build(in_channels, num_classes, image_size):
    return ReLU()
constant = 3
if {sings}:
    touch()
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that an attack leaves; the packages evil (left by importing it) and mypkg (by calling it) are there."""
    path = tmp_path / "canary"
    for name, sings in (("evil", True), ("evilnet", True), ("mypkg", False), ("mypkgevil", True)):
        (tmp_path / f"{name}.py").write_text(PACKAGE.format(canary=str(path), sings=sings))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(instantiate, "_allowed", [])
    yield path
    for name in ("evil", "evilnet", "mypkg", "mypkgevil"):
        sys.modules.pop(name, None)


def touch(canary):
    return f"touch {canary}"


SGD = "torch.optim.SGD"
CNN = "knep.models.cnn.cnn"
# Row -> (the node, given the canary's path; what the refusal names).
ATTACKS = {
    "shell": (lambda c: {"_target_": "os.system", "command": touch(c)}, "os.system"),
    "process": (lambda c: {"_target_": "subprocess.run", "args": ["touch", str(c)]}, "subprocess.run"),
    "builtin": (lambda c: {"_target_": "builtins.open", "file": str(c), "mode": "w"}, "builtins.open"),
    "exec": (lambda c: {"_target_": "builtins.exec", "_args_": [f"open({str(c)!r}, 'w')"]}, "builtins.exec"),
    "import": (lambda c: {"_target_": "evil.build"}, "evil.build"),
    "module only": (lambda c: {"_target_": "evil"}, "evil"),
    "call": (lambda c: {"_target_": "mypkg.touch"}, "mypkg.touch"),
    "hydra method": (lambda c: {"_target_": "hydra.utils.get_method", "path": "os.system"}, "hydra.utils.get_method"),
    "hydra class": (lambda c: {"_target_": "hydra.utils.get_class", "path": "evil.Mine"}, "hydra.utils.get_class"),
    "hydra again": (
        lambda c: {"_target_": "hydra.utils.instantiate", "_recursive_": False, "config": {"_target_": "evil.touch"}},
        "hydra.utils.instantiate",
    ),
    "unpickle": (lambda c: {"_target_": "torch.load", "f": str(c), "weights_only": False}, "torch.load"),
    "save": (lambda c: {"_target_": "torch.save", "obj": 1, "f": str(c)}, "torch.save"),
    "through torch.optim": (lambda c: {"_target_": "torch.optim.lr_scheduler.types.FunctionType"}, "through types"),
    "through pytorch_optimizer": (
        lambda c: {"_target_": "pytorch_optimizer.optimizer.fnmatch.os.system", "command": touch(c)},
        "through fnmatch",
    ),
    "through knep": (lambda c: {"_target_": "knep.data.locate.os.system", "command": touch(c)}, "knep.data.locate.os"),
    "another's class": (lambda c: {"_target_": "knep.data.image_folder.Path", "_args_": [str(c)]}, "pathlib.Path"),
    "another's method": (lambda c: {"_target_": "knep.data.image_folder.Path.touch", "self": str(c)}, "pathlib"),
    "another's function": (
        lambda c: {"_target_": "knep.models.torchvision.get_model", "name": "resnet18"},
        "get_model",
    ),
    "not a module": (lambda c: {"_target_": "torch.nn.utils.clip_grad_norm_", "parameters": []}, "modules only"),
    "a function of torch.nn": (lambda c: {"_target_": "torch.nn.functional.relu", "input": 1}, "modules only"),
    "no optimizer": (lambda c: {"_target_": "torch.optim.lr_scheduler.EPOCH_DEPRECATION_WARNING"}, "is a str"),
    "loads by name": (lambda c: {"_target_": "pytorch_optimizer.load_optimizer", "optimizer": "sgd"}, "load_optimizer"),
    "reads files": (lambda c: {"_target_": "knep.data.image_folder.list_images", "folder": "/"}, "data modules only"),
    "private": (
        lambda c: {"_target_": "knep.models.torchvision._complaint", "name": "vit_b_16", "image_size": 9},
        "models only",
    ),
    "helper of a slot": (lambda c: {"_target_": "knep.recipes.averaging._Single"}, "tricks only"),
    "another part of knep": (
        lambda c: {"_target_": "knep.io.run_folder.discard", "folder": str(c)},
        "knep.io.run_folder.discard",
    ),
    "Lightning's callbacks": (lambda c: {"_target_": "lightning.pytorch.callbacks.LambdaCallback"}, "Trainer only"),
    "dunder": (lambda c: {"_target_": "torch.nn.Linear.__init__.__globals__"}, "__globals__"),
    "subclasses": (lambda c: {"_target_": "torch.nn.Module.__subclasses__"}, "__subclasses__"),
    "mro": (lambda c: {"_target_": "torch.nn.Linear.mro"}, "torch.nn.Linear.mro"),
    "prefix without dot": (lambda c: {"_target_": "torch.nnevil.touch"}, "torch.nnevil.touch"),
    "no name": (lambda c: {"_target_": "torch.nn.Linear()"}, "torch.nn.Linear()"),
    "a space": (lambda c: {"_target_": " torch.nn.Linear"}, "no name"),
    "a letter that looks alike": (lambda c: {"_target_": "torch.nn.Lin\u0435ar"}, "no name"),
    "relative": (lambda c: {"_target_": "torch.nn...evil.touch"}, "no name"),
    "empty": (lambda c: {"_target_": ""}, "no name"),
    "number": (lambda c: {"_target_": 3}, "not text"),
    "null": (lambda c: {"_target_": None}, "not text"),
    "list": (lambda c: {"_target_": ["os.system"]}, "not text"),
    "callable": (lambda c: {"_target_": shutil.rmtree, "path": str(c)}, "not text"),
    "in a list": (lambda c: {"_target_": CNN, "widths": [[{"_target_": "evil.touch"}]]}, "widths[0][0]._target_=evil"),
    "in a tuple": (lambda c: {"_target_": CNN, "widths": ({"_target_": "evil.touch"},)}, "widths[0]._target_=evil"),
    "in a group": (lambda c: {"_target_": CNN, "norm": {"a": {"_target_": "evil.touch"}}}, "norm.a._target_=evil"),
    "in a group without target": (lambda c: {"a": {"b": {"_target_": "evil.touch"}}}, "a.b._target_=evil"),
    "arguments by place": (lambda c: {"_target_": SGD, "_args_": [{"_target_": "evil.touch"}]}, "_args_"),
    "partial": (lambda c: {"_target_": "evil.touch", "_partial_": True}, "evil.touch"),
    "partial as text": (lambda c: {"_target_": SGD, "_partial_": "evil"}, "true or false"),
    "recursive as text": (lambda c: {"_target_": SGD, "_recursive_": "no", "x": 1}, "true or false"),
    "convert": (lambda c: {"_target_": SGD, "_convert_": "evil"}, "_convert_"),
    "interpolated target": (lambda c: {"_target_": "${oc.env:HOME}"}, "${oc.env:HOME}"),
    "interpolated value": (lambda c: {"_target_": CNN, "widths": "${oc.env:HOME}"}, "${oc.env:HOME}"),
    "a node that a resolver makes": (
        lambda c: {"_target_": CNN, "norm": "${oc.create:'{_target_: evil.touch}'}"},
        "${oc.create",
    ),
    "a dataclass": (
        lambda c: {"_target_": CNN, "norm": make_dataclass("Node", [("_target_", str, "evil.touch")])()},
        "plain data",
    ),
    "path of a model": (lambda c: {"_target_": CNN, "path": "evilnet:build"}, "path=evilnet.build"),
    "path of a model by place": (lambda c: {"_target_": CNN, "_args_": ["evilnet:build"]}, "_args_"),
    "path through an allowed package": (lambda c: {"_target_": CNN, "path": "torch.nn:Linear"}, "path=torch.nn.Linear"),
}


def test_there_are_enough_attacks():
    assert len(ATTACKS) >= 25


@pytest.mark.parametrize("row", ATTACKS)
def test_an_attack_is_refused_before_anything_runs(row, canary):
    make, named = ATTACKS[row]
    node = make(canary)
    for given in (node, {"a": node}, {"_target_": "torch.nn.Identity", "x": [node]}):
        with pytest.raises(InputError) as refused:
            instantiate.instantiate(given)
        assert named in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not canary.exists()
    assert not {"evil", "evilnet"} & set(sys.modules)


@pytest.mark.parametrize("name", ["evil.Tools", "mypkg.touch"])
def test_the_canary_sings_where_it_is_let(name, canary):
    instantiate.allow(name)
    instantiate.instantiate({"_target_": name})
    assert canary.exists()


def test_omegaconfs_own_containers_are_looked_into(canary):
    nested = OmegaConf.create({"_target_": CNN, "widths": [{"_target_": "evil.touch"}]})
    for given in (nested, dict(nested), {"_target_": CNN, "_partial_": True, "widths": nested.widths}):
        with pytest.raises(InputError, match=r"evil\.touch"):
            instantiate.instantiate(given)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["mypkg.", "mypkg.touch"])
def test_what_a_user_allows_is_built(name, canary):
    instantiate.allow(name)
    instantiate.instantiate({"_target_": "mypkg.touch", "_args_": [1]})
    assert canary.exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mypkgevil.build", "mypkgevil.build is not allowed"),
        ("mypkg.os.system", "leads through os"),
        ("mypkg.Path", "is pathlib.Path"),
        ("mypkg.constant", "is a int"),
        ("mypkg.nothing", "mypkg.nothing cannot be imported"),
        ("mypkg.Mine.__init__", "no name"),
    ],
)
def test_an_allowed_package_allows_what_it_defines(target, said, canary):
    instantiate.allow("mypkg.")
    with pytest.raises(InputError, match=said):
        instantiate.instantiate({"_target_": target})
    assert not canary.exists()


def test_an_allowed_package_may_name_what_knep_allows_anyway(canary):
    instantiate.allow("mypkg.")
    made = instantiate.instantiate({"_target_": "mypkg.ReLU"})
    assert isinstance(made, torch.nn.ReLU)


def test_the_path_of_a_model_is_allowed_by_its_package(canary):
    node = {"_target_": CNN, "path": "mypkg:build"}
    instantiate.allow("mypkg.")
    instantiate.check_targets(node)
    for target in (CNN, "mypkg.cnn"):
        with pytest.raises(InputError, match=r"path=evilnet\.build"):
            instantiate.check_targets({"_target_": target, "path": "evilnet:build"})
    instantiate.allow_typed([f"model._target_={CNN}"])
    with pytest.raises(InputError, match=r"path=evilnet\.build"):
        instantiate.check_targets(node | {"path": "evilnet:build"})


@pytest.mark.parametrize("name", ["", ".", "my-pkg.", "mypkg..", "mypkg.nets:build", "*", 3])
def test_a_name_that_is_none_cannot_be_allowed(name, canary):
    with pytest.raises(InputError, match="cannot be allowed"):
        instantiate.allow(name)


def test_what_is_typed_is_allowed(canary):
    instantiate.allow_typed(
        ["allow_targets=[mypkg.,other.nets.]", "model.path=mine.nets:build", "optimizer._target_=a.b.C"]
    )
    assert instantiate._allowed == ["mypkg.", "other.nets.", "mine.nets.build", "a.b.C"]


def test_a_file_allows_nothing(canary):
    instantiate.allow("mypkg.")
    instantiate.take_allowed({})
    typed = {"allow_targets": ["mypkg."], "seed": 0}
    instantiate.take_allowed(typed)
    assert typed == {"seed": 0}
    with pytest.raises(InputError, match=r"allow_targets=evil\. comes from a file"):
        instantiate.take_allowed({"allow_targets": ["mypkg.", "evil."]})


# callbacks=none has no node at all, and the other options of the group stand under `doctor`.
NODES = [(g, o) for g in GROUPS if g != "recipe" for o in options(g) if (g, o) != ("callbacks", "none")]
PACKAGES = {"callbacks": "doctor"}


@pytest.mark.parametrize(("group", "option"), NODES, ids=[f"{g}/{o}" for g, o in NODES])
def test_every_yaml_is_allowed_and_built(group, option, canary):
    reads = "choices.task" in (CONF / group / f"{option}.yaml").read_text()  # which a whole run alone has
    chosen = ["++data.task=multiclass"] if reads else []
    with initialize_config_module("knep.conf", version_base="1.3"):
        node = plain(compose(f"{group}/{option}", ["+seed=0", "++trainer.max_steps=-1", *chosen]))[
            PACKAGES.get(group, group)
        ]
    instantiate.check_targets(node)
    assert "_target_" in node
    if group != "trainer":
        assert instantiate.instantiate(node) is not None


@pytest.mark.parametrize("recipe", options("recipe"))
def test_every_recipe_is_allowed(recipe, canary):
    config = compose_config([f"recipe={recipe}"]).config
    instantiate.take_allowed(config)
    instantiate.check_targets(config)


def test_the_trainer_is_built(canary):
    node = compose_config(["trainer=cpu"]).config["trainer"] | {"precision": "32-true"}
    node.pop("members")  # of train.yaml, not of the Trainer
    assert instantiate.instantiate(node, logger=False, enable_checkpointing=False).max_epochs == node["max_epochs"]


def checkpoint(path, change):
    """A checkpoint file whose config `change` edits."""
    config = compose_config(["recipe=none"]).config
    change(config)
    about = {"config": config, "num_classes": 10, "channels": 1, "image_size": 8, "class_names": list("0123456789")}
    torch.save({"state_dict": {}, "knep": about}, path)
    return path


@pytest.mark.parametrize(
    ("slot", "key", "value", "said"),
    [
        ("model", "_target_", "evil.build", "model._target_=evil.build"),
        ("model", "path", "evilnet:build", "model.path=evilnet.build"),
        ("averaging", "_target_", "mypkg.touch", "averaging._target_=mypkg.touch"),
        ("data", "_target_", "mypkg.touch", "data._target_=mypkg.touch"),
        ("norm", "eps", "${oc.env:HOME}", "norm.eps=${oc.env:HOME}"),
        ("trainer", "callbacks", [{"_target_": "mypkg.touch"}], "trainer.callbacks[0]._target_=mypkg.touch"),
    ],
)
def test_a_checkpoint_builds_nothing_else(slot, key, value, said, canary, tmp_path):
    path = checkpoint(tmp_path / "evil.ckpt", lambda config: config[slot].update({key: value}))
    with pytest.raises(InputError) as refused:
        load_module(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)
    assert not canary.exists()


def test_a_checkpoint_cannot_allow_itself(canary, tmp_path):
    def change(config):
        config["allow_targets"] = ["mypkg."]
        config["model"]["_target_"] = "mypkg.touch"

    with pytest.raises(InputError, match=r"mypkg\.touch is not allowed"):
        load_module(checkpoint(tmp_path / "evil.ckpt", change))
    assert not canary.exists()


@pytest.mark.parametrize("about", [{}, [], {"config": {}}, {"config": {"model": {}}, "num_classes": 10}])
def test_a_checkpoint_of_another_program(about, tmp_path):
    torch.save({"state_dict": {}, "knep": about}, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match="was not written by knep"):
        load_module(tmp_path / "foreign.ckpt")


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hydra.searchpath=[file:///tmp]", "hydra.searchpath"),
        ("+hydra.job_logging.handlers.x={'()':os.system,command:ls}", "hydra.job_logging"),
        (" +hydra.job.env_set.X=1", "hydra.job"),
        ("hydra/launcher=evil", "hydra/launcher"),
        ("--config-dir=/tmp", "--config-dir"),
        ("-m", "-m"),
        ("name=${oc.env:HOME}", "oc.env"),
        ("init._target_=mypkg.touch", "mypkg.touch is not allowed"),
        ("allow_targets=[mypkg.]", "comes from a file"),
    ],
)
def test_the_overrides_of_a_run_folder_only_set_values(line, said, canary, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "run" / "overrides.txt").write_text(f"seed=1\n{line}\n")
    assert said in refusal([f"ckpt={tmp_path}/run"], capsys)
    assert not canary.exists()


def test_a_run_with_a_users_own_optimizer(canary, tmp_path, capsys, monkeypatch):
    quick = ["trainer=cpu", "trainer.max_epochs=1", "data.limit=100", "data.batch_size=50", "progress=false"]
    run = [*quick, "threads=1", "recipe=none", "optimizer=sgd", f"hydra.run.dir={tmp_path}/run"]
    main([*run, "optimizer._target_=mypkg.Mine"])
    assert "allow_targets" not in (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.setattr(instantiate, "_allowed", [])
    again = [f"ckpt={tmp_path}/run", "trainer.max_epochs=2"]
    assert "allow_targets=[mypkg.]" in refusal(again, capsys)
    with pytest.raises(InputError, match=r"optimizer\._target_=mypkg\.Mine is not allowed"):
        load_module(tmp_path / "run" / "checkpoints" / "final.ckpt")
    main([*again, "allow_targets=[mypkg.]"])
    assert load_module(tmp_path / "run" / "checkpoints" / "final.ckpt").num_classes == 10
