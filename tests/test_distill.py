"""distill.teacher: the loss of Hinton et al. 2015, a teacher that is checked, and a student that learns from it."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from knep.config.compose import compose_config
from knep.config.schema import config_hash
from knep.engine.distill import Teacher, distilled
from knep.errors import InputError
from knep.run.run import run

LINES = ["data=digits", "recipe=none", "model=mlp", "model.widths=[16]", "scaling=unit", "threads=1", "progress=false"]
LINES += ["optimizer=adamw", "optimizer.lr=0.01"]


def trained(folder, *lines):
    made = compose_config([*LINES, *lines])
    return run(made.config, folder, made.choices, made.overrides, figures=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    summary = trained(folder, "model.widths=[64]", "trainer.max_epochs=6")
    assert summary["val/acc"] > 0.8
    return folder


def test_the_loss_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    student, teach, t, alpha = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), 3.0, 0.7
    p = softmax(teach / t, 1)
    kl = (p * (np.log(p) - log_softmax(student / t, 1))).sum(1).mean()
    found = distilled(torch.tensor(1.25), torch.tensor(student), torch.tensor(p), alpha, t)
    assert float(found) == pytest.approx(0.3 * 1.25 + 0.7 * 9 * kl, rel=1e-6)


def test_several_teachers_are_their_mean_and_learn_nothing():
    nets = [torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)]
    made = Teacher(nets, 0.5, 2.0)
    x = torch.randn(6, 4)
    wanted = torch.stack([(net(x) / 2).softmax(1) for net in nets]).mean(0)
    assert torch.allclose(made.probabilities(x), wanted)
    assert not any(p.requires_grad for net in nets for p in net.parameters())


def test_a_student_follows_its_teacher_without_a_label(teacher, tmp_path, capsys):
    lines = ["trainer.max_epochs=6", f"distill.teacher={teacher}", "distill.alpha=1.0"]
    summary = trained(tmp_path / "student", *lines)
    assert summary["val/acc"] > 0.7
    assert "1 model(s), 9" in capsys.readouterr().out
    weights = torch.load(tmp_path / "student" / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
    assert sum(t.numel() for name, t in weights.items() if name.startswith("model.")) < 64 * 64


def test_the_teacher_changes_the_step(teacher, tmp_path):
    alone = trained(tmp_path / "alone", "trainer.max_epochs=1")
    taught = trained(tmp_path / "taught", "trainer.max_epochs=1", f"distill.teacher={teacher}")
    assert alone["val/loss"] != taught["val/loss"]
    assert alone["config_hash"] != taught["config_hash"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["data=synthetic"], "learned 10 classes"),
        (["distill.alpha=0"], r"must be in \(0, 1\]"),
        (["distill.temperature=-1"], r"must be in \(0, inf\)"),
        (["task=multilabel"], "task="),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(lines, said, teacher, tmp_path):
    with pytest.raises(InputError, match=said):
        trained(tmp_path / "run", f"distill.teacher={teacher}", *lines)


def test_a_teacher_that_only_guesses_is_refused(tmp_path):
    trained(tmp_path / "bad", "trainer.max_epochs=1", "optimizer=none", "optimizer.lr=1.0")
    with pytest.raises(InputError, match="not surely more than its commonest class"):
        trained(tmp_path / "run", f"distill.teacher={tmp_path / 'bad'}")


def test_values_without_a_teacher_are_refused():
    with pytest.raises(InputError, match=r"asks for distill\.teacher=outputs/<run>"):
        compose_config(["distill.alpha=0.9"])


def test_runs_without_a_teacher_keep_their_hash():
    made = compose_config([]).config
    assert config_hash({k: v for k, v in made.items() if k != "distill"}) == config_hash(made)
