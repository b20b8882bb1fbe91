"""A run that was stopped or killed and resumed ends, to the bit, where the run ends that never stopped."""

import csv
import json
import signal

import pytest
import torch
from torchvision.io import write_png

from knep.cli.train import main
from knep.errors import InputError
from knep.io.untrusted_folder import check_folder
from tests.cells import thinned
from tests.exhaustive import resume_matrix as matrix
from tests.exhaustive.resume_storm import storm

# What a checkpoint inside an epoch has to carry, each with the batches within which the run is stopped (7 an epoch).
RUNS = {
    "everything": (
        ["averaging=ema", "dropout=standard", "augment=shift", "scheduler=plateau", "stopping=early"],
        (3, 10, 14),
    ),
    "lightnings_loop": (["lean=false", "averaging=ema", "dropout=standard", "augment=shift"], (9,)),
    "inside_a_window": (["accumulate=3", "scheduler=one_cycle", "clip=norm", "clip.theta=0.1"], (4, 9, 20)),
    "window_in_lightnings_loop": (["accumulate=3", "lean=false"], (5,)),
    "batches_that_grow": (
        ["accumulate={0:1,1:3,2:5}", "optimizer.lr_per=64", "scheduler=cosine", "averaging=ema", "guard=skip"],
        (4, 9, 20),
    ),
    "one_step_an_epoch": (["optimizer=gd"], (10,)),
    "schedule_free": (["optimizer=schedule_free", "norm=batch"], (7, 11)),
    "sam": (["optimizer=sam", "averaging=swa", "norm=batch"], (12, 21)),
    "float64": (["trainer.precision=64-true", "averaging=swa"], (9, 16)),
    "float64_ema": (["trainer.precision=64-true", "averaging=ema"], (9,)),
    "doctor": (["callbacks=doctor", "doctor.every=2", "averaging=ema"], (4, 9)),
    "a_limit_on_steps": (["trainer.max_steps=12", "scheduler=plateau"], (5, 10)),
}


def stopped_and_resumed(lines, folder, batches):
    """Ctrl-C within each of these batches, resumed each time, then to the end."""
    for i, batch in enumerate(batches):
        number = matrix.fit(lines, folder, [matrix.Strike(batch, signal.SIGINT)], resume=i > 0)
        assert number == signal.SIGINT
    assert matrix.fit(lines, folder, resume=True) == 0


@pytest.mark.parametrize("name", thinned(RUNS, 4))
def test_ctrl_c_changes_nothing(name, tmp_path):
    lines, batches = RUNS[name]
    matrix.fit(lines, tmp_path / "whole")
    stopped_and_resumed(lines, tmp_path / "parts", batches)
    assert matrix.difference(matrix.traces(tmp_path / "whole"), matrix.traces(tmp_path / "parts")) == "identical"


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_changes_nothing_for_a_folder_of_images(workers, tmp_path):
    noise = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 4)):
        for i in range(count):
            path = tmp_path / "images" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(torch.randint(0, 256, (3, 8, 8), generator=noise, dtype=torch.uint8), str(path))
    data = ["data=image_folder", f"data.root={tmp_path}/images", "data.batch_size=5"]
    lines = [*data, "data.size=8", f"data.workers={workers}", "augment=flip"]
    matrix.fit(lines, tmp_path / "whole")
    stopped_and_resumed(lines, tmp_path / "parts", (2, 6))
    assert matrix.difference(matrix.traces(tmp_path / "whole"), matrix.traces(tmp_path / "parts")) == "identical"


@pytest.mark.parametrize(
    ("row", "position"),
    thinned(
        [
            ("optimizer=adamw", "inside"),
            ("optimizer=shampoo", "inside"),
            ("scheduler=plateau", "epoch"),
            ("averaging=ema", "window"),
            ("averaging=soup", "inside"),
            ("stopping=early", "inside"),
            ("dropout=stochastic_depth", "inside"),
            ("augment=mixup", "window"),
            ("regularization=max_norm", "inside"),
            ("norm=spectral", "inside"),
            ("norm=weight_standardization", "inside"),
            ("init=rezero", "inside"),
            ("init=fixup", "epoch"),
        ],
        4,
        several=True,
    ),
)
def test_a_kill_changes_nothing(row, position, tmp_path):
    outcome = matrix.try_row(row, position, tmp_path)
    assert outcome == "identical" or outcome.startswith("refused: ")


def test_kills_anywhere_change_nothing():
    runs = list(storm(4))
    assert len(runs) == 4
    assert all(kills for _, _, kills, _ in runs)
    assert {outcome for *_, outcome in runs} == {"identical"}


def test_a_difference_is_seen(tmp_path):
    a = {"last/w": torch.zeros(2), "metrics.csv": "1"}
    assert matrix.difference(a, a | {"last/w": torch.tensor([0.0, 0.5])}) == "differs by 0.5: last/w"
    assert matrix.difference(a, a | {"metrics.csv": "2"}) == "differs: metrics.csv, 1 and 2"
    assert matrix.difference(a, {"last/w": torch.zeros(2)}) == "differs: metrics.csv is in one only"


def test_a_run_that_had_ended_ends_the_same_again(tmp_path):
    lines = ["averaging=ema", "dropout=standard", "norm=batch"]
    matrix.fit(lines, tmp_path / "run")
    before = matrix.traces(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "final.ckpt").unlink()  # as if killed just before it was written
    matrix.fit(lines, tmp_path / "run", resume=True)
    assert matrix.difference(before, matrix.traces(tmp_path / "run")) == "identical"


def test_the_command_resumes_with_the_same_test_result_and_no_double_row(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*matrix.BASE, f"hydra.run.dir={whole}"])
    outcome = matrix.in_child(["checkpoint.every=2"], parts, matrix.Strike(12, signal.SIGKILL))
    assert outcome == "killed"
    (parts / "overrides.txt").write_text("".join(f"{line}\n" for line in matrix.BASE))
    last = parts / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 10  # saved after step 10, killed in step 12
    capsys.readouterr()
    main([f"ckpt={parts}"])
    a, b = (json.loads((f / "summary.json").read_text()) for f in (whole, parts))
    kept = {"status", "test/acc", "test/loss", "val/acc", "val/loss", "val/acc_best", "best_epoch", "steps"}
    assert {k: a[k] for k in kept} == {k: b[k] for k in kept}
    steps = [int(r["step"]) for r in csv.DictReader((parts / "metrics.csv").open())]
    assert steps == list(range(21))


def test_sigterm_is_told_from_ctrl_c(tmp_path):
    strike = matrix.Strike(3, signal.SIGTERM)
    assert matrix.fit([], tmp_path / "run", [strike]) == signal.SIGTERM
    assert not (tmp_path / "run" / "checkpoints" / "final.ckpt").exists()


@pytest.mark.parametrize("name", ["metrics.csv", "git_hash.txt", "checkpoints/final.ckpt", "tensorboard/hparams.yaml"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.mkdir(), "is a folder where a file belongs"),
        (lambda path: path.symlink_to(path.name), "is a link that leads back to itself"),
        (lambda path: path.symlink_to("/etc/hostname"), "is a link that leads outside the run folder"),
    ],
    ids=["folder", "circle", "outside"],
)
def test_a_run_folder_in_which_nothing_could_be_written_is_refused(tmp_path, name, spoil, said):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "kept.txt").touch()
    (tmp_path / "link.txt").symlink_to("kept.txt")
    check_folder(tmp_path)
    spoil(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} {said}"):
        check_folder(tmp_path)
