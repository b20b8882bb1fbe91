"""Another project's type checker sees every signature: pyright, strict, on a file outside of the repository."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

OUTSIDE = """
import torch
from torch import nn

import knep
from knep.errors import InputError

model: nn.Module = nn.Linear(2, 2)
x = torch.zeros(2, 2)
recipe = knep.load("modern", overrides=["norm=group"], search=["pkg://mypkg.conf"])
reveal_type(recipe)
reveal_type(recipe.apply(model, sample=x, inplace=False))
reveal_type(recipe.apply(model).changes)
reveal_type(recipe.apply(model).model)
reveal_type(recipe.dry_run(model, sample=x).parameters)
optimizer = recipe.optimizer(model, sample=x)
reveal_type(optimizer)
reveal_type(recipe.scheduler(optimizer, 100))
reveal_type(recipe.clip(model.parameters()))
reveal_type(knep.LitModule(model, recipe, num_classes=5, images=[x]))
reveal_type(knep.callbacks("modern", ["norm=group"], model="net"))
reveal_type(recipe.scaling([x]))
reveal_type(knep.allow("mypkg."))
reveal_type(InputError)
"""

SEEN = [
    "Recipe",
    "Report",
    "Mapping[str, list[Change]]",
    "Module",
    "list[Parameter]",
    "Optimizer",
    "LRScheduler",
    "Tensor",
    "LitModule",
    "Callbacks",
    "Module",
    "None",
    "type[InputError]",
]

WRONG = """
import knep

knep.load(3)
knep.callbacks("modern", num_classes="ten")
knep.load("modern").apply("no model")
"""


def pyright(folder, text):
    (folder / "outside.py").write_text(text)
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "outside.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return json.loads(done.stdout)["generalDiagnostics"]


@pytest.fixture(scope="module")
def diagnostics(tmp_path_factory):
    return pyright(tmp_path_factory.mktemp("outside"), OUTSIDE + WRONG.replace("import knep\n", ""))


def test_the_api_is_fully_known(diagnostics):
    first_wrong = OUTSIDE.count("\n")
    errors = [d for d in diagnostics if d["severity"] == "error" and d["range"]["start"]["line"] < first_wrong]
    assert not errors, errors[0]["message"]
    revealed = [d["message"].split(" is ", 1)[1].strip('"') for d in diagnostics if d["severity"] == "information"]
    assert revealed == SEEN


def test_wrong_arguments_are_found(diagnostics):
    errors = [d["message"] for d in diagnostics if d["severity"] == "error"]
    for words in ('"name"', '"num_classes"', '"model"'):
        assert any(words in message for message in errors), words


def test_the_package_says_that_it_is_typed():
    assert (files("knep") / "py.typed").is_file()
