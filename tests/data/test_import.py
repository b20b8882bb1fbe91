"""Loaders of another project by their path: what a run reads of them, and a line for each mistake."""

import sys

import pytest
import torch

from knep.cli.train import main
from knep.config.compose import compose_config
from knep.config.instantiate import instantiate
from knep.data.own.imported import Imported
from knep.errors import InputError

CODE = """
import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

X = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = (X.flatten(1).sum(1) * 3).long() % 3


class Dicts(Dataset):
    def __init__(self, names=("picture", "kind")):
        self.names = names

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return dict(zip(self.names, (X[i], Y[i])))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X[:30], Y[:30]))


def of(n=0, m=120, shuffle=False):
    return DataLoader(TensorDataset(X[n:m], Y[n:m]), batch_size=16, shuffle=shuffle)


def loaders(): return of(0, 80, True), of(80, 100), of(100, 120)
def two(): return of(0, 80, True), of(80, 120)
def named(rows=80): return {"train": of(0, rows), "val": of(80, 120)}
def dicts(): return (DataLoader(Dicts(), batch_size=8),) * 3
def usual(): return (DataLoader(Dicts(("image", "label")), batch_size=8),) * 3
def stream(): return DataLoader(Stream(), batch_size=8), of(80, 100), of(100, 120)
def one(): return of()
def fails(): raise RuntimeError("no disk")
def small(): return (DataLoader(TensorDataset(X, Y.int()), batch_size=16),) * 2
def onehot(): return (DataLoader(TensorDataset(X, torch.eye(3)[Y]), batch_size=16),) * 2
def empty(): return ([], [], [])
def texts(): return ([("a", "b")],) * 2


class Module(L.LightningDataModule):
    def setup(self, stage):
        self.ready = stage

    def train_dataloader(self):
        return of(0, 80, True)

    def val_dataloader(self):
        return of(80, 100)

    def test_dataloader(self):
        assert self.ready == "test"
        return of(100, 120)


built = Module()
number = 4
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "ownload").mkdir()
    (tmp_path / "ownload" / "__init__.py").write_text("")
    (tmp_path / "ownload" / "data.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "ownload"]:
        del sys.modules[name]


def prepared(name, **more):
    data = Imported(path=f"ownload.data:{name}", **more)
    data.prepare()
    return data


@pytest.mark.parametrize("name", ["loaders", "two", "named", "usual", "Module", "built"])
def test_loaders_are_read_and_described(name, project):
    data = prepared(name)
    assert (data.target, data.channels, data.image_size, data.num_classes) == ("class", 1, 8, 3)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape[1:], y.dtype) == ((1, 8, 8), torch.int64)
    assert data.sizes["train"] == (40 if name == "usual" else 80)
    assert len(data.sample(20)) == 20
    assert sum(len(y) for _, y in data.test_dataloader()) == data.sizes["test"]


def test_what_is_no_split_of_its_own_is_told(project, capsys):
    data = prepared("two")
    said = capsys.readouterr().err
    assert "no test loader is given" in said
    assert "resuming is exact at the ends of epochs" in said
    assert "data.num_classes=3 spares it" in said
    assert data.sizes["test"] == data.sizes["val"] == 40
    prepared("loaders", num_classes=5)
    assert "no test loader" not in capsys.readouterr().err


def test_keys_of_dicts_and_arguments(project):
    data = prepared("dicts", batch=["picture", "kind"])
    assert next(iter(data.train_dataloader()))[0].shape == (8, 1, 8, 8)
    with pytest.raises(InputError, match="does not say which are input and target"):
        prepared("dicts")
    assert prepared("named", args={"rows": 48}).sizes["train"] == 48


def test_a_loader_without_length_goes_on_until_max_steps(project):
    data = prepared("stream", max_steps=7, num_classes=3)
    assert (data.train_batches, data.sizes["train"]) == (7, 56)
    first, second = list(data.train_dataloader()), list(data.train_dataloader())
    assert (len(first), len(second)) == (7, 7)
    assert torch.equal(first[0][0], first[4][0])  # 30 rows are four batches: it begins again
    assert torch.equal(second[0][0], first[3][0])
    with pytest.raises(InputError, match=r"write trainer.max_steps=1000"):
        prepared("stream", num_classes=3)
    with pytest.raises(InputError, match=r"write data.num_classes"):
        prepared("stream", max_steps=7)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one", "gave a DataLoader: return loaders"),
        ("fails", "failed: RuntimeError: no disk"),
        ("empty", "without a batch"),
        ("number", "failed: TypeError"),
        ("loadres", "did you mean loaders?"),
        ("texts", "a batch of 2 parts"),
    ],
)
def test_each_mistake_has_its_line(name, said, project):
    with pytest.raises(InputError) as error:
        prepared(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_imported_that_nobody_typed(project):
    node = {"_target_": "knep.data.own.imported.Imported", "path": "ownload.data:loaders"}
    with pytest.raises(InputError, match=r"path=ownload.data.loaders is not allowed"):
        instantiate(node)


QUICK = ["trainer=cpu", "progress=false", "threads=1", "recipe=none", "optimizer=adamw", "data=import"]


def test_knep_trains_and_resumes_on_them(project, capsys):
    lines = [*QUICK, "data.path=ownload.data:loaders", "hydra.run.dir=run"]
    main([*lines, "trainer.max_epochs=1"])
    assert (project / "run" / "summary.json").is_file()
    main(["ckpt=run", "allow_targets=[ownload.]", "trainer.max_epochs=2"])
    assert "epoch 2/2" in capsys.readouterr().out


def test_a_stream_is_trained_by_steps(project, capsys):
    steps = ["trainer.max_steps=9", "data.num_classes=3", "data.path=ownload.data:stream"]
    main([*QUICK, *steps, "hydra.run.dir=run"])
    assert '"steps": 9' in (project / "run" / "summary.json").read_text()


def test_a_wrong_path_and_a_checkpoint_inside_an_epoch_are_told_before_anything_is_made(project, capsys):
    with pytest.raises(SystemExit):
        main([*QUICK, "data.path=ownload.data:loadres", "hydra.run.dir=run"])
    assert "did you mean loaders?" in capsys.readouterr().err
    assert not (project / "run").exists()
    with pytest.raises(InputError, match=r"checkpoint.every=5 contradicts data=import"):
        compose_config([*QUICK, "checkpoint.every=5"])


def test_classes_of_another_whole_dtype_and_one_hot_ones(project, capsys):
    main([*QUICK, "data.path=ownload.data:small", "trainer.max_epochs=1", "hydra.run.dir=run"])
    assert (project / "run" / "summary.json").is_file()
    with pytest.raises(SystemExit):
        main([*QUICK, "data.path=ownload.data:onehot", "trainer.max_epochs=1", "hydra.run.dir=hot"])
    assert "task=regression, or give y.argmax(1)" in capsys.readouterr().err
