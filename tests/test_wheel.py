"""The wheel contract: sdist -> wheel -> a venv elsewhere, where every YAML composes and builds, and knep trains."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from knep.config.catalog import CONF, GROUPS, options

ROOT = Path(__file__).parent.parent
# Lightning builds its strategy only where there is a GPU; the other trainers are built for the CPU.
HARDWARE = {"fsdp"}


def run(command, folder, **env):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run([str(c) for c in command], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """sdist from the repository, wheel from the unpacked sdist."""
    place = tmp_path_factory.mktemp("build")
    build = [sys.executable, "-m", "hatchling", "build", "-t"]
    run([*build, "sdist", "-d", place], ROOT)
    (sdist,) = place.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    run([*build, "wheel", "-d", place], place / sdist.name.removesuffix(".tar.gz"))
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh venv with the wheel, which sees the libraries of this interpreter but not the repository.

    A path in a .pth file is searched, the .pth files in there are not read: so an editable knep stays out of sight.
    """
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "venv", with_pip=False)
    site = next((home / "venv").glob("lib/python*/site-packages"))
    before = {p.name for p in site.iterdir()}
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        home / "venv/bin/python",
        "install",
        "--no-deps",
        "--no-index",
        "-q",
    ]
    run([*pip, wheel], home)
    added = {p.name for p in site.iterdir()} - before
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home, added


def test_the_wheel_holds_knep_and_nothing_else(wheel, installed):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2
    assert "knep" in tops
    assert all(top == "knep" or top.endswith(".dist-info") for top in tops)
    repository = {f"knep/{p.relative_to(CONF.parent)}" for p in CONF.parent.rglob("*.yaml")}
    assert {n for n in names if n.endswith(".yaml")} == repository
    assert "knep/py.typed" in names
    _, added = installed
    assert {name for name in added if not name.endswith(".dist-info")} == {"knep"}


EVERY_YAML = """
import json, sys, warnings
before = set(sys.path)
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
import knep
from knep.config.compose import plain
from knep.recipes.recipe import SLOTS, Recipe
from knep.config.instantiate import instantiate

groups, hardware = json.loads(sys.argv[1]), set(json.loads(sys.argv[2]))
recipes = groups.pop("recipe")
CPU = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "logger": False}
built = {}


def composed(primary, lines):
    # As `hydra.main` does: options of data take the task's name from what was chosen.
    cfg = compose(primary, lines, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return plain(cfg)


def try_all(way, primary, lines):
    # Each round takes the next option of every group: as many rounds as the largest group has are enough.
    for i in range(max(map(len, groups.values()))):
        picked = {group: names[i % len(names)] for group, names in groups.items()}
        # Not slots of a recipe.
        add = {"guard": "+", "callbacks": "+", "task": "+", "sampling": "+"} if primary == "own" else {}
        cfg = composed(primary, [*(f"{add.get(g, '')}{g}={o}" for g, o in picked.items()), *lines])
        Recipe.from_config(cfg)
        for group in set(groups) - set(SLOTS):
            if picked[group] not in hardware:
                found = cfg.get("doctor" if group == "callbacks" else group)
                node = {key: value for key, value in (found or {}).items() if (group, key) != ("trainer", "members")}
                if node:
                    instantiate(node | (CPU if group == "trainer" else {}))
        for group, name in picked.items():
            built.setdefault(f"{way} {group}", set()).add(name)
    for name in recipes:
        Recipe.from_config(composed(primary, [f"recipe={name}", *lines]))
        built.setdefault(f"{way} recipe", set()).add(name)


with initialize_config_module("knep.conf", version_base="1.3"):
    try_all("import", "train", ["name=x"])
with initialize_config_dir(sys.argv[3], version_base="1.3"):
    try_all("search", "own", [])
built = {key: sorted(names) for key, names in built.items()}
print(json.dumps({"built": built, "file": knep.__file__, "path": sorted(set(sys.path) - before)}))
"""
OWN = """
defaults:
  - knep
  - recipe: none
  - _self_
hydra:
  searchpath: [pkg://knep.conf]
"""


@pytest.mark.slow
def test_every_yaml_composes_and_builds_both_ways(installed):
    home, _ = installed
    (home / "conf").mkdir()
    (home / "conf" / "own.yaml").write_text(OWN)
    groups = {group: options(group) for group in GROUPS}
    arguments = [json.dumps(groups), json.dumps(sorted(HARDWARE)), home / "conf"]
    out = run([home / "venv/bin/python", "-c", EVERY_YAML, *arguments], home)
    seen = json.loads(out.splitlines()[-1])
    assert seen["file"].startswith(str(home))
    assert seen["path"] == []
    assert seen["built"] == {f"{way} {group}": names for way in ("import", "search") for group, names in groups.items()}
    count = sum(map(len, seen["built"].values()))
    assert count == 2 * sum(len(names) for names in groups.values()) > 240


def test_the_command_lists_shows_copies_and_trains(installed):
    home, _ = installed
    knep = home / "venv/bin/knep"
    assert "muon" in run([knep, "ls", "optimizer"], home)
    assert "override /optimizer: muon" in run([knep, "show", "recipe", "modern"], home)
    run([knep, "cp", "optimizer/muon", "copied"], home)
    assert (home / "copied" / "optimizer" / "muon.yaml").read_text() == (CONF / "optimizer" / "muon.yaml").read_text()
    (home / "nets.py").write_text(
        "from torch import nn\n\n\ndef build(num_classes, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, 8), nn.BatchNorm1d(8), nn.ReLU(),\n"
        "                         nn.Linear(8, num_classes))\n"
    )
    # 900 training images in batches of 45: 20 steps.
    slots = ["recipe=modern", "augment=none", "data=synthetic", "data.batch_size=45", "data.image_size=4"]
    length = ["trainer=cpu", "trainer.max_epochs=1", "progress=false", "threads=1", "hydra.run.dir=run"]
    run([knep, "train", "model=import", "model.path=nets:build", *slots, *length], home)
    summary = json.loads((home / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 20)
