"""README: its tables are generated; every code block is run or, where a training takes hours, rehearsed."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tensorboard.program import TensorBoard
from torchvision.io import write_png

import knep.engine.step
from knep.cli import main as cli
from knep.cli.train import main
from knep.config.compose import compose_config
from knep.evidence import readme_table
from knep.evidence.auto.command import auto
from knep.recipes.recipe import Recipe
from knep.run.run import check
from knep.run.sweep_space import space

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def blocks(language):
    return [code for name, code in BLOCKS if name == language]


LINES = [
    line.split(" #")[0].strip()
    for code in blocks("sh")
    for line in code.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]
QUICK = ["trainer=cpu", "trainer.max_epochs=1", "progress=false", "threads=1"]


def test_the_tables_and_the_recipes_heads_are_up_to_date():
    assert [path.name for path, text in readme_table.generated().items() if path.read_text() != text] == []


def test_every_block_has_a_language_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"console", "sh", "python", "yaml", ""}
    assert len(BLOCKS) == TEXT.count("```") / 2
    assert len(LINES) >= 10


@pytest.mark.parametrize("code", blocks("python"))
def test_its_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("code", blocks("yaml"))
def test_its_yaml_is_an_apps_config(code, tmp_path):
    (tmp_path / "config.yaml").write_text(code)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("config")
    recipe = Recipe.from_config(cfg)
    assert recipe.make_optimizer.func.__name__ == "AdamW"  # type: ignore[attr-defined]
    assert recipe.regularization.label_smoothing > 0  # modern's, beside the option that the block takes instead


@pytest.mark.parametrize("code", blocks(""))
def test_its_picture_of_the_loop_is_that_of_the_code(code):
    assert " ".join(code.split()) in " ".join((knep.engine.step.__doc__ or "").split())


def test_its_two_first_commands_are_those_that_ci_runs():
    """They install and test everything, so CI takes them from README; here their parts are looked up."""
    commands = "\n".join(blocks("console"))
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"\$ (.*)", commands) == [
        "pip install -e . && python train.py",
        'pip install -e ".[dev]" && pytest -n 2',
    ]
    assert re.search(r"^dev = \[.*pytest-xdist", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    compose_config([])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished run in outputs/run, images in FOLDER, a table, text in TEXTS, and a net of one's own in mypkg."""
    home = tmp_path_factory.mktemp("project")
    small = ["data.limit=60", "data.batch_size=20", f"hydra.run.dir={home}/outputs/run"]
    main([*QUICK, *small])
    for k, name in enumerate(("ant", "bee")):
        (home / "FOLDER" / name).mkdir(parents=True)
        for i in range(12):
            image = torch.full((3, 16, 16), 40 * k + i, dtype=torch.uint8)
            write_png(image, str(home / "FOLDER" / name / f"{i}.png"))
    (home / "mypkg").mkdir()
    (home / "mypkg" / "nets.py").write_text(
        "from torch import nn\n\n\ndef build(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    (home / "mypkg" / "data.py").write_text(
        "import torch\n\n\ndef loaders():\n"
        "    x, y = torch.randn(80, 3, 16, 16), torch.arange(80) % 4\n"
        "    batches = list(zip(x.split(16), y.split(16)))\n"
        "    return batches[:4], batches[4:]\n"
    )
    rows = "".join(f"{k / 7:.2f},{'ab'[k % 2]},{k % 5 + 0.5}\n" for k in range(200))
    (home / "FILE.csv").write_text("size,kind,price\n" + rows)
    (home / "TEXTS").mkdir()
    (home / "TEXTS" / "one.txt").write_text("the quick brown fox " * 900)
    return home


def execute(line, monkeypatch):
    """Runs a line of README, in-process; a training from scratch is composed and rehearsed, sweeps job by job."""
    words = shlex.split(line.replace("<run>", "run"))
    monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "python" else words)
    if words[:2] == ["python", "train.py"]:
        if any(word.startswith("ckpt=") for word in words):
            return main([*words[2:], "trainer.max_epochs=2"])
        lines = [w for w in words[2:] if w != "-m"]
        for job in space(lines, []).jobs if "-m" in words else [lines]:
            check(job, [])
        return None
    if words[:2] == ["knep", "doctor"]:
        with pytest.raises(SystemExit) as left:
            cli.main([*words[1:], "trainer.max_epochs=1", "threads=1"])
        assert left.value.code in (0, 1)
        return None
    if "recipe=auto" in words:  # its search, with trials that find nothing
        lines = [word for word in words[2:] if not word.startswith("budget=")]
        flat = {"status": "finished", "val/acc": 0.5, "val/loss": 1.0, "steps": 1}
        return auto([*lines, *QUICK, "budget=14runs", "data.limit=100"], run=lambda trial: flat)
    if words[0] == "knep":
        pictures = ["data.size=16", "data.workers=0"] if "data=image_folder" in words else []
        small = [*pictures, "data.batch_size=4", *QUICK] if words[1] == "train" else []
        return cli.main([*words[1:], *small])
    if words[0] == "tensorboard":
        return TensorBoard().configure(argv=words)
    raise AssertionError(f"no test runs {words[0]}")


@pytest.mark.parametrize("line", LINES)
def test_its_commands_run(line, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))
    execute(line, monkeypatch)
    said = {"ls": "muon", "show": "override /optimizer", "plan": "he_normal", "cp": "muon.yaml"}
    words = line.split()
    if words[0] == "knep" and words[1] in said:
        assert said[words[1]] in capsys.readouterr().out


def test_every_other_document_with_code_has_a_test_that_names_it():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [p for p in (ROOT / "docs").rglob("*.md") if "```" in p.read_text() and f'"{p.name}"' not in tests]


def test_its_pictures_and_folders_are_there():
    for target in re.findall(r"\]\(((?:docs|examples)[^)]*)\)", TEXT):
        assert (ROOT / target).exists(), target
