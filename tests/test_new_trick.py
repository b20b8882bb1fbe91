"""`knep new`: what it writes is found, formatted and imported, and its test fails until the formula is there."""

import errno
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from knep.cli import new_trick
from knep.cli.main import main
from knep.cli.new_stubs import stubs
from knep.config.catalog import SLOTS
from knep.errors import InputError

ROOT = Path(__file__).parent.parent
NEW = (*SLOTS, "loss")
SHORT, LONG = "mine", "a_name_of_thirty_characters_x2"
CHANGED = ("knep/recipes", "knep/conf", "knep/evidence/about.yaml", "tests/recipes")


def clone_into(folder, *parts):
    for part in parts:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / part)
    return folder


def run(clone, *words):
    return subprocess.run([sys.executable, "-m", *words], cwd=clone, capture_output=True, text=True)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A clone with two new tricks in each slot, and one in clip whose author has filled it in."""
    clone = clone_into(
        tmp_path_factory.mktemp("clone"), "knep", "tests/recipes", "tests/test_walker.py", "pyproject.toml"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone / "tests")
        for slot in NEW:
            new_trick.new(f"{slot}/{SHORT}")
            new_trick.new(f"{slot}/{LONG}")
        new_trick.new("clip/halved")
    source, test = clone / "knep/recipes/clip.py", clone / "tests/recipes/test_clip.py"
    head, own = source.read_text().split("def halved(")
    body = "grads = gradients(parameters)\n    total = global_norm(grads)\n    scale_(grads, 0.5)\n    return total\n"
    filled = re.sub(r"return global_norm\(gradients\(parameters\)\)  # FILL IN.*\n", body, own, count=1)
    source.write_text(f"{head}def halved({filled}")
    call = 'pytest.fail("fill in halved_by_hand, in tests/recipes/test_clip.py")'
    assert test.read_text().count(call) == 1
    test.write_text(test.read_text().replace(call, "return [g / 2 for g in gradients]"))
    return clone


def test_every_slot_has_a_stub():
    assert set(stubs()) == set(NEW)


def test_what_it_writes_is_found_and_fails_until_it_is_filled_in(grown):
    own = "test_property and (halved or mine or thirty)"
    done = run(grown, "pytest", "-p", "no:cacheprovider", "-rfp", "-k", f"test_walker or ({own})", "tests")
    failed = re.findall(r"^FAILED tests/recipes/test_(\w+)\.py::test_property\[(\w+)\]", done.stdout, re.MULTILINE)
    assert sorted(failed) == sorted((slot, name) for slot in NEW for name in (SHORT, LONG)), done.stdout
    for slot, name in failed:
        assert f"Failed: fill in {name}_by_hand, in tests/recipes/test_{slot}.py" in done.stdout
    assert "PASSED tests/recipes/test_clip.py::test_property[halved]" in done.stdout
    ended = re.search(rf"^{len(failed)} failed, (\d+) passed, \d+ deselected in", done.stdout, re.MULTILINE)
    assert ended is not None, done.stdout[-300:]
    assert int(ended[1]) > 3 * len(NEW)  # the walker's


def test_what_it_writes_is_as_ruff_has_it(grown):
    for words in (("check", "--no-cache"), ("format", "--check", "--no-cache")):
        done = run(grown, "ruff", *words, "knep", "tests")
        assert done.returncode == 0, done.stdout


ALL_SLOTS = f"""
import torch
from torch import nn
from knep.config.catalog import SLOTS
from knep.config.compose import compose_recipe
from knep.evidence.cards import card
from knep.recipes.recipe import Recipe

recipe = Recipe.from_config(compose_recipe("none", [f"{{slot}}={SHORT}" for slot in SLOTS]))
recipe.loss = Recipe.from_config(compose_recipe("none", ["loss={SHORT}"])).loss
x, y = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.arange(4)
x, y = recipe.augment(x, y, 10)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
assert not any(recipe.apply(model, recipe.scaling([x])(x)).changes.values())
optimizer = recipe.optimizer(model)
scheduler = recipe.scheduler(optimizer, total_steps=10, steps_per_epoch=5)
loss = recipe.loss(model(recipe.scaling([x])(x)), y)
(loss + recipe.regularization.penalty(list(model.parameters()))).backward()
assert recipe.clip(model.parameters()) > 0
optimizer.step()
scheduler.step()
assert recipe.members == 1
assert all("FILL IN" in card(slot, "{SHORT}").split("When not")[1] for slot in (*SLOTS, "loss"))
"""


def test_what_it_writes_runs_in_every_slot_at_once_and_makes_a_card(grown):
    done = subprocess.run([sys.executable, "-c", ALL_SLOTS], cwd=grown, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_says_what_is_left_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(clone_into(tmp_path, "pyproject.toml", *CHANGED))
    main(["new", "clip/mine"])
    said = capsys.readouterr().out
    written = re.findall(r"^written: (.*)$", said, re.MULTILINE)
    assert sorted(written) == [
        "knep/conf/clip/mine.yaml",
        "knep/evidence/about.yaml",
        "knep/recipes/clip.py",
        "tests/recipes/test_clip.py",
    ]
    assert "its test fails until" in said
    assert f'grep -n "FILL IN" {" ".join(written)}' in said
    assert all("FILL IN" in (tmp_path / path).read_text() for path in written)


def texts(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What of a clone is changed, and what tells that it is one."""
    return clone_into(tmp_path_factory.mktemp("small"), "pyproject.toml", *CHANGED)


