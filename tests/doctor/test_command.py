"""`knep doctor` as it is typed: its exit code, its files, one's own model and loaders, and one line for bad input."""

from __future__ import annotations

import json
import shlex
import textwrap

import pytest
import torch
import yaml

from knep.cli import main
from knep.config.compose import compose_config
from knep.doctor.cure import candidates

_SMALL = ["data=synthetic", "data.images=600", "data.image_size=8", "model=mlp", "model.widths=[32]", "threads=1"]
_SOUND = ["recipe=baseline", *_SMALL, "optimizer.lr=0.01", "trainer.max_epochs=15"]


def _doctor(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main.main(["doctor", *words])
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A project of somebody else's, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))

    return write


_NETS = """
    import torch
    from torch import nn

    def build(num_classes, in_channels, image_size):
        features = in_channels * image_size**2
        return nn.Sequential(nn.Flatten(), nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, num_classes))

    def four():
        return build(4, 1, 8)

    def wide(num_classes, image_size):
        height, width = image_size
        return nn.Sequential(nn.Flatten(), nn.Linear(height * width, 32), nn.ReLU(), nn.Linear(32, num_classes))

    def squashed(num_classes, in_channels, image_size):
        return nn.Sequential(build(num_classes, in_channels, image_size), nn.Softmax(1))

    class Crashing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x)
"""


def test_a_sound_run_is_healthy(capsys):
    assert _doctor(*_SOUND) == 0
    assert capsys.readouterr().out.startswith("healthy")


def test_a_sick_run_is_told_and_written(tmp_path, capsys):
    json_file, html_file = tmp_path / "r.json", tmp_path / "deep" / "r.html"
    lines = [*_SOUND, "optimizer.weight_decay=0", "optimizer=sgd", "optimizer.lr=1e-5"]
    lines.remove("optimizer.lr=0.01")
    assert _doctor(*lines, "--json", str(json_file), "--html", str(html_file)) == 1
    out = capsys.readouterr().out
    assert "the learning rate is too low" in out.splitlines()[0]
    assert "optimizer.lr=" in out
    data = json.loads(json_file.read_text())
    assert data["findings"][0]["disease"] == "lr_too_low"
    assert "<html" in html_file.read_text()


def test_a_cure_prints_the_lines_and_writes_the_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(candidates, "common", lambda patient: [])  # what is prescribed is enough
    recipe, json_file, html_file = tmp_path / "recipe" / "mine.yaml", tmp_path / "r.json", tmp_path / "r.html"
    lines = [w for w in _SOUND if not w.startswith("optimizer.lr")]
    files = ["--recipe", str(recipe), "--json", str(json_file), "--html", str(html_file), "--budget", "25"]
    assert _doctor(*lines, "optimizer=sgd", "optimizer.lr=1e-5", "--cure", *files) == 1
    out = capsys.readouterr().out
    assert "before: validation accuracy" in out
    assert "not kept: " in out
    whole, by_recipe = (line.strip() for line in out.splitlines() if line.startswith("  python train.py "))
    assert whole.startswith("python train.py recipe=baseline data=synthetic")
    assert yaml.safe_load(recipe.read_text())["optimizer"]["lr"] > 1e-4
    words = shlex.split(by_recipe)
    assert words[2:5] == ["--config-dir", str(tmp_path), "recipe=mine"]
    again = compose_config(words[4:], [f"file://{tmp_path}"]).config
    assert again == compose_config(shlex.split(whole)[2:]).config
    cure = json.loads(json_file.read_text())["cure"]
    assert cure["after"] > cure["before"] + 0.1
    assert cure["overrides"] == shlex.split(whole)[2:]
    assert "The cure" in html_file.read_text()
    assert str(recipe) in html_file.read_text()


def test_somebody_elses_model_is_examined(own, capsys):
    own("doctored_nets", _NETS)
    lines = [w for w in _SOUND if not w.startswith("model")]
    assert _doctor("--model", "doctored_nets:squashed", *lines) == 1
    assert "softmax is applied twice" in capsys.readouterr().out.splitlines()[0]
    assert _doctor("--model", "doctored_nets:build", *lines) == 0


def test_somebody_elses_model_gets_no_trick_that_nobody_asked_for(own, capsys):
    """The default recipe would put a norm into it, draw its weights anew and scale its input."""
    own("plain_nets", _NETS)
    small = [w for w in _SMALL if not w.startswith("model")]
    assert _doctor("--model", "plain_nets:build", *small, "optimizer.lr=0.01", "trainer.max_epochs=15") == 0
    assert "healthy" in capsys.readouterr().out


def test_somebody_elses_loaders_are_examined(own, capsys):
    own("more_nets", _NETS)
    own(
        "doctored_data",
        """
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        def split(n, seed):
            draw = torch.Generator().manual_seed(seed)
            y = torch.arange(n) % 4
            x = torch.eye(4)[y].reshape(n, 1, 2, 2).repeat(1, 1, 4, 4) + 0.3 * torch.randn(n, 1, 8, 8, generator=draw)
            return TensorDataset(x, y)

        def loaders():
            return DataLoader(split(600, 0), 32, shuffle=True), DataLoader(split(200, 1), 100)

        def sorted_loaders():
            data = split(600, 0)
            order = data.tensors[1].argsort(stable=True)
            return DataLoader(TensorDataset(*(t[order] for t in data.tensors)), 32), DataLoader(split(200, 1), 100)

        def ignoring():
            train, val = loaders()
            x, y = train.dataset.tensors
            y = torch.where(torch.arange(len(y)) % 20 == 0, -100, y)
            return DataLoader(TensorDataset(x, y), 32, shuffle=True), val

        def raw():
            train, val = split(600, 0), split(200, 1)
            scaled = (TensorDataset(1000 * d.tensors[0], d.tensors[1]) for d in (train, val))
            return tuple(DataLoader(d, 32, shuffle=i == 0) for i, d in enumerate(scaled))

        def from_one():
            return tuple([(x, y + 1) for x, y in loader] for loader in loaders())

        def wide():
            widened = ([(torch.cat([x, x], 3), y) for x, y in loader] for loader in loaders())
            return tuple(widened)

        def empty():
            return [], []

        def strange():
            return 5
        """,
    )
    lines = ["recipe=none", "optimizer=adam", "optimizer.lr=0.003", "trainer.max_epochs=10", "threads=1"]
    model = ["--model", "more_nets:build"]
    assert _doctor(*model, "--data", "doctored_data:loaders", *lines) == 0
    assert _doctor(*model, "--data", "doctored_data:sorted_loaders", *lines) == 1
    assert "batches are sorted by class" in capsys.readouterr().out
    lower = [*lines[:2], "optimizer=sgd", "optimizer.lr=1e-6", *lines[3:]]
    lower.remove("optimizer=adam")
    assert _doctor(*model, "--data", "doctored_data:ignoring", *lower) == 1  # examined, though some labels are ignored
    assert "learning rate is too low" in capsys.readouterr().out
    assert _doctor(*model, "--data", "doctored_data:raw", "optimizer=sgd", "optimizer.lr=0.1", "threads=1") == 1
    assert "inputs are not scaled" in capsys.readouterr().out
    assert _doctor("--model", "more_nets:four", "--data", "doctored_data:from_one", *lines) == 1
    assert "labels are shifted by one" in capsys.readouterr().out
    assert _doctor("--model", "more_nets:wide", "--data", "doctored_data:wide", *lines) == 0
    assert _doctor("model=mlp", "--data", "doctored_data:wide", *lines) == 2
    assert "images of 8 x 16, and knep's models take square ones" in capsys.readouterr().err
    assert _doctor(*model, "--data", "doctored_data:empty", *lines) == 2
    assert _doctor(*model, "--data", "doctored_data:strange", *lines) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2
    assert "gives no batch" in errors[0]


def test_what_cannot_be_examined_is_one_line(own, capsys):
    own("third_nets", _NETS)
    lines = [w for w in _SOUND if not w.startswith("model")]
    for words, what in (
        (["--model", "third_nets:Crashing", *lines], "fails on a sample"),
        (["--model", "third_nets:nothing", *lines], "nothing"),
        (["modell=mlp"], "did you mean model"),
        ([*_SOUND, "--html", "/proc/nowhere/r.html"], "cannot be written"),
        ([*_SOUND, "--cure", "--budget", "soon"], "--budget soon is no number of seconds"),
    ):
        assert _doctor(*words) == 2
        error = capsys.readouterr().err.strip()
        assert what in error
        assert "\n" not in error


@pytest.mark.parametrize(
    "lines",
    [
        ["task=regression"],
        ["task=binary"],
        ["task=multilabel"],
        ["loss=focal"],
        ["loss=cross_entropy", "loss.class_weight=auto"],
    ],
)
def test_runs_of_other_tasks_and_losses_are_examined(lines, capsys):
    assert _doctor(*_SOUND, *lines) == 0
    assert "healthy" in capsys.readouterr().out


def test_a_rate_too_low_is_found_in_another_task(capsys):
    assert _doctor(*_SOUND, "task=regression", "optimizer.lr=1e-6") == 1
    assert "the learning rate is too low" in capsys.readouterr().out


_NUMBERS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

def loaders(column=False):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 8, generator=g)
    y = x @ torch.randn(8, generator=g)
    y = y[:, None] if column else y
    parts = slice(0, 500), slice(500, 600)
    return tuple(DataLoader(TensorDataset(x[p], y[p]), 50, shuffle=p.start == 0) for p in parts)

