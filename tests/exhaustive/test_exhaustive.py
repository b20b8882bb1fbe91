"""Each script of this folder at its whole default size, hours in all: `pytest -m exhaustive`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [path.stem for path in sorted(Path(__file__).parent.glob("*.py")) if "\ndef main(" in path.read_text()]


def _unable(name):
    return name == "two_hosts" and (os.geteuid() != 0 or shutil.which("ip") is None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCRIPTS)
def test_whole(name, tmp_path):
    if _unable(name):
        pytest.skip("makes network namespaces: needs root and the command ip")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", f"tests.exhaustive.{name}"], cwd=tmp_path, env=environment)
    assert done.returncode == 0


def test_all_scripts_are_known():
    assert len(SCRIPTS) == 13
    assert {"fuzz", "guard_matrix", "pairs", "resume_matrix", "task_pairs", "zoo"} <= set(SCRIPTS)
