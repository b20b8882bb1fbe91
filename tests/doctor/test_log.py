"""Runs that have ended: healthy and sick curves, every kind of file, and one line for what is none."""

from __future__ import annotations

import csv
import json
import math
import os
import random

import pytest

from knep.doctor.log.checks import examine
from knep.doctor.log.curves import Curves
from knep.doctor.log.readers import read
from knep.errors import InputError


def curve(f, count=40, noise=0.02, seed=0):
    draw = random.Random(seed)
    return [(float(i), f(i) * (1 + noise * draw.gauss(0, 1))) for i in range(count)]


def falling(start=2.3, end=0.2, pace=6.0):
    return lambda i: end + (start - end) * math.exp(-i / pace)


def overfit(i):
    return 0.5 + 1.8 * math.exp(-i / 4) + 0.03 * max(0, i - 12)


SICK = {
    "not_finite": {"train": [(float(i), 2.3 if i < 9 else math.nan) for i in range(20)]},
    "not_finite, infinite validation": {"train": curve(falling()), "val": [(float(i), math.inf) for i in range(9)]},
    "lr_too_high": {"train": curve(lambda i: 2.3 * 1.2**i), "lr": curve(lambda i: 1.0, noise=0)},
    "lr_too_high, at once": {"train": [(float(i), 2.3 if i == 0 else 80.0) for i in range(12)]},
    "not_learning": {"train": curve(lambda i: 2.303, noise=0.003), "lr": curve(lambda i: 1e-7, noise=0)},
    "not_learning, noisy": {"train": curve(lambda i: 2.4, noise=0.03), "val": curve(lambda i: 2.31, noise=0.002)},
    "overfitting": {"train": curve(falling(end=0.01)), "val": curve(overfit)},
    "overfitting, no training loss": {"val": curve(overfit)},
    "loss_spikes": {"train": curve(lambda i: 8.0 if i in (50, 71) else 0.4 + 2 * math.exp(-i / 15), 100)},
    "not_finite, by its gradient": {"train": curve(falling()), "norm": [(float(i), math.nan) for i in range(40)]},
    "not_finite, written as 0": {"train": [(float(i), 2.0 if i < 5 else 0.0) for i in range(20)]},
    "not_learning, 0 at all points": {"train": [(float(i), 0.0) for i in range(20)]},
    "stopping_too_early": {"train": curve(lambda i: 2.3 - 0.05 * i, 30, 0.003), "lr": curve(lambda i: 0.1, 30, 0)},
    "rate_ended_early": {
        "train": curve(lambda i: max(1.9, 2.3 - 0.07 * i), 40, 0.01),
        "lr": curve(lambda i: 0.1 if i < 6 else 1e-5, 40, 0),
    },
    "noisy_validation": {"train": curve(falling()), "val": curve(lambda i: 0.5 * (3.0 if i % 3 == 0 else 1.0), 40)},
}
HEALTHY = {
    "falls and stays": {"train": curve(falling()), "val": curve(falling(end=0.4))},
    "one epoch of steps, noisy": {"train": curve(falling(end=0.7, pace=60), 400, 0.25)},
    "a long plateau": {"train": curve(falling(pace=2), 200), "val": curve(falling(end=0.3, pace=2), 200)},
    "cosine to 0": {
        "train": curve(falling(pace=20), 60),
        "val": curve(falling(end=0.4, pace=20), 60),
        "lr": curve(lambda i: 0.05 * (1 + math.cos(math.pi * i / 60)), 60, 0),
    },
    "dropout: validation below training": {"train": curve(falling(end=0.6)), "val": curve(falling(end=0.3))},
    "a likelihood below zero": {"train": curve(lambda i: 2 - 6 * (1 - math.exp(-i / 8)), noise=0.01)},
    "surer answers": {
        "train": curve(falling(end=0.01)),
        "val": curve(overfit),
        "val_acc": curve(lambda i: 0.9 - 0.5 * math.exp(-i / 5), noise=0),
    },
    "a warm-up of one high point": {"train": [(0.0, 2.3), (1.0, 3.1), *((float(i), 1.0 / i) for i in range(2, 30))]},
    "few points": {"train": [(0.0, 2.3), (1.0, 1.2)]},
    "learned within its first point": {
        "train": curve(lambda i: 0.31, noise=0.004),
        "val_acc": curve(lambda i: 0.93, noise=0.001),
    },
    "swings to the end of a quarter": {
        "train": curve(falling(end=0.02)),
        "val": [(i, v * (0.8 if i % 7 == 3 else 1.1 if i % 2 else 0.95)) for i, v in curve(falling(end=0.4), 40, 0.02)],
    },
    "a hinge that comes to 0": {"train": [(float(i), max(0.0, 2.0 * 0.3**i - 1e-7)) for i in range(20)]},
    "a loss by stairs": {"train": curve(lambda i: (2.3, 0.8, 0.4, 0.3)[i // 10], 40, 0.05)},
}


def found(series):
    return [f.disease for f in examine(Curves(source="here", **series)).findings]


@pytest.mark.parametrize("case", SICK)
def test_a_sick_curve_is_named(case):
    report = examine(Curves(source="here", **SICK[case]))
    assert report.findings, report
    first = report.findings[0]
    assert first.disease == case.partition(",")[0], report
    assert first.began is not None
    assert first.mend


@pytest.mark.parametrize("case", HEALTHY)
@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_curve_is_none(case, seed):
    draw = random.Random(seed)
    series = {k: [(x, v * (1 + 0.01 * draw.gauss(0, 1))) for x, v in row] for k, row in HEALTHY[case].items()}
    assert found(series) == []


@pytest.fixture
def run(tmp_path):
    """A folder as a run of knep leaves it, whose rate was too high."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "overrides.txt").write_text("model=mlp\noptimizer.lr=10\n")
    rows = [{"step": i, "lr": 10.0, "train/loss": 2.3 * 1.5**i, "val/loss": ""} for i in range(12)]
    with (folder / "metrics.csv").open("w") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_a_run_of_knep_ends_in_a_line_to_type(run):
    from knep.config.compose import compose_config

    finding = examine(read(run)).findings[0]
    assert finding.disease == "lr_too_high"
    line = finding.mend.partition("python train.py ")[2].partition(";")[0]
    assert line == "model=mlp optimizer.lr=1"
    compose_config(line.split())


def test_hugging_faces_state_is_read(tmp_path):
    rows = [{"epoch": i / 5, "step": i * 10, "loss": 2.0 / (i + 1), "learning_rate": 5e-5} for i in range(10)]
    rows += [{"epoch": 2.0, "step": 100, "eval_loss": 0.4}, {"step": 100, "train_runtime": 9.0, "total_flos": 1e20}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows, "global_step": 100}))
    curves = read(tmp_path)
    assert (len(curves.train), len(curves.val), len(curves.lr), curves.unit) == (10, 1, 10, "step")


def test_tensorboards_events_are_read(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as board:
        for step in range(20):
            board.add_scalar("train/loss", 2.3 * 1.5**step, step)
            board.add_text("note", "no number", step)
    assert examine(read(tmp_path)).findings[0].disease == "lr_too_high"


@pytest.mark.parametrize(
    ("main", "splits", "lengths"),
    [("loss", ("train", "val"), (20, 20)), ("Loss/all", ("training", "validation"), (20, 20))],
)
def test_scalars_in_subfolders_stay_apart(tmp_path, main, splits, lengths):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as board:
        for step in range(20):
            board.add_scalars(main, dict(zip(splits, (2.3 * 0.8**step, 1 + 2 * 0.8**step), strict=True)), step)
    curves = read(tmp_path)
    assert (len(curves.train), len(curves.val)) == lengths
    assert examine(curves).findings == ()


def test_folders_of_several_runs_are_one_line(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for name in "ab":
        with SummaryWriter(str(tmp_path / name)) as board:
            board.add_scalar("train/loss", 1.0, 0)
    with pytest.raises(InputError, match=r"holds 2 runs \(a, b\): give the folder of one"):
        read(tmp_path)


@pytest.mark.parametrize(("mark", "point"), [(",", "."), (";", "."), (";", ","), ("\t", "."), ("|", ".")])
def test_a_table_is_read_by_its_own_delimiter(tmp_path, mark, point):
    rows = [mark.join(("epoch", "loss")), *(f"{i}{mark}{2.5 / (i + 1):.3f}".replace(".", point) for i in range(9))]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    assert read(tmp_path / "m.csv").train[4] == (4.0, 0.5)


def test_few_points_are_too_little_to_tell(tmp_path):
    (tmp_path / "m.csv").write_text("epoch,loss\n0,2.3\n")
    report = examine(read(tmp_path / "m.csv"))
    assert not report.sick
    assert report.verdict.startswith("too little to tell: ")


def test_where_a_loss_climbs_above_its_start_is_behind_a_mere_spike():
    late = [(float(i), 5.0 if i == 3 else 2.3 * 0.9**i if i < 15 else 0.47 * 1.35 ** (i - 15)) for i in range(30)]
    [found_one] = examine(Curves(source="here", unit="epoch", train=late)).findings
    assert (found_one.disease, found_one.began) == ("lr_too_high", next(i for i, v in late if i > 3 and v > 1.9))
    assert "image" not in str(examine(Curves(train=curve(falling(end=0.01)), val=curve(overfit))))


def _sized(path):
    with path.open("wb") as f:
        f.truncate((64 << 20) + 1)


HOSTILE = {
    "missing": ("no.csv", lambda p: None, "is missing"),
    "another kind": ("run.pkl", lambda p: p.write_bytes(b"\x80\x04."), "of no kind that is read"),
    "a link to nowhere": ("run.csv", lambda p: p.symlink_to("/nowhere"), "leads nowhere"),
    "a pipe": ("run.csv", lambda p: os.mkfifo(p), "a named pipe"),
    "large": ("run.csv", _sized, "more than 64 MiB"),
    "no text": ("run.csv", lambda p: p.write_bytes(b"loss\n\xff\xfe\n"), "no UTF-8 text"),
    "no loss": ("run.csv", lambda p: p.write_text("step,price\n1,2\n"), "has no loss"),
    "empty": ("run.csv", lambda p: p.write_text(""), "has no loss"),
    "text for a number": ("run.csv", lambda p: p.write_text("step,loss\n1,low\n"), "row 2, column loss is text"),
    "a short row": ("run.csv", lambda p: p.write_text("step,loss\n1\n"), "row 2 has 1 fields"),
    "a column twice": ("run.csv", lambda p: p.write_text("loss,loss\n1,2\n"), "two of one name"),
    "a quote left open": ("run.csv", lambda p: p.write_text('loss\n"1\n'), "no table"),
    "no JSON": ("trainer_state.json", lambda p: p.write_text("{"), "no JSON"),
    "deep JSON": ("trainer_state.json", lambda p: p.write_text("[" * 100_000), "no JSON"),
    "JSON of another kind": ("trainer_state.json", lambda p: p.write_text('{"log_history": {}}'), ".log_history is"),
    "a step without end": ("run.csv", lambda p: p.write_text("step,loss\n1e400,1\n"), "row 2, column step is inf"),
    "a list for a loss": (
        "trainer_state.json",
        lambda p: p.write_text('{"log_history": [{"loss": [1]}]}'),
        "column loss is a list",
    ),
    "damaged events": ("events.out.tfevents.1", lambda p: p.write_bytes(b"\x00" * 500), "events.out"),
    "an empty folder": ("run", lambda p: p.mkdir(), "holds no run"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_log_is_one_line(case, tmp_path):
    name, make, said = HOSTILE[case]
    make(tmp_path / name)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_nan_as_text_is_a_number(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("epoch,loss\n" + "".join(f"{i},{'NaN' if i > 4 else 2.3}\n" for i in range(9)))
    report = examine(read(path))
    assert (report.findings[0].disease, report.findings[0].began) == ("not_finite", 5)
    assert "epoch 5" in report.findings[0].evidence


def test_a_folder_with_a_link_outside_is_refused(run, tmp_path):
    (tmp_path / "other.csv").write_text("loss\n1\n")
    (run / "more.csv").symlink_to(tmp_path / "other.csv")
    with pytest.raises(InputError, match="leads outside"):
        read(run)


def test_lines_of_a_stranger_are_no_command(run):
    (run / "overrides.txt").write_text("model=mlp\n; rm -rf ~\n")
    with pytest.raises(InputError, match="no list of overrides"):
        read(run)
