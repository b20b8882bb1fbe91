"""`python -m scripts.quality`: a data set that needs nothing from outside, and what its splits share."""

import re
from pathlib import Path

import numpy as np
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from knep.config.instantiate import instantiate
from knep.config.schema import DataSpec, RunConfig
from knep.engine.build import build_module
from scripts.quality.__main__ import main, table
from scripts.quality.rivals import iou, language_net, parts, patches
from scripts.quality.runs import BARS, Score, composed
from scripts.quality.scenes import Scenes

ROOT = Path(__file__).parent.parent


def test_scenes_are_segmented(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["scenes", "--seeds", "1", "data.scenes=50", "trainer.max_epochs=1", "model.widths=[8,16]"]) == 0
    assert "test/iou" in capsys.readouterr().out
    assert (tmp_path / "outputs/quality/scenes.json").is_file()


def test_masks_mark_the_ink_of_digits():
    data = Scenes(scenes=20, batch_size=4)
    data.prepare()
    x, y = torch.cat(list(data.train_images())), torch.cat(list(data.train_targets()))
    assert data.sizes == {"train": 14, "val": 2, "test": 4}
    assert int(x[:, 0][y == 10].max()) < 64 <= int(x[:, 0][y != 10].min()) + 1


def test_a_rival_gets_the_rows_of_training_and_validation(tmp_path):
    bar = BARS["diabetes"]
    data = instantiate(composed(bar, bar.source(tmp_path), 0).config["data"])
    data.prepare()
    (x, y), (test_x, test_y) = parts(data)
    assert len(x) == len(y) == data.sizes["train"] + data.sizes["val"]
    assert len(test_x) == len(test_y) == data.sizes["test"]


def test_the_loop_by_hand_starts_where_knep_does(tmp_path):
    bar = BARS["bytes"]
    made = composed(bar, bar.source(tmp_path), 3)
    data = instantiate(made.config["data"])
    data.prepare()
    ours = build_module(RunConfig.of(made.config), DataSpec.of(data), data, seed=3).model.state_dict()
    theirs = language_net(made, data).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_iou_is_that_of_torchmetrics():
    found, wanted = torch.randint(0, 4, (2, 3, 9, 9), generator=torch.Generator().manual_seed(0))
    expected = MulticlassJaccardIndex(num_classes=4)(found, wanted)
    assert abs(iou(found, wanted) - float(expected)) < 1e-6


def test_a_patch_lies_around_its_pixel():
    x = np.arange(1, 2 * 5 * 6 + 1, dtype=np.uint8).reshape(2, 1, 5, 6)
    rows = patches(x)
    side = int(rows.shape[1] ** 0.5)
    assert (rows.reshape(2, 5, 6, side, side)[..., side // 2, side // 2] == x[:, 0]).all()
    assert not rows.reshape(2, 5, 6, side, side)[:, 0, 0, : side // 2].any()  # above the first row there is nothing


def test_seeds_begin_where_they_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["diabetes", "--val", "--seeds", "2", "--first", "7", "trainer.max_epochs=1"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^seed (\d+): knep", shown, re.MULTILINE) == ["7", "8"]


def test_the_table_pairs_seeds():
    found = {"knep": [Score(1.0, 1), Score(2.0, 1)], "a rival": [Score(2.0, 1), Score(3.0, 1)]}
    assert "| a rival | 2.5 ± 0.707 | -1 [-9.98, +7.98], -40.0% | 2 | 1 |" in table(BARS["letter"], found)


def test_the_page_has_a_row_for_each_data_set():
    page = (ROOT / "docs" / "quality.md").read_text()
    assert not [name for name in BARS if f"| {name} |" not in page]
    assert "python -m scripts.quality diamonds" in page
