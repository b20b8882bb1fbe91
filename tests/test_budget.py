"""What a config may ask of a machine: refused before it is made, lifted by a key that is typed, and by no file."""

import os

import pytest
import torch

from knep.cli.train import main
from knep.config import budget, instantiate
from knep.config.compose import compose_config
from knep.config.schema import RunConfig, config_hash
from knep.engine.build import check_model
from knep.engine.sanity_check import rehearse
from knep.errors import InputError

SIZE = {"in_channels": 1, "num_classes": 10, "image_size": 8}
CNN = {"_target_": "knep.models.cnn.cnn", "_partial_": True}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Two cores and 8 GB, on which nobody has lifted anything."""
    monkeypatch.setattr(budget, "_limits", dict(budget.DEFAULTS))
    monkeypatch.setattr(instantiate, "_allowed", [])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(budget, "machine_memory", lambda: 8 << 30)
    for name in ("MASTER_ADDR", "NODE_RANK", "SLURM_NTASKS", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["trainer.devices=99"], "trainer.devices=99 starts 99 processes"),
        (["trainer.devices=[0,1,2,3,4,5]"], "6 processes"),
        (["trainer.devices='9'"], "9 processes"),
        (["trainer.devices='0,1,2,3,4'"], "5 processes"),
        (["trainer.members=1001"], "budget.members=1001"),
        (["averaging=ensemble", "averaging.members=100000"], "budget.members=100000"),
        (["trainer.num_nodes=2"], "MASTER_ADDR"),
        (["data=image_folder", "data.workers=3000"], "budget.processes=3001"),
        (["data=image_folder", "data.workers=8", "trainer.devices=4"], "36 processes"),
        (["data=synthetic", "data.images=9000000", "data.classes=1000000"], "data.classes=1000000"),
        (["data=image_folder", "data.size=1000000"], "data.size=1000000 and data.batch_size=64 need"),
    ],
)
def test_what_a_machine_cannot_do_is_refused_before_it_begins(lines, said):
    config = compose_config(["recipe=none", "trainer=cpu", *lines]).config
    with pytest.raises(InputError) as refused:
        rehearse(RunConfig.of(config))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("devices", "workers", "memory", "fits"),
    [(1, 0, 1, True), (2, 0, 8 << 30, True), (4, 2, 8 << 30, True), (2, 0, 1 << 29, False), (5, 0, 8 << 30, False)],
)
def test_processes_are_weighed_against_cores_and_memory(devices, workers, memory, fits, monkeypatch):
    monkeypatch.setattr(budget, "machine_memory", lambda: memory)
    if fits:
        budget.check_processes(devices, workers)
    else:
        with pytest.raises(InputError, match=r"budget\.processes"):
            budget.check_processes(devices, workers)


def test_several_machines_are_waited_for_where_somebody_says_which(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    budget.check_config({"trainer": {"num_nodes": 2, "devices": 2}})


def test_a_limit_is_lifted_by_who_types_it():
    lines = ["recipe=none", "budget.processes=99", "trainer.devices=99", "budget.megabytes=1000"]
    instantiate.allow_typed(lines)
    config = compose_config(lines).config
    plain = compose_config(["recipe=none", "trainer.devices=99"]).config
    assert config_hash(config) == config_hash(plain)
    instantiate.take_allowed(config)
    assert "budget" not in config
    budget.check_config(config)
    instantiate.instantiate({"_target_": "torch.nn.Embedding", "num_embeddings": 70_000_000, "embedding_dim": 1})


@pytest.mark.parametrize("said", [{"layers": 10**12}, {"processes": 99}, {"nothing": 1}, 7])
def test_a_file_lifts_nothing(said):
    with pytest.raises(InputError, match="comes from a file"):
        instantiate.take_allowed({"budget": said})
    assert instantiate.only_read(["seed=1", "budget.layers=9", "+budget.layers=9", "++budget.x=1"], []) == ["seed=1"]


@pytest.mark.parametrize(
    "line",
    [
        "budget.layers=0",
        "budget.layers=true",
        "budget.layers=inf",
        "budget.megabytes=nan",
        "budget.layers=1e308",
        "budget.layer=9",
        "budget.members=1,2",
        "budget={layers:9}",
    ],
)
def test_a_limit_that_is_none(line):
    with pytest.raises(InputError, match="budget"):
        instantiate.allow_typed([line])


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "torch.nn.Embedding", "num_embeddings": 10**9, "embedding_dim": 1},
        {"_target_": "torch.nn.Linear", "in_features": 10**5, "out_features": 10**5},
        {"_target_": "torch.nn.Conv2d", "in_channels": 9999, "out_channels": 9999, "kernel_size": [9, 9]},
        {"_target_": "torch.nn.MultiheadAttention", "embed_dim": 10**5, "num_heads": 1},
        {"_target_": "torch.nn.AdaptiveLogSoftmaxWithLoss", "in_features": 999, "n_classes": 10**8, "cutoffs": [9]},
        {"_target_": "torch.nn.ParameterList", "values": [
            {"_target_": "torch.nn.Linear", "in_features": 6000, "out_features": 6000}] * 2},
        {"_target_": "torch.nn.Transformer", "d_model": 1, "nhead": 1, "num_encoder_layers": 10**9},
    ],
    ids=lambda node: node["_target_"],
)  # fmt: skip
def test_a_part_is_not_built_that_is_larger_than_a_trick(node):
    before = torch.random.get_rng_state()
    with pytest.raises(InputError, match=r"MB: write|too many steps"):
        instantiate.instantiate({"_target_": "torch.nn.Sequential", "x": node} if "x" in node else node)
    if "Linear" in node["_target_"]:
        assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_built_is_the_same_as_without_counting():
    torch.manual_seed(3)
    counted = instantiate.instantiate({"_target_": "torch.nn.Linear", "in_features": 9, "out_features": 9})
    torch.manual_seed(3)
    assert torch.equal(counted.weight, torch.nn.Linear(9, 9).weight)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"convs": 10**6}, "budget.layers"), ({"convs": 10**12}, "no size"), ({"widths": [10**9, 10**9]}, "too large")],
)
def test_a_model_is_counted_without_memory_for_it(values, said):
    with pytest.raises(InputError, match=said):
        check_model(CNN | values, SIZE)


def test_members_have_their_weights_each():
    check_model(CNN, SIZE, members=2)
    with pytest.raises(InputError, match="GB"):
        check_model(CNN, SIZE, members=10**9)


def test_a_typed_size_ends_in_one_line_and_without_a_folder(tmp_path, capsys):
    budget.lift("layers", 20)
    with pytest.raises(SystemExit) as stop:
        main(["recipe=none", "trainer=cpu", "model.convs=9", f"hydra.run.dir={tmp_path}/run"])
    assert stop.value.code == 2
    assert "budget.layers=40" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
