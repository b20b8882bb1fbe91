"""The whole run: what a user finds in the folder, and that resuming, evaluating and predicting work."""

import csv
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from knep.cli import main as cli
from knep.cli.train import main
from knep.config.diff import changes
from knep.config.schema import TrainerConfig, config_hash
from knep.data.digits import Digits
from knep.engine.evaluate import batches_of
from knep.engine.logging.progress import ProgressBar
from knep.errors import InputError
from knep.run.log import logged
from knep.run.predict import predict

ROOT = Path(__file__).parent.parent
QUICK = ["trainer=cpu", "trainer.max_epochs=2", "data.limit=200", "data.batch_size=50", "progress=false", "threads=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    main([*QUICK, "log_every=1", "averaging=ema", f"hydra.run.dir={folder}"])
    return folder


def test_the_folder_holds_what_it_should(run):
    summary = json.loads((run / "summary.json").read_text())
    wanted = {
        "test/acc",
        "test/loss",
        "val/acc_best",
        "best_epoch",
        "epochs",
        "steps",
        "samples_per_second",
        "seconds",
        "parameters",
        "seed",
        "config_hash",
        "status",
    }
    assert wanted <= set(summary)
    assert summary["status"] == "finished"
    assert summary["epochs"] == 2
    assert "averaging=ema" in (run / "overrides.txt").read_text().splitlines()
    assert "${" not in (run / "config.yaml").read_text()
    assert (run / "git_hash.txt").read_text().strip()
    assert (run / "git_diff.patch").exists()
    assert {"best.ckpt", "last.ckpt", "final.ckpt"} <= {p.name for p in (run / "checkpoints").iterdir()}


def test_metrics_csv_has_every_number(run):
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr", "grad_norm/before_clip"} <= set(rows[0])
    assert sum(bool(r["val/acc"]) for r in rows) == 2
    steps = [int(r["step"]) for r in rows]
    assert steps == sorted(set(steps))


def test_tensorboard_shows_everything(run):
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    tags = board.Tags()
    scalars = {
        "train/loss",
        "train/acc",
        "val/loss",
        "val/acc",
        "watch/lr",
        "watch/grad_norm/before_clip",
        "watch/grad_norm/after_clip",
        "watch/grad_norm/clipped_share",
        "whole_run/test/acc",
    }
    assert scalars <= set(tags["scalars"])
    assert {"whole_run/test/confusion", "whole_run/test/most_confident_mistakes"} <= set(tags["images"])
    # It sorts by name and unfolds the first two groups.
    assert sorted({*tags["scalars"], *tags["images"]})[:4] == ["train/acc", "train/loss", "val/acc", "val/loss"]
    assert any(t.startswith("config") for t in tags["tensors"])
    before = [e.value for e in board.Scalars("watch/grad_norm/before_clip")]
    after = [e.value for e in board.Scalars("watch/grad_norm/after_clip")]
    assert all(a <= min(b, 1) + 1e-5 for a, b in zip(after, before, strict=True))
    summary = json.loads((run / "summary.json").read_text())
    assert board.Scalars("whole_run/test/acc")[-1].value == pytest.approx(summary["test/acc"])


def test_the_log_holds_what_was_printed(run):
    began, *lines = (run / "train.log").read_text().splitlines()
    assert "averaging=ema" in began
    starts = ("recipe digits_best", "data digits", "capacity", "runs on", "epoch 1/2", "epoch 2/2", "best validation")
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=False)] == [True] * len(starts)
    assert any(line.startswith("test accuracy") for line in lines)


