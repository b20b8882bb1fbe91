"""Every example runs as its first lines say, outside of the repository, and does what it is there to show."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGE = str(EXAMPLES.parent)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A copy of the examples in a folder that has nothing to do with the repository."""
    return Path(shutil.copytree(EXAMPLES, tmp_path_factory.mktemp("project") / "examples"))


def run(folder, *arguments):
    env = os.environ | {"PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def share(text):
    return float(re.findall(r"([\d.]+)%", text)[-1])


def test_own_model(elsewhere):
    out = run(elsewhere, "own_model.py")
    assert share(out) > 80
    assert "GroupNorm(8, 32" in out


def test_own_lightning(elsewhere):
    out = run(elsewhere, "own_lightning.py")
    assert share(out) > 80
    assert "muon" in out  # the dry run's table
    assert not (elsewhere / "checkpoints").exists()


def test_finetune(elsewhere):
    out = run(elsewhere, "finetune.py")
    losses = [float(x) for x in out.splitlines()[-1].partition(":")[2].split(",")]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    rates = [float(x) for x in re.findall(r"lr ([\d.e-]+)", out)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] / 10


APP = {
    "": r"Muon lr=0.01 ",
    "recipe=mine": r"Adam lr=0.01 ",
    "optimizer=sgd": r"SGD lr=0.01 ",
}


@pytest.mark.parametrize("arguments", APP)
def test_own_hydra_app(arguments, elsewhere):
    out = run(elsewhere / "own_hydra_app", "train.py", *arguments.split())
    assert re.search(APP[arguments], out)
    assert float(out.rpartition("loss=")[2]) < 0.65


def test_the_apps_own_option_shadows_and_its_recipe_is_found(elsewhere):
    out = run(elsewhere / "own_hydra_app", "train.py", "recipe=mine", "optimizer=sgd", "--cfg", "job")
    assert "momentum: 0.8" in out
    assert "knep.recipes.scheduler.one_cycle" in out
    assert "knep.recipes.clip.norm" in out


def test_every_example_is_tested():
    scripts = {p.stem for p in EXAMPLES.glob("*.py")} - {"data"} | {p.name for p in EXAMPLES.iterdir() if p.is_dir()}
    names = {n.name for n in ast.parse(Path(__file__).read_text()).body if isinstance(n, ast.FunctionDef)}
    assert {f"test_{name}" for name in scripts - {"__pycache__"}} <= names
