"""Every example runs as its first lines say, outside of the repository, and does what it is there to show."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGE = str(EXAMPLES.parent)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A copy of the examples in a folder that has nothing to do with the repository."""
    return Path(shutil.copytree(EXAMPLES, tmp_path_factory.mktemp("project") / "examples"))


@pytest.fixture
def script(elsewhere, monkeypatch, capsys):
    """Runs an example of one file as `python FILE` does, and gives what it prints."""
    monkeypatch.chdir(elsewhere)
    monkeypatch.syspath_prepend(str(elsewhere))
    yield lambda name: runpy.run_path(name, run_name="__main__") and capsys.readouterr().out
    sys.modules.pop("data", None)


def app(folder, *arguments):
    """Runs the Hydra app in a process of its own, and gives what it prints."""
    env = os.environ | {"PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *arguments]
    done = subprocess.run(command, cwd=folder / "own_hydra_app", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def share(text):
    return float(re.findall(r"([\d.]+)%", text)[-1])


def test_own_model(script):
    out = script("own_model.py")
    assert share(out) > 80
    assert "GroupNorm(8, 32" in out


def test_own_lightning(script, elsewhere):
    out = script("own_lightning.py")
    assert share(out) > 80
    assert "muon" in out  # the dry run's table
    assert not (elsewhere / "checkpoints").exists()


def test_finetune(script):
    out = script("finetune.py")
    losses = [float(x) for x in out.splitlines()[-1].partition(":")[2].split(",")]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    rates = [float(x) for x in re.findall(r"lr ([\d.e-]+)", out)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] / 10


def test_own_hydra_app(elsewhere):
    """Its recipe and knep's, in a sweep; then its own SGD in the place of knep's, with the recipe's other slots."""
    out = app(elsewhere, "-m", "recipe=modern,mine", "hydra.sweep.dir=sweep")
    assert re.findall(r"(\w+) lr=0.01", out) == ["Muon", "Adam"]
    assert all(float(loss) < 0.65 for loss in re.findall(r"loss=([\d.]+)", out))
    assert "SGD lr=0.01" in app(elsewhere, "recipe=mine", "optimizer=sgd", "hydra.run.dir=run")
    config = yaml.safe_load((elsewhere / "own_hydra_app" / "run" / ".hydra" / "config.yaml").read_text())
    assert config["optimizer"]["momentum"] == 0.8
    assert config["scheduler"]["_target_"] == "knep.recipes.scheduler.one_cycle"
    assert config["clip"]["_target_"] == "knep.recipes.clip.norm"
    assert config["norm"]["_target_"] == "knep.recipes.norm.none"


def test_every_example_is_tested():
    scripts = {p.stem for p in EXAMPLES.glob("*.py")} - {"data"} | {p.name for p in EXAMPLES.iterdir() if p.is_dir()}
    names = {n.name for n in ast.parse(Path(__file__).read_text()).body if isinstance(n, ast.FunctionDef)}
    assert {f"test_{name}" for name in scripts - {"__pycache__"}} <= names
