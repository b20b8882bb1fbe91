"""The whole run: what a user finds in the folder, and that resuming, evaluating and predicting work."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from knep.train import main

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
        "lr",
        "grad_norm/before_clip",
        "grad_norm/after_clip",
        "grad_norm/clipped_share",
        "final/test/acc",
    }
    assert scalars <= set(tags["scalars"])
    assert {"test/confusion", "test/most_confident_mistakes"} <= set(tags["images"])
    assert any(t.startswith("config") for t in tags["tensors"])
    before = [e.value for e in board.Scalars("grad_norm/before_clip")]
    after = [e.value for e in board.Scalars("grad_norm/after_clip")]
    assert all(a <= min(b, 1) + 1e-5 for a, b in zip(after, before, strict=True))
    summary = json.loads((run / "summary.json").read_text())
    assert board.Scalars("final/test/acc")[-1].value == pytest.approx(summary["test/acc"])


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *map(str, arguments)], capture_output=True, text=True
    )


def test_evaluate_finds_the_same_accuracy(run):
    done = script("evaluate.py", run)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test/acc"] == json.loads((run / "summary.json").read_text())["test/acc"]


def test_predict_prints_classes_with_probabilities(run, tmp_path):
    from torchvision.io import write_png

    write_png(torch.zeros(1, 20, 20, dtype=torch.uint8), str(tmp_path / "black.png"))
    done = script("predict.py", run, tmp_path / "black.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "black.png"))
    assert done.stdout.count("%") == 3


def test_predict_names_the_file_it_cannot_read(run, tmp_path):
    (tmp_path / "no.png").write_text("no image")
    done = script("predict.py", run, tmp_path / "no.png")
    assert done.returncode == 2
    assert done.stderr.startswith("knep: ")
    assert "no.png" in done.stderr


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
    assert json.loads(script("evaluate.py", tmp_path / "run").stdout)["test/acc"] == summary["test/acc"]


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