def refused(words, capsys):
    """The line that a command which is refused ends with."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("trick", "said"),
    [
        ("klip/mine", "there is no slot klip: did you mean clip?"),
        ("qqq/mine", "there is no slot qqq: scaling, augment"),
        ("model/mine", "there is no slot model"),
        ("clip", "clip needs a name for the trick: write knep new clip/mine"),
        ("clip/", "clip needs a name"),
        ("clip/my-own", "my-own is no name for a trick: write small letters"),
        ("clip/Mine", "write small letters"),
        ("clip/2nd", "a letter first"),
        ("clip/a/b", "a/b is no name"),
        ("clip/../x", "../x is no name"),
        ("clip/class", "Python has it"),
        ("clip/sum", "Python has it"),
        ("clip/inf", "something else"),
        ("clip/default", "something else"),
        ("clip/" + "a" * 31, "it has 31 characters, of 30 at most"),
        ("clip/norm", "norm is there already"),
        ("init/he", "he means init=he_normal already"),
        ("clip/check", "knep/recipes/clip.py: it has a check already"),
        ("augment/mixing", "knep/recipes/augment/mixing.py is there already"),
        ("stopping/callback", "knep/recipes/stopping.py: it has a Callback already"),
        ("averaging/net", "tests/recipes/test_averaging.py: it has a Net already"),
        ("scaling/want", "it has a want already"),
        ("scheduler/\x1b[31m", r"\x1b[31m is no name"),
    ],
)
def test_what_it_refuses_changes_nothing(trick, said, small, monkeypatch, capsys):
    monkeypatch.chdir(small)
    before = texts(small)
    assert said in refused(["new", trick], capsys)
    assert texts(small) == before


def test_a_trick_is_added_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(clone_into(tmp_path, "pyproject.toml", *CHANGED))
    new_trick.new("clip/mine")
    capsys.readouterr()
    before = texts(tmp_path)
    assert "clip=mine is there already" in refused(["new", "clip/mine"], capsys)
    assert texts(tmp_path) == before


def test_outside_of_a_clone_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert "is in no clone of knep" in refused(["new", "clip/mine"], capsys)
    assert len(texts(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("tests/recipes/test_clip.py", "ROWS", "LINES", "it has no ROWS"),
        ("tests/recipes/test_clip.py", "= {\n", "= dict() or {\n", "no dict with one row a line"),
        ("knep/recipes/clip.py", "__all__", "names", "it has no __all__"),
        ("knep/recipes/clip.py", "def none", "def none(", "not as knep new expects it"),
        ("knep/evidence/about.yaml", "clip:", "klip:", "not as knep new expects it"),
    ],
)
def test_a_clone_that_is_otherwise_stays_as_it_is(file, old, new, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(clone_into(tmp_path, "pyproject.toml", *CHANGED))
    path = tmp_path / file
    path.write_text(path.read_text().replace(old, new))
    before = texts(tmp_path)
    error = refused(["new", "clip/mine"], capsys)
    assert said in error
    assert file in error
    assert texts(tmp_path) == before


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_file_that_cannot_be_written_takes_the_others_back(number, tmp_path, monkeypatch):
    monkeypatch.chdir(clone_into(tmp_path, "pyproject.toml", *CHANGED))
    before, whole, calls = texts(tmp_path), new_trick.write_atomic, []

    def write(path, text):
        calls.append(path)
        if len(calls) == number:
            raise OSError(errno.EACCES, "Permission denied", str(path))
        whole(path, text)

    monkeypatch.setattr(new_trick, "write_atomic", write)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\); nothing was"):
        new_trick.new("clip/mine")
    assert texts(tmp_path) == before


def test_nothing_in_this_clone_is_left_to_fill_in():
    files = [ROOT / "knep/evidence/about.yaml", *(ROOT / "knep/conf").rglob("*.yaml")]
    files += [*(ROOT / "knep/recipes").rglob("*.py"), *(ROOT / "tests/recipes").glob("*.py")]
    assert len(files) > 150
    assert [str(path.relative_to(ROOT)) for path in files if "FILL IN" in path.read_text()] == []


def test_it_needs_no_torch(tmp_path):
    clone_into(tmp_path, "pyproject.toml", *CHANGED)
    code = "import sys; from knep.cli.main import main; main(['new', 'clip/mine']); assert 'torch' not in sys.modules"
    environment = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
