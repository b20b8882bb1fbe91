"""CONTRIBUTING: its picture is the rule's, each path and link of it is there; hooks and workflow call what there is."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from knep.cli.main import _COMMANDS
from tests.test_floors import FLOORS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
QUESTIONS = re.findall(r"^\| ([^|]+\?) \| `([^`|]+)` \|$", TEXT, re.MULTILINE)


def test_twenty_questions_are_answered_by_a_path_that_is_there():
    assert len(QUESTIONS) == 20
    assert TEXT.partition("## Where is it?")[2].count("\n| ") == 21  # the head is one of them: no row is left unread
    assert [path for _, path in QUESTIONS if not (ROOT / path).is_file()] == []
    assert len({path for _, path in QUESTIONS}) == 20


def test_its_links_and_the_paths_in_its_text_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert "knep/engine/step.py" in links
    named = re.findall(r"`((?:knep|tests|docs|\.ci)/[\w./]+)`", TEXT)
    assert len(named) > 25
    assert [path for path in (*links, *named) if not (ROOT / path).exists()] == []


def test_its_picture_has_the_floors_that_the_rule_has():
    picture = TEXT.split("```")[1].strip("\n").splitlines()
    assert [line[:38].split() for line in picture] == [rooms.split() for rooms in reversed(FLOORS)]


def test_its_commands_of_knep_are_some():
    assert set(re.findall(r"`knep (\w+)", TEXT)) == {"new", "ledger", "cards"} <= set(_COMMANDS)


def test_the_hooks_are_few_and_local():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format", "end-of-file", "large-files"]
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    scripts = [word for hook in repo["hooks"] for word in hook["entry"].split() if "/" in word]
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize(
    ("word", "data", "wrong"),
    [
        ("end", b"a\n", False), ("end", b"", False), ("end", b"a", True), ("end", b"a\n\n", True),
        ("large", b"a" * 512000, False), ("large", b"a" * 512001, True),
    ],
)  # fmt: skip
def test_a_file_that_a_hook_refuses_is_named(word, data, wrong, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("files", ROOT / ".ci" / "files.py")
    assert spec is not None
    assert spec.loader is not None
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    path = tmp_path / "some.txt"
    path.write_bytes(data)
    assert files.main(word, str(path)) == wrong
    assert (str(path) in capsys.readouterr().out) == wrong


def test_the_workflow_calls_what_runs_here():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["on"] == ["push", "pull_request"]
    (job,) = workflow["jobs"].values()
    assert job["timeout-minutes"] == 90
    assert [step["run"].split()[-1] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    # Of what README's second command leaves out, an eighth each day.
    assert re.search(r"\npytest -n 2 -m slow --part .*/8\"\n", (ROOT / ".ci" / "run").read_text())
    assert all(re.fullmatch(r"[\w/-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
