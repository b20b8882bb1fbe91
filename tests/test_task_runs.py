"""Runs of every task, from the command line: what they log, tell, resume, export, and what they refuse."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import write_png

from knep.cli.main import main as knep
from knep.cli.train import main
from knep.config.compose import compose_config
from knep.config.schema import config_hash
from knep.data.decode import read_image
from knep.engine.evaluate import measure
from knep.engine.load import load_members, load_module
from knep.errors import InputError
from knep.run.run import check
from knep.tasks.binary import Binary
from knep.tasks.segmentation import Segmentation
from knep.utils.monitors import OF_TASK
from tests.exhaustive import resume_matrix as matrix
from tests.test_resume import stopped_and_resumed

ROOT = Path(__file__).parent.parent
QUICK = [
    "recipe=none",
    "optimizer=adamw",
    "optimizer.lr=0.01",
    "trainer=cpu",
    "trainer.precision=32-true",
    "data=synthetic",
    "data.images=240",
    "data.image_size=8",
    "data.batch_size=24",
    "progress=false",
    "threads=1",
]
NETS = {
    "multiclass": ["model=mlp", "model.widths=[16]", "scaling=standardize"],
    "binary": ["model=mlp", "model.widths=[16]", "scaling=standardize"],
    "multilabel": ["model=mlp", "model.widths=[16]", "scaling=standardize", "data.classes=3"],
    "regression": ["model=mlp", "model.widths=[16]", "scaling=standardize", "data.classes=2"],
    "segmentation": ["model=import", "model.path=tests.task_nets:pixels", "scaling=unit", "data.classes=3"],
    "tokens": ["model=import", "model.path=tests.task_nets:Sequences", "data.classes=5"],
    "tagging": ["model=import", "model.path=tests.task_nets:Sequences", "data.classes=5"],
}


def trained(task: str, folder: Path, *more: str, epochs: int = 2) -> dict:
    lines = [*QUICK, f"task={task}", *NETS[task], f"trainer.max_epochs={epochs}", f"hydra.run.dir={folder}", *more]
    main(lines)
    return json.loads((folder / "summary.json").read_text())


def last_row(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open() as f:
        rows = list(csv.DictReader(f))
    return {k: float(v) for k, v in [r for r in rows if r["val/loss"]][-1].items() if v}


@pytest.mark.parametrize("task", NETS)
def test_every_task_trains_is_told_and_is_measured_again(task, tmp_path, capsys):
    summary = trained(task, tmp_path / "run")
    names = OF_TASK[task].names
    assert {f"{split}/{name}" for split in ("val", "test") for name in names} <= set(summary)
    assert summary["status"] == "finished"
    row = last_row(tmp_path / "run")
    for name in names:
        assert row[f"val/{name}"] == pytest.approx(summary[f"val/{name}"], rel=1e-5, abs=1e-6), name
    said = capsys.readouterr().out
    assert ("acc" in said) == ("acc" in names)
    assert f"val/{OF_TASK[task].primary}" in said
    knep(["evaluate", str(tmp_path / "run"), "--split", "val"])
    again = json.loads(capsys.readouterr().out)
    for name in names:
        assert again[f"val/{name}"] == pytest.approx(summary[f"val/{name}"], rel=1e-6)


def test_a_regression_learns_in_its_own_unit(tmp_path):
    summary = trained("regression", tmp_path / "run", "model.widths=[64]", epochs=8)
    assert summary["test/r2"] > 0.8
    assert summary["test/rmse"] > 10  # targets of about 1,000, deviations of about 60
    assert summary["test/loss"] < 0.2
    assert summary["val/rmse_best"] <= summary["val/rmse"] + 1e-6
    assert load_module(tmp_path / "run" / "checkpoints" / "final.ckpt").task.mean.min() > 900


def test_metrics_by_name_reach_log_and_summary(tmp_path):
    summary = trained("multiclass", tmp_path / "run", "metrics=[f1,{name: fbeta, beta: 2.0}]", "stopping=early",
                      "stopping.monitor=val/f1", "stopping.mode=max")  # fmt: skip
    row = last_row(tmp_path / "run")
    for name in ("f1", "fbeta"):
        assert row[f"val/{name}"] == pytest.approx(summary[f"val/{name}"], rel=1e-5)
        assert 0 <= summary[f"test/{name}"] <= 1


@pytest.mark.parametrize(
    "more",
    [
        ["loss=focal", "loss.class_weight=auto"],
        ["loss=logit_adjusted"],
        ["sampling=balanced"],
        ["loss=cross_entropy", "regularization=label_smoothing", "sampling=sqrt"],
    ],
)
def test_losses_and_draws_against_uneven_classes_train_and_are_rebuilt(more, tmp_path):
    summary = trained("multiclass", tmp_path / "run", *more)
    member = load_members(tmp_path / "run")[0]
    assert summary["test/acc"] > 0.5
    if "loss=logit_adjusted" in more or "loss.class_weight=auto" in more:
        assert sum(member.about["counts"]) == 220


@pytest.mark.parametrize(
    ("task", "loss"), [("binary", "focal"), ("multilabel", "asymmetric"), ("segmentation", "dice"), ("tagging", "poly"),
                       ("regression", "quantile"), ("regression", "huber")]
)  # fmt: skip
def test_other_losses_train(task, loss, tmp_path):
    more = ["loss.class_weight=auto"] if task in ("binary", "multilabel", "tagging") else []
    summary = trained(task, tmp_path / "run", f"loss={loss}", *more)
    assert summary["val/loss"] == pytest.approx(last_row(tmp_path / "run")["val/loss"], rel=1e-5)


REFUSED = {
    "task=regression loss=cross_entropy": "write loss=mse",
    "task=multilabel loss=mse": "write loss=bce",
    "loss=bce": "write loss=one_vs_all",
    "task=binary loss=dice": "write loss=bce",
    "task=regression augment=mixup": "write augment=none",
    "augment=mixup loss=focal": "write loss=cross_entropy",
    "task=regression regularization=label_smoothing": "write regularization=none",
    "task=regression sampling=balanced": "write sampling=none",
    "task=segmentation augment=erase": "write augment=none",
    "task=segmentation augment=[flip,mixup_cutmix]": "write augment=[flip]",
    "task=multilabel augment=[flip,mixup]": "write augment=[flip]",
    "task=tokens augment=[flip,shift]": "write augment=none",
    "augment=[flip,mixup] loss=focal": "write loss=cross_entropy, or augment=[flip]",
    "task=segmentation model=cnn": "write model=import",
    "task=tokens scaling=standardize": "write scaling=none",
    "task=regression trainer.members=2": "write trainer.members=1",
    "task=regression averaging=ensemble": "write averaging=none",
    "task=regression callbacks=doctor": "write callbacks=none",
    "task=regression test_flip=true": "write test_flip=false",
    "task=regression stopping=early stopping.monitor=val/acc stopping.mode=max": "write one of val/loss, val/rmse",
    "stopping=early stopping.monitor=val/acc": "write stopping.mode=max",
    "task=regression stopping=early stopping.monitor=val/rmse stopping.mode=max": "write stopping.mode=min",
    "metrics=[f3]": "there is no metric f3",
    "metrics=[confusion_matrix]": "a curve or a table",
    "metrics=[matthews_corr_coef] stopping=early stopping.monitor=val/matthews_corr_coef": "write stopping.mode=max",
    "loss=focal loss.gamma=-1": "gamma must be",
    "loss=focal loss.delta=1": "loss=huber loss.delta=1",
    "task=segmentation task.ignored=0": "task.ignore_index",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_act_on_a_task_is_refused_before_the_first_step(line):
    task = next((word[5:] for word in line.split() if word.startswith("task=")), "multiclass")
    with pytest.raises(InputError) as found:
        check([*QUICK, *NETS[task], *line.split()], [])
    assert REFUSED[line] in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["task=regression", "data=digits"], "write task=multiclass"),
        (["task=multiclass", "data=synthetic", "+data.task=regression"], "adds a key"),
        (["task=binary", "data=digits"], "write task=multiclass"),
    ],
)
def test_data_of_another_kind_name_the_task_to_write(lines, text, tmp_path, capsys):
    rest = [line for line in QUICK if not line.startswith("data")]
    with pytest.raises(SystemExit):
        main([*rest, "model=mlp", *lines, f"hydra.run.dir={tmp_path}/run"])
    assert text in capsys.readouterr().err


RESUMED = {
    "regression": (["loss=huber", "averaging=ema"], (3, 9)),
    "binary": (["sampling=balanced", "loss=focal", "loss.class_weight=auto", "metrics=[f1]"], (4, 10)),
}


@pytest.mark.parametrize("task", RESUMED)
def test_ctrl_c_changes_nothing(task, tmp_path):
    more, batches = RESUMED[task]
    lines = [f"task={task}", "data=synthetic", "data.images=105", "data.image_size=8", "data.classes=4", *more]
    matrix.fit(lines, tmp_path / "whole")
    stopped_and_resumed(lines, tmp_path / "parts", batches)
    assert matrix.difference(matrix.traces(tmp_path / "whole"), matrix.traces(tmp_path / "parts")) == "identical"


def test_a_run_of_before_these_keys_hashes_and_resumes_as_it_did():
    config = compose_config(["recipe=none"]).config
    earlier = {k: v for k, v in config.items() if k not in ("task", "loss", "sampling", "metrics")}
    assert config_hash(earlier) == config_hash(config)
    from knep.config.diff import changes

    assert changes(earlier, config, 10, 1) == []
    other = compose_config(["recipe=none", "loss=focal"]).config
    assert config_hash(other) != config_hash(config)
    with pytest.raises(InputError, match="loss"):
        changes(earlier, other, 10, 1)


@pytest.mark.long
@pytest.mark.parametrize("task", ["regression", "tagging"])
def test_two_processes_measure_what_one_does(task, tmp_path):
    lines = [*QUICK, f"task={task}", *NETS[task], "trainer=ddp_sim", "trainer.max_epochs=2", "data.images=250"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "knep.cli", "train", *lines, f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    row, summary = last_row(tmp_path / "run"), json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in OF_TASK[task].names:
        assert row[f"val/{name}"] == pytest.approx(summary[f"val/{name}"], rel=1e-5), name


@pytest.mark.parametrize("task", ["regression", "binary", "multilabel", "segmentation", "tokens"])
def test_an_exported_file_says_what_the_run_says(task, tmp_path):
    trained(task, tmp_path / "run", epochs=1)
    for kind in ("safetensors", "pt2"):
        knep(["export", str(tmp_path / "run"), str(tmp_path / f"model.{kind}")])
    about = json.loads((tmp_path / "model.pt2.json").read_text())
    assert about["task"] == task
    if task != "regression":
        return
    images = torch.randint(0, 256, (5, 1, 8, 8)).float()
    out = torch.export.load(tmp_path / "model.pt2").module()(images)
    own = out * torch.tensor(about["target_std"]) + torch.tensor(about["target_mean"])
    member = load_members(tmp_path / "run")[0]
    torch.testing.assert_close(own, member.task.predictions(member(images)), rtol=1e-4, atol=1e-2)


def test_predictions_of_images_are_in_the_unit_of_the_task(tmp_path, capsys):
    image = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    write_png(image, str(tmp_path / "a.png"))
    for task in ("regression", "binary", "multilabel"):
        trained(task, tmp_path / task, epochs=1)
        capsys.readouterr()
        knep(["predict", str(tmp_path / task), str(tmp_path / "a.png")])
        said = capsys.readouterr().out
        assert ("%" in said) == (task != "regression")
        if task == "regression":
            member = load_members(tmp_path / task)[0]
            wanted = member.task.predictions(member(image[None]))[0].tolist()
            assert [float(w) for w in said.split() if w.replace(".", "").isdigit() and "." in w] == pytest.approx(
                wanted, rel=1e-4
            )
            knep(["predict", str(tmp_path / task), str(tmp_path / "a.png"), "--csv", str(tmp_path / "out.csv")])
            assert (tmp_path / "out.csv").read_text().startswith("file,target 0,target 1\n")


def test_masks_are_written_in_the_size_of_their_images(tmp_path, capsys):
    from PIL import Image

    write_png(torch.randint(0, 256, (1, 8, 12), dtype=torch.uint8), str(tmp_path / "a.png"))
    trained("segmentation", tmp_path / "run", epochs=1)
    words = ["predict", str(tmp_path / "run"), str(tmp_path / "a.png"), "--masks", str(tmp_path / "masks")]
    capsys.readouterr()
    knep([*words, "--csv", str(tmp_path / "out.csv")])
    with Image.open(tmp_path / "masks" / "a.png") as opened:
        mask = torch.from_numpy(np.asarray(opened).copy())
    assert mask.shape == (8, 12)
    assert (mask[:, :2] == 255).all()  # beside the square that the model sees
    assert (mask[:, 10:] == 255).all()
    member = load_members(tmp_path / "run")[0]
    x = read_image(tmp_path / "a.png", 1, 8)[None]
    wanted = member.task.predictions(member(x)).argmax(1)[0]
    assert mask[:, 2:10].tolist() == wanted.tolist()
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert float(row["share"]) == pytest.approx(
        float((wanted == wanted.flatten().mode().values).float().mean()), abs=1e-5
    )
    with pytest.raises(SystemExit) as stop:
        knep(words)
    assert stop.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_each_label_has_a_column_and_masks_are_of_pixels(tmp_path, capsys):
    write_png(torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8), str(tmp_path / "a.png"))
    trained("multilabel", tmp_path / "run", epochs=1)
    words = ["predict", str(tmp_path / "run"), str(tmp_path / "a.png")]
    knep([*words, "--csv", str(tmp_path / "out.csv"), "--top", "1"])
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    member = load_members(tmp_path / "run")[0]
    assert list(row) == ["file", *member.about["class_names"]]
    wanted = member.task.predictions(member(read_image(tmp_path / "a.png", 1, 8)[None]))[0].tolist()
    assert [float(v) for v in list(row.values())[1:]] == pytest.approx(wanted, rel=1e-4)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        knep([*words, "--masks", str(tmp_path / "masks")])
    assert stop.value.code == 2
    assert "this run is of task=multilabel: leave it out" in capsys.readouterr().err


def test_a_model_of_texts_says_which_byte_follows(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("ab" * 2000)
    lines = ["data=text", f"data.path={tmp_path / 't.txt'}", "data.length=16", "data.batch_size=8", "task=tokens"]
    lines += ["model=transformer", "model.width=16", "model.depth=1", "model.heads=2", "recipe=none", "optimizer=adamw"]
    main([*lines, "optimizer.lr=0.01", "trainer=cpu", "trainer.max_epochs=2", "progress=false", "threads=1",
          f"hydra.run.dir={tmp_path / 'run'}"])  # fmt: skip
    (tmp_path / "end.md").write_text("babababa")
    capsys.readouterr()
    knep(["predict", str(tmp_path / "run"), str(tmp_path / "end.md"), "--top", "1"])
    assert capsys.readouterr().out.split("  ")[1].startswith("b ")


def test_pixels_and_yes_or_no_are_counted_in_a_table():
    class Fixed(torch.nn.Module):
        def __init__(self, task, output):
            super().__init__()
            self.task, self.output = task, torch.nn.Parameter(output)

        def forward(self, x):
            return self.output[: len(x)]

    pixels = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]])  # classes 0 and 1
    found = measure(Fixed(Segmentation(2), pixels), [(torch.zeros(1, 3, 1, 2), torch.tensor([[[1, 255]]]))])
    assert found.confusion_KK is not None
    assert found.confusion_KK.tolist() == [[0, 0], [1, 0]]
    scores = torch.tensor([[3.0], [-1.0], [2.0]])
    found = measure(Fixed(Binary(), scores), [(torch.zeros(3, 1), torch.tensor([1, 1, 0]))])
    assert found.confusion_KK is not None
    assert found.confusion_KK.tolist() == [[0, 1], [1, 1]]