def columns():
    return loaders(True)

def loss(output, target):
    return (output - target).square().mean()
"""


def test_own_net_loaders_and_loss_of_any_task(own, capsys, tmp_path):
    own("numbers_project", _NUMBERS)
    mine = ["--model", "numbers_project:build", "optimizer.lr=0.01", "--json", str(tmp_path / "report.json")]
    assert _doctor(*mine, "--data", "numbers_project:columns", "--loss", "numbers_project:loss") == 0
    assert _doctor(*mine, "--data", "numbers_project:loaders", "--loss", "numbers_project:loss") == 1
    assert "(12, 1) for 12 rows and the target is (12,)" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["findings"][0]["disease"] == "broadcast_shapes"
    assert _doctor(*mine, "--data", "numbers_project:columns", "task=regression", "--loss", "torch.nn:L1Loss") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--loss", "numbers_project:loss"], "--loss is for loaders of your own"),
        (["--data", "numbers_project:columns", "--loss", "numbers_project:loss"], "needs a net: --model PATH"),
        (["task=regression", "--cure"], "--cure tries lines on one class of several"),
    ],
)
def test_what_other_tasks_lack_is_one_line(words, said, own, capsys):
    own("numbers_project", _NUMBERS)
    assert _doctor(*(_SOUND if "--data" not in words else []), *words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_rows_are_drawn_as_the_run_draws_them():
    from knep.doctor.subject.setup import from_config

    few = ["recipe=none", *_SMALL, "optimizer=adam", "data.batch_size=50"]

    def rows(*more):
        lines = [*few, *more]
        return [x.flatten(1).double().sum(1) for x, _ in from_config(compose_config(lines).run, lines).train]

    plain, drawn = (torch.cat(rows(*more)) for more in ((), ("sampling=balanced",)))
    assert len(plain.unique()) > len(drawn.unique())  # with replacement some rows come twice
