"""`knep tta`: views that lower the loss on validation, and no others."""

import math

import pytest
import torch

from knep.cli.main import main
from knep.cli.train import main as train
from knep.ensemble import test_time
from knep.ensemble.test_time import _greedy, _loss, choose
from knep.errors import InputError

RUN = ["data=digits", "recipe=none", "model=mlp", "model.widths=[16]", "trainer.max_epochs=2", "progress=false"]
RUN += ["trainer.precision=32-true", "augment=[shift,mixup]", "threads=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tta") / "run"
    train([*RUN, f"hydra.run.dir={folder}"])
    return folder


def test_greedy_takes_what_helps_and_stops():
    y = torch.tensor([0, 0])
    views = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.1, 0.9], [0.1, 0.9]], [[0.6, 0.4], [0.9, 0.1]]]).log()
    assert _greedy(views, y, 3) == [0, 2]
    expected = -(math.log(0.75) + math.log(0.65)) / 2
    assert _loss(views[[0, 2]], y) == pytest.approx(expected, rel=1e-5)
    assert _greedy(views, y, 1) == [0]


def test_the_loss_on_validation_never_rises(finished):
    val, test = choose(finished, test=True)
    assert val.views == test.views
    assert str(val.views[0]) == "as it is"
    assert {v.stage for v in val.views[1:]} <= {"shift"}  # mixup changes the class
    assert val.loss <= val.plain_loss
    assert (val.loss < val.plain_loss) == (len(val.views) > 1)
    again = choose(finished)[0]
    assert again == val  # the draws are fixed


def test_a_view_that_ruins_images_is_left_out(finished, monkeypatch):
    class Blank(torch.nn.Module):
        mixes = repeats = False

        def change(self, x, y, num_classes):
            return x, y

        def forward(self, x, y, num_classes):
            return torch.zeros_like(x), y

    monkeypatch.setattr(test_time, "_stages", lambda *_: {"blank": Blank()})
    assert len(choose(finished)[0].views) == 1


@pytest.mark.parametrize("name", ["mixup", "cutmix", "repeats", "progressive_resize"])
def test_what_cannot_be_a_view_is_refused(name, finished):
    with pytest.raises(InputError, match="--stages flip"):
        choose(finished, [name])


def test_the_command_says_both(finished, capsys):
    assert not main(["tta", str(finished), "--stages", "shift", "--draws", "2", "--test"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["views", "val", "test"]
    with pytest.raises(SystemExit):
        main(["tta", str(finished), "--stages", "nosuch"])
    assert "knep ls augment" in capsys.readouterr().err
