"""docs/doctor.md: its Python runs, its lines are ones that can be typed, and its table is whole."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from knep.cli import main
from knep.config.compose import compose_config
from knep.doctor.findings import diseases

_DOCS = Path(__file__).parents[2] / "docs"
_TEXT = (_DOCS / "doctor.md").read_text(encoding="utf-8")
_LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", _TEXT, re.DOTALL) for line in block.splitlines() if line.strip()
]


def test_its_python_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
    exec(compile(code, "doctor.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", _LINES)
def test_its_lines_can_be_typed(line):
    words = shlex.split(line, comments=True)
    args = main._parser().parse_args(words[1:])
    overrides = [w for w in args.overrides if w not in ("data=image_folder", "data.root=FOLDER")]
    compose_config([*(["model=mlp"] if args.model else []), *overrides])


def test_every_disease_is_in_a_kind_that_it_names():
    assert len(diseases()) == 78
    for kind in {d.kind for d in diseases().values()}:
        assert kind in _TEXT


def test_the_clinics_page_is_there():
    assert "half B" in (_DOCS / "clinic.md").read_text(encoding="utf-8")
