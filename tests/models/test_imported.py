"""Models of another project by their path: what builds them gets what it takes, and each mistake has its line."""

import sys
from functools import partial

import pytest
import torch
from torch import nn

from knep.cli.train import main
from knep.errors import InputError
from knep.models.user_model import accepted, build, find, imported

NETS = """
import torch
from torch import nn


def build(num_classes, in_channels, image_size, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * image_size**2, num_classes),
    )


class Net(nn.Module):
    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.flat, self.head = nn.Flatten(), nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(self.flat(x))

    @classmethod
    def small(cls):
        return cls(10)


def needs(depth):
    return Net()


def broken():
    raise RuntimeError("two\\nlines")


def text():
    return "a net"


def thousand(in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1000))


built = Net()
options = {"width": 4}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project in the current folder that nobody installed."""
    (tmp_path / "ownpkg").mkdir()
    (tmp_path / "ownpkg" / "__init__.py").write_text("")
    (tmp_path / "ownpkg" / "nets.py").write_text(NETS)
    (tmp_path / "ownpkg" / "needy.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "ownpkg" / "wrong.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "ownpkg"]:
        del sys.modules[name]


@pytest.mark.parametrize("path", ["ownpkg.nets:build", "ownpkg.nets.build", "ownpkg.nets:Net", "ownpkg.nets:Net.small"])
def test_functions_and_classes_build(path, project):
    model = imported(1, 10, 8, path=path)
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert model.training


def test_a_builder_gets_what_its_signature_takes():
    offered = {"num_classes": 3, "in_channels": 1, "image_size": 8}
    rows = {
        (lambda num_classes: 0): {"num_classes": 3},
        (lambda image_size=4, depth=2: 0): {"image_size": 8},
        (lambda: 0): {},
        (lambda **options: 0): {"num_classes": 3},
        (lambda in_channels, **options: 0): {"num_classes": 3, "in_channels": 1},
        nn.Identity: {"num_classes": 3},
        partial(lambda width, num_classes: 0, 2): {"num_classes": 3},
    }
    for builder, given in rows.items():
        assert accepted(builder, offered) == given


ROWS = {
    "no path": (None, ["model.path=mypkg.nets:build"]),
    "no builder": ("ownpkg", ["names no module and builder"]),
    "no module": ("ownpgk.nets:build", ["no module ownpgk", "the folder that holds it"]),
    "no submodule": ("ownpkg.nest:build", ["no module ownpkg.nest"]),
    "missing dependency": ("ownpkg.needy:build", ["importing ownpkg.needy failed", "a_package_nobody_has"]),
    "fails on import": ("ownpkg.wrong:build", ["importing ownpkg.wrong failed", "ZeroDivisionError"]),
    "no attribute": ("ownpkg.nets:biuld", ["module ownpkg.nets has no attribute biuld", "did you mean build?"]),
    "no member": ("ownpkg.nets:Net.smal", ["class Net has no attribute smal", "did you mean small?"]),
    "not callable": ("ownpkg.nets:options", ["options of module ownpkg.nets is a dict", "not callable"]),
    "built already": ("ownpkg.nets:built", ["is a Net that is built already"]),
    "needs more": ("ownpkg.nets:needs", ["ownpkg.nets:needs()", "TypeError", "depth"]),
    "raises": ("ownpkg.nets:broken", ["RuntimeError: two lines"]),
    "no module built": ("ownpkg.nets:text", ["gave a str, not an nn.Module"]),
    "other classes": ("ownpkg.nets:thousand", ["gives (2, 1000)", "(2, 10)", "num_classes"]),
}


@pytest.mark.parametrize("row", ROWS)
def test_each_mistake_has_its_line(row, project):
    path, said = ROWS[row]
    with pytest.raises(InputError) as error:
        imported(1, 10, 8, path=path)
    assert all(words in str(error.value) for words in said), error.value
    assert "\n" not in str(error.value)


def test_a_net_that_cannot_read_the_images_names_its_layer(project):
    with pytest.raises(InputError, match=r"head \(Linear\) got float32 \(2, 256\) and takes float32 \(..., 64\)"):
        imported(1, 10, 16, path="ownpkg.nets:Net")


def test_torchvision_by_path():
    model = build("torchvision.models.resnet18", {"num_classes": 7, "in_channels": 3})
    assert model.fc.out_features == 7
    assert find("torchvision.models:resnet18").__name__ == "resnet18"


QUICK = ["trainer=cpu", "trainer.max_epochs=1", "data.limit=60", "data.batch_size=20", "progress=false", "threads=1"]


def test_knep_trains_it_without_code(project):
    main([*QUICK, "model=import", "model.path=ownpkg.nets:build", "hydra.run.dir=run"])
    assert (project / "run" / "summary.json").is_file()
    assert "path: ownpkg.nets:build" in (project / "run" / "config.yaml").read_text()


def test_a_wrong_path_is_told_before_anything_is_made(project, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, "model=import", "model.path=ownpkg.nets:biuld", "data.root=/nowhere", "hydra.run.dir=run"])
    assert stop.value.code == 2
    assert "did you mean build?" in capsys.readouterr().err
    assert not (project / "run").exists()
