"""Modules of the current folder: last, for what a user named, and never in the place of an installed one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from knep.cli.main import main
from knep.config import instantiate
from knep.errors import InputError
from knep.models.user_model import find
from knep.utils.imports import see_current_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder of its own, behind nothing on the path yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(instantiate, "_allowed", [])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0].startswith("own_"):
            del sys.modules[name]


def test_a_module_of_the_folder_comes_last(here):
    (here / "own_nets.py").write_text("import own_parts\nbuild = own_parts.build\n")
    (here / "own_parts.py").write_text("import json\ndef build(): pass\n")
    before = list(sys.path)
    assert find("own_nets:build").__module__ == "own_parts"
    assert sys.path == [*before, str(here)]


def test_a_folder_without_an_init_is_a_package_too(here):
    (here / "own_space").mkdir()
    (here / "own_space" / "nets.py").write_text("def build(): pass\n")
    assert find("own_space.nets:build").__name__ == "build"


def test_what_is_installed_leaves_the_folder_out(here):
    for name in ("torchvision", "own_data"):
        (here / name).mkdir()  # a folder of files, no package
    before = list(sys.path)
    assert find("torchvision.models:resnet18").__module__ == "torchvision.models.resnet"
    assert sys.path == before


@pytest.mark.parametrize("name", ["torchvision", "statistics", "sys", "knep"])
@pytest.mark.parametrize("kind", ["file", "package"])
def test_a_name_that_means_two_modules_is_refused(name, kind, here):
    path = here / name / "__init__.py" if kind == "package" else here / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("open('canary', 'w')\ndef build(): pass\n")
    with pytest.raises(InputError, match=f"module {name} lies in .*rename yours"):
        find(f"{name}:build")
    instantiate.allow(f"{name}.")
    with pytest.raises(InputError, match=f"module {name} lies in"):
        instantiate.check_targets({"_target_": f"{name}.build"})
    assert not (here / "canary").exists()


@pytest.mark.parametrize("line", ["import csv", "from csv import reader", "def build():\n    import csv as table"])
def test_so_is_one_that_an_own_module_imports(line, here):
    (here / "own_nets.py").write_text("import own_parts\n")
    (here / "own_parts").mkdir()
    (here / "own_parts" / "__init__.py").write_text("from . import rows\n")
    (here / "own_parts" / "rows.py").write_text(f"{line}\n")
    (here / "csv.py").write_text("open('canary', 'w')\n")
    (here / "tomllib.py").write_text("open('canary', 'w')\n")  # which nobody imports
    with pytest.raises(InputError, match="module csv lies in"):
        see_current_folder("own_nets", "model.path")
    assert not (here / "canary").exists()


def test_one_of_an_earlier_folder_is_not_taken_for_it(here):
    (here / "own_nets.py").write_text("def build(): pass\n")
    find("own_nets:build")
    other = here / "other"
    other.mkdir()
    os.chdir(other)
    (other / "own_nets.py").write_text("def build(): pass\n")
    with pytest.raises(InputError, match="own_nets lies in"):
        find("own_nets:build")


@pytest.mark.parametrize(
    "line",
    [
        ["train", "recipe=none", "optimizer._target_=torch.optim.own_evil.X"],
        ["plan", "--model", "torch.nn:Flatten", "optimizer._target_=pytorch_optimizer.own_evil.X"],
        ["doctor", "recipe=none", "norm._target_=knep.recipes.own_evil"],
    ],
)
def test_nothing_else_is_looked_for_in_the_folder(line, here):
    for name in ("own_evil", "hydra_plugins"):
        (here / name).mkdir()
        (here / name / "__init__.py").write_text("open('canary', 'w')\n")
    (here / "hydra_plugins" / "evil.py").write_text("open('canary', 'w')\n")
    before = list(sys.path)
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 2
    assert not (here / "canary").exists()
    assert sys.path == before


def test_a_command_by_its_module_leaves_the_folder_out(tmp_path):
    for name in ("argparse", "shutil", "difflib", "json"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w')\n")
    command = [sys.executable, "-m", "knep.cli", "ls", "norm"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    assert not (tmp_path / "canary").exists()


def test_a_process_started_by_its_file_does_not_take_the_files_beside_it_for_modules(tmp_path):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']; sys.path[:0] = ['{ROOT}/knep']; "
        f"runpy.run_path('{ROOT}/knep/cli/train.py', run_name='__main__'); from profile import Profile"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