def test_a_terminal_s_log_has_no_codes_and_no_earlier_bars(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    with logged(tmp_path, ["seed=1"]):
        print("\x1b[1mbold\x1b[0m")
        sys.stdout.write("bar 10 %\r\x1b[2Kepoch 1\nbar 20 %\r\x1b[2Kbar 30 %")
        sys.stdout.write("\r\x1b[2Kepoch 2\r\n")
    assert (tmp_path / "train.log").read_text().splitlines()[1:] == ["bold", "epoch 1", "epoch 2"]
    assert "bar 30 %" in terminal.getvalue()


def test_a_refusal_leaves_no_log_where_none_was_and_the_one_that_was(tmp_path, capsys):
    def refused():
        with logged(tmp_path, []):
            print("warned")
            raise InputError("no")

    with pytest.raises(InputError):
        refused()
    assert not (tmp_path / "train.log").exists()
    (tmp_path / "train.log").write_text("earlier\n")
    with pytest.raises(InputError):
        refused()
    assert (tmp_path / "train.log").read_text().startswith("earlier\n")


def test_a_run_leaves_python_s_logging_as_it_was(tmp_path, capsys):
    root = logging.getLogger()
    before = list(root.handlers), root.level
    main([*QUICK, f"hydra.run.dir={tmp_path / 'run'}"])
    assert (list(root.handlers), root.level) == before


def test_a_refusal_is_all_that_is_printed(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, "trainer.limit_val_batches=-1", f"hydra.run.dir={tmp_path}/run"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("knep: trainer: ")
    assert not (tmp_path / "run").exists()


def test_the_bar_ends_before_the_run_says_that_it_was_interrupted():
    bar, ends = ProgressBar(), []
    bar._bar = SimpleNamespace(stop=lambda: ends.append(True))
    bar.on_exception(*[cast(Any, None)] * 2, exception=KeyboardInterrupt())
    assert ends == [True]


def test_fast_dev_run_and_limit_test_batches_limit_the_test(tmp_path, capsys):
    data = Digits(batch_size=50)
    data.prepare()

    def images(**trainer):
        config = {"trainer": {"fast_dev_run": False, "limit_val_batches": None} | trainer}
        limits = TrainerConfig.of(config["trainer"])
        return [sum(len(y) for _, y in batches_of(limits, data, split)) for split in ("val", "test")]

    val, test = data.sizes["val"], data.sizes["test"]
    assert images() == images(limit_test_batches=None) == [val, test]
    assert images(limit_test_batches=2) == [val, 100]
    assert images(limit_test_batches=0.25) == [val, -(-test // 4)]
    assert images(limit_test_batches=1e-9) == [val, 1]
    assert images(fast_dev_run=True) == [50, 50]
    main([*QUICK, "trainer.fast_dev_run=2", f"hydra.run.dir={tmp_path}"])
    assert "n = 100)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*QUICK, "trainer.limit_test_batches=0", f"hydra.run.dir={tmp_path}"])
    assert "leaves nothing to test on" in capsys.readouterr().err


def test_runs_that_knew_no_limit_of_the_test_are_the_same(run):
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    before = config | {"trainer": {k: v for k, v in config["trainer"].items() if k != "limit_test_batches"}}
    assert config_hash(before) == config_hash(config)
    assert not changes(before, config | {"trainer": config["trainer"] | {"limit_test_batches": 3}}, 1, 1)


@pytest.fixture
def knep(capsys):
    """The exit code of a `knep` command, what it prints, and its error."""

    def call(*arguments):
        code = 0
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_evaluate_finds_the_same_accuracy(run, knep):
    code, out, error = knep("evaluate", run)
    assert code == 0, error
    assert json.loads(out)["test/acc"] == json.loads((run / "summary.json").read_text())["test/acc"]
    assert json.loads(knep("evaluate", run, "--split", "val")[1])["val/images"] == 143


def test_predict_prints_classes_with_probabilities(run, images):
    black = images / "ant" / "0.png"
    done = subprocess.run([sys.executable, "-m", "knep.cli", "predict", run, black], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(black))
    assert done.stdout.count("%") == 3


@pytest.fixture
def images(tmp_path):
    """Five images in folders of a folder, and what is none of them."""
    for k, name in enumerate(("ant/0.png", "ant/1.JPG", "ant/deeper/2.png", "3.webp", "4.gif")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 50 * k).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    return tmp_path


def test_predict_reads_a_folder_whole_and_writes_a_table(run, images, knep):
    table = images / "out.csv"
    code, out, error = knep("predict", run, images, "--csv", table, "--top", 2)
    assert code == 0, error
    assert "notes.txt" in error
    assert out == f"5 images: {table}\n"
    rows = list(csv.DictReader(table.open()))
    assert [Path(row["file"]).name for row in rows] == ["3.webp", "4.gif", "0.png", "1.JPG", "2.png"]
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2"]
    ((_, ranked),) = predict(run, [images / "3.webp"], 2)
    assert rows[0]["class"] == ranked[0][0]
    assert float(rows[0]["probability"]) == pytest.approx(ranked[0][1], rel=1e-4)
    before = table.read_text()
    assert knep("predict", run, images, "--csv", table)[0] == 2  # it exists
    assert table.read_text() == before


def test_predict_names_all_files_that_it_cannot_read_and_writes_nothing(run, images, knep):
    (images / "no.png").write_text("no image")
    assert "no.png cannot be read" in knep("predict", run, images / "no.png")[2]
    whole = (images / "ant" / "1.JPG").read_bytes()
    (images / "ant" / "half.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    code, out, error = knep("predict", run, images, "--csv", images / "out.csv")
    assert (code, out) == (2, "")
    assert "2 of 7 images cannot be read" in error
    assert "no.png" in error
    assert "half.jpg" in error
    assert not (images / "out.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "/nowhere"], "/nowhere is missing"),
        (["predict", "/nowhere", "x.png"], "/nowhere is missing"),
        (["predict", ".", "/nowhere.png"], "/nowhere.png is missing"),
        (["predict", ".", "/dev/null"], "/dev/null is missing, or no file"),
        (["predict", ".", ".", "--top", "0"], "--top=0 must be at least 1"),
        (["predict", ".", ".", "--csv", "/nowhere/x.csv"], "cannot be written"),
        (["evaluate", ".", "--allow", "1x"], "cannot be allowed"),
    ],
)
def test_evaluate_and_predict_refuse_without_torch(arguments, said, knep, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    code, _, error = knep(*arguments)
    assert (code, said in error, error.count("\n")) == (2, True, 1)


def test_resuming_at_an_epoch_ends_where_the_whole_run_ends(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fixed = ["scheduler=constant", "averaging=ema", "augment=shift", "dropout=standard", "dropout.p=0.2"]
    main([*QUICK, *fixed, "trainer.max_epochs=4", f"hydra.run.dir={whole}"])
    main([*QUICK, *fixed, f"hydra.run.dir={parts}"])
    main([f"ckpt={parts}", "trainer.max_epochs=4"])
    a, b = (torch.load(f / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"] for f in (whole, parts))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert a.keys() == b.keys()
    steps = [r["step"] for r in csv.DictReader((parts / "metrics.csv").open())]
    assert steps == [r["step"] for r in csv.DictReader((whole / "metrics.csv").open())]


def test_an_ensemble_reports_its_members(tmp_path, capsys):
    main([*QUICK, "averaging=ensemble", "averaging.members=2", f"hydra.run.dir={tmp_path}/run"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["members/test_acc"]) == 2
    assert summary["members/test_acc"][0] != summary["members/test_acc"][1] or summary["members/test_acc_std"] == 0
    assert "members" in capsys.readouterr().out
    cli.main(["evaluate", str(tmp_path / "run")])
    assert json.loads(capsys.readouterr().out)["test/acc"] == summary["test/acc"]


def test_gd_takes_one_step_an_epoch(tmp_path):
    main([*QUICK, "optimizer=gd", "scheduler=none", f"hydra.run.dir={tmp_path}/run"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_sweep_runs_every_value(tmp_path):
    main(["-m", *QUICK, "dropout=standard", "dropout.p=0,0.5", f"hydra.sweep.dir={tmp_path}"])
    assert [(tmp_path / str(i) / "summary.json").exists() for i in (0, 1)] == [True, True]


def test_two_processes_train_and_write_once(tmp_path):
    arguments = [*QUICK[1:], "trainer=ddp_sim", "log_every=1", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    alone = tmp_path / "alone"
    main([*QUICK, f"hydra.run.dir={alone}"])
    assert summary["steps"] == json.loads((alone / "summary.json").read_text())["steps"]
    assert done.stdout.count("run folder") == 1
    events = sorted(p.name for p in (tmp_path / "run" / "tensorboard").iterdir())
    assert len(events) == len(list((alone / "tensorboard").iterdir()))


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path):
    folder = tmp_path / "run"
    arguments = [*QUICK, "trainer.max_epochs=5000", "stopping=none", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    end = time.time() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists() and time.time() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert "test/acc" not in summary
    main([f"ckpt={folder}", f"trainer.max_epochs={summary['epochs'] + 2}"])
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
