"""A trial is the run in small: on a copy, by the recipe's own steps, the same each time."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from knep.config.compose import compose_config
from knep.doctor import diagnose as diagnose_module
from knep.doctor.subject import batches
from knep.doctor.subject import setup as patients
from knep.doctor.trials import budget, examination, remedies, run, treatment
from knep.doctor.trials.examination import Examination
from knep.doctor.trials.scoring import Score, norms_of, settled
from knep.errors import InputError

_LINES = ["recipe=baseline", "data=synthetic", "data.images=400", "data.image_size=8", "model=mlp", "model.widths=[16]"]


def _patient(*more: str) -> patients.Patient:
    lines = [*_LINES, "trainer.precision=32-true", *more]
    return patients.from_config(compose_config(lines).run, lines)


def test_a_trial_leaves_the_patient_alone_and_repeats_itself():
    patient = _patient()
    before = copy.deepcopy(patient.model.state_dict())
    first, second = run.run(patient, 20), run.run(patient, 20)
    assert all(torch.equal(before[k], v) for k, v in patient.model.state_dict().items())
    assert first.losses == second.losses
    assert first.val == second.val
    assert first.losses[-1] < first.losses[0]


def test_a_trial_takes_the_steps_that_training_takes():
    """The losses of the first epoch are those of a hand-written loop over the same batches."""
    patient = _patient("optimizer=sgd", "optimizer.lr=0.1")
    model = copy.deepcopy(patient.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x, y in patient.train[:5]:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(patient.scaling(x)), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert run.run(patient, 5).losses == pytest.approx(losses, rel=1e-5)


def test_of_a_dear_network_fewer_images_and_steps_are_tried():
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3072, 20000), nn.ReLU(), nn.Linear(20000, 10))
    batches = [(torch.randn(128, 3, 32, 32), torch.arange(128) % 10) for _ in range(40)]
    dear = patients.of(wide, batches, batches[:4], optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1), epochs=5)
    less, note = budget.thinned(dear)
    assert budget.steps_of(dear) < 60
    assert budget.steps_of(less) == 60
    assert 16 <= len(less.train[0][0]) < 128
    assert sum(len(y) for _, y in less.val) == 256
    assert torch.equal(less.train[3][0], dear.train[3][0][: len(less.train[3][0])])
    assert f"{len(less.train[0][0])} of the 128 images" in note
    small = _patient()
    assert budget.thinned(small) == (small, "")


def test_the_schedule_runs_through_in_the_steps_of_the_trial():
    rates = run.run(_patient("scheduler=cosine", "scheduler.warmup=0"), 20).rates
    assert rates[0] > 10 * rates[-1]


def test_steps_depend_on_the_model_and_not_on_the_clock():
    small, large = _patient("trainer.max_epochs=500"), _patient("trainer.max_epochs=500", "model.widths=[4096,4096]")
    assert budget.steps_of(small) == 600
    assert 60 <= budget.steps_of(large) < 600
    assert budget.steps_of(_patient("trainer.max_epochs=1")) == 5


def test_a_trial_of_a_large_model_is_followed_by_few_others():
    small, large = _patient(), _patient("model.widths=[8192,8192]")
    assert budget.trials_of(small, 60) == 40
    assert budget.trials_of(large, 60) == 6


def _normed(momentum: float, epochs: int) -> patients.Patient:
    """A net of batch norms whose weights move in every step, so that running statistics are behind."""
    patient = _patient("norm=batch", f"trainer.max_epochs={epochs}", "optimizer=sgd", "optimizer.lr=1.0")
    for m in norms_of(patient.model):
        m.momentum = momentum
    return patient


@pytest.mark.parametrize(("momentum", "epochs", "settles"), [(0.02, 40, True), (0.02, 1, False), (1e-5, 40, False)])
def test_statistics_are_judged_once_the_weights_stand_still_where_the_run_goes_on(momentum, epochs, settles):
    patient = _normed(momentum, epochs)
    seen = run.run(patient, 5)
    assert seen.batch_stats.acc > 0.3
    assert (seen.lag > 0.05) is settles
    fits = seen.train.acc > seen.batch_stats.acc - 0.05
    assert fits is settles


def test_statistics_that_a_model_keeps_still_stay_as_they_are():
    patient = _normed(0.02, 40)
    model = copy.deepcopy(patient.model)
    norm = norms_of(model)[0]
    model.train()
    moved = settled(patient, model)
    norm.eval()
    kept = settled(patient, model)
    mean = [norms_of(m)[0].running_mean for m in (model, moved, kept)]
    assert not torch.equal(mean[0], mean[1])
    assert torch.equal(mean[0], mean[2])


def test_an_exploding_trial_says_so():
    assert run.run(_patient("optimizer=sgd", "optimizer.lr=1e30"), 20).diverged


def test_what_clipping_left_is_measured():
    shares = run.run(_patient("clip=norm", "clip.theta=0.001"), 5).shares
    assert all(0 < s < 0.1 for s in shares)


def test_frozen_weights_in_half_precision_are_counted():
    patient = _patient("optimizer=sgd", "optimizer.lr=1e-4")
    half = replace(patient, model=copy.deepcopy(patient.model).bfloat16(), scaling=_Half(patient.scaling))
    assert run.run(half, 8).frozen_share > 0.9
    assert run.run(patient, 8).frozen_share < 0.5


class _Half(nn.Module):
    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self._before = before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._before(x).bfloat16()


def test_the_rate_of_a_remedy_is_the_configs_own():
    patient = _patient("optimizer=muon", "optimizer.lr=0.02")
    rates = run.run(remedies.rate(10)(patient), 2).rates
    assert max(rates) == pytest.approx(0.2)


def _loaders() -> tuple[list[patients.Batch], list[patients.Batch]]:
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 1, 4, 4, generator=draw), torch.randint(0, 3, (8,), generator=draw)) for _ in range(6)]
    return batches[:4], batches[4:]


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def test_somebody_elses_model_and_optimizer_are_examined_as_they_are():
    model, (train, val) = _net(), _loaders()
    optimizer = torch.optim.SGD(
        [{"params": model[1].parameters(), "lr": 0.5}, {"params": model[3].parameters()}], lr=0.1
    )
    patient = patients.of(model, train, val, optimizer=optimizer)
    made = patient.make_optimizer(copy.deepcopy(model))
    assert [g["lr"] for g in made.param_groups] == [0.5, 0.1]
    assert patient.num_classes == 3
    assert not patient.shuffled
    assert len(run.run(patient, 5).losses) == 5


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (torch.zeros(2, 3), "not (images, labels)"),
        ((torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, dtype=torch.long)), "dense real"),
        ((torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.long)), "dense real"),
        ((torch.zeros(2, 3), torch.rand(2)), "classifiers"),
        ((torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)), "3 labels"),
    ],
)
def test_batches_that_are_no_images_with_classes_are_one_line(batch, what):
    with pytest.raises(InputError) as caught:
        batches.gathered([batch], most=3)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loader_that_never_ends_ends_here():
    def endless():
        while True:
            yield torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long)

    assert len(batches.gathered(endless(), most=10).batches) == 10


def test_an_empty_or_failing_loader_is_one_line():
    def failing():
        raise OSError("disk on fire")
        yield

    with pytest.raises(InputError, match="no batch"):
        patients.of(_net(), [], optimizer=torch.optim.SGD(_net().parameters(), lr=1))
    with pytest.raises(InputError, match="disk on fire"):
        batches.gathered(failing(), most=3)


def test_scores_of_another_shape_are_one_line():
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    train, val = _loaders()
    with pytest.raises(InputError, match="not scores"):
        patients.of(Wrong(), train, val, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1))


@pytest.mark.parametrize(("epochs", "falls", "unfinished"), [(40, True, True), (1, True, False), (40, False, False)])
def test_a_run_that_goes_on_learning_after_its_trial_is_not_judged_by_where_it_stands(epochs, falls, unfinished):
    patient = _patient(f"trainer.max_epochs={epochs}")
    course = run.Trial(losses=[2.3 * (0.9**i if falls else 1.0) for i in range(40)])
    exam = Examination(patient, 40, course, reached=0.5, expected=0.9)
    assert exam.unfinished is unfinished
    assert exam.least("dying_relu") == pytest.approx(0.2 if unfinished else 0.06)


@pytest.mark.parametrize(
    ("later", "excused", "least", "lasts"),
    [(0.89, True, 0.1, 0.06), (0.72, True, 0.1, 0.23), (0.5, False, 0.06, 0.2)],
    ids=["arrives", "nearly", "never"],
)
def test_a_run_far_behind_is_excused_where_a_longer_trial_arrives(later, excused, least, lasts, monkeypatch):
    """Then what a remedy gains is measured there, too: 0.95 against what the run itself reaches."""
    patient = _patient("trainer.max_epochs=40")
    ends = iter([later, 0.95])

    def ended(patient, steps):
        assert steps == 160
        acc = next(ends)
        return run.Trial(train=Score(0.1, acc), curve=[(steps, Score(0.1, acc))])

    monkeypatch.setattr(examination, "run", ended)
    exam = Examination(patient, 40, run.Trial(losses=[0.9**i for i in range(40)]), reached=0.5, expected=0.9, left=9)
    exam.look_ahead()
    assert (exam.later, exam.ahead, exam.left) == (later, 160, 6)
    assert exam.unfinished is excused
    assert exam.least("dying_relu") == pytest.approx(least)
    assert exam.lasting(patient, "dying_relu", "init=he_normal", 0.2) == pytest.approx(lasts)
    assert exam.lasting(patient, "saturation", "init=he_normal", 0.2) == pytest.approx(lasts)  # the same remedy


def test_nobody_looks_ahead_of_a_trial_that_is_near_the_end_or_the_aim(monkeypatch):
    monkeypatch.setattr(examination, "run", None)
    falling = run.Trial(losses=[0.9**i for i in range(40)])
    for epochs, reached in ((1, 0.5), (40, 0.85)):
        exam = Examination(_patient(f"trainer.max_epochs={epochs}"), 40, falling, reached=reached, expected=0.9)
        exam.look_ahead()
        assert exam.later is None


def test_a_waist_of_one_number_is_found_in_a_run_that_goes_on_after_its_trial(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Linear(1, 10))
    lines = ["recipe=baseline", "data=digits", "optimizer.lr=0.01", "trainer.max_epochs=12"]
    monkeypatch.setattr(diagnose_module, "steps_of", lambda patient: 80)
    patient = replace(patients.from_config(compose_config(lines).run, lines), model=net, precision="32-true")
    report = diagnose_module.diagnose(patient)
    assert report.measured["trial"]["ahead"] == patient.total_steps
    assert report.findings[0].disease == "too_little_capacity"


def test_of_two_rates_that_gain_the_same_the_nearer_one_is_prescribed(monkeypatch):
    exam = Examination(_patient("optimizer=sgd"), 5, run.Trial(), reached=0.1, expected=0.9)
    gains = {"rate x 10": 0.1, "rate x 100": 0.8, "rate x 1000": 0.8, "rate x 0.1": 0.3, "rate x 0.01": 0.3}
    monkeypatch.setattr(Examination, "gain", lambda self, patient, disease, what: gains[what])
    assert treatment._best_rate(exam, "lr_too_low", [10.0, 1e3, 1e2]) == (0.8, 100)
    assert treatment._best_rate(exam, "lr_too_high", [0.01, 0.1]) == (0.3, 0.1)


@pytest.mark.parametrize(
    ("accs", "stops", "lucky"),
    [
        ([0.7, 0.8, 0.95, 0.75, 0.8, 0.94, 0.89, 0.93], False, 0.02),
        ([0.7, 0.8, 0.95, 0.75, 0.8, 0.94, 0.93, 0.89], False, 0.0),
        ([0.7, 0.8, 0.95, 0.75, 0.8, 0.94, 0.89, 0.93], True, 0.0),
        ([0.4, 0.56, 0.66, 0.72, 0.79, 0.86, 0.84, 0.89], False, 0.0),
    ],
    ids=["swings and ends high", "swings and ends low", "early stopping keeps the best", "rises"],
)
def test_a_swinging_run_that_happens_to_end_high_is_compared_with_its_mean(accs, stops, lucky):
    y = torch.zeros(400, dtype=torch.long)
    patient = replace(_patient(), val=[(torch.zeros(400, 1, 8, 8), y)], stopping=3 if stops else None)
    course = run.Trial(curve=[(i, Score(0.1, acc)) for i, acc in enumerate(accs)])
    exam = Examination(patient, 8, course, reached=0.95, expected=0.98)
    assert treatment._luck(exam) == pytest.approx(lucky, abs=1e-9)
