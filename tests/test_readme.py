"""README: its tables are generated, its code runs, its commands compose."""

import re
import shlex
from pathlib import Path

import pytest
import readme

from knep.compose import compose_config

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
TRAIN = [line.split("#")[0] for line in SHELL.splitlines() if line.startswith("python train.py")]


def test_the_tables_are_up_to_date():
    assert readme.filled(TEXT) == TEXT


@pytest.mark.parametrize("code", PYTHON)
def test_its_python_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_there_is_code_to_run():
    assert PYTHON
    assert len(TRAIN) >= 2


@pytest.mark.parametrize("line", [line for line in TRAIN if "-m" not in line and "ckpt=" not in line])
def test_its_training_commands_compose(line):
    compose_config(shlex.split(line)[2:])


def test_its_pictures_are_there():
    for picture in re.findall(r"\]\((docs/[^)]+)\)", TEXT):
        assert (Path(__file__).parent.parent / picture).is_file()
