"""`knep mcp`: its tools are commands of knep, refuse what those refuse, and name no code unless that is allowed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from knep.cli import main
from knep.cli.mcp import tools
from knep.errors import InputError

_ROOT = Path(__file__).parents[1]


def tool(name, own_code=False):
    return next(t for t in tools(own_code) if t.__name__ == name)


def test_without_the_package_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mcp.server.mcpserver", None)
    with pytest.raises(SystemExit) as left:
        main.main(["mcp"])
    assert left.value.code == 2
    assert "pip install 'knep[mcp]'" in capsys.readouterr().err


def test_names_are_listed_and_shown():
    assert "adamw" in tool("ls")("optimizer")
    assert "_target_" in tool("show")("optimizer/adamw")
    assert "did you mean optimizer" in tool("ls")("optimiser")


def test_the_doctor_answers_as_data():
    found = json.loads(tool("doctor")(["optimizer.lr=fast"]))
    assert found["schema"] == "knep.doctor/1"
    assert found["error"]
    assert "is missing" in json.loads(tool("doctor_log")("/no/where"))["error"]


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("doctor", {"overrides": ["--html=/tmp/x"]}, "no override"),
        ("plan", {"overrides": ["--model=os:system"]}, "no override"),
        ("doctor", {"overrides": [], "model": "os:system"}, "--own-code"),
        ("doctor", {"overrides": ["allow_targets=[os.]"]}, "--own-code"),
        ("plan", {"overrides": ["+model._target_=os.system"]}, "--own-code"),
        ("show", {"option": "--help"}, "no name"),
    ],
)
def test_options_and_code_are_refused(name, given, said):
    with pytest.raises(InputError, match=said):
        tool(name)(**given)


def test_the_index_for_programs_names_what_is_there():
    text = (_ROOT / "llms.txt").read_text(encoding="utf-8")
    paths = [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r"`(knep/[^`]+)`", text)]
    assert len(paths) >= 8
    assert [path for path in paths if not (_ROOT / path).exists()] == []
    assert set(re.findall(r"`knep (\w+)", text)) <= set(main._COMMANDS)
