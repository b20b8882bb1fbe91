"""Nets and loaders of other projects: what is odd but sound gets a report, what is broken one line."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import knep
from knep.doctor.diagnose import diagnose
from knep.doctor.findings import Finding
from knep.doctor.model.examine import model_findings
from knep.doctor.model.signal_pass import signals
from knep.doctor.model.unregistered import unregistered
from knep.doctor.subject.objective import check_loss
from knep.doctor.subject.setup import of
from knep.doctor.subject.user_loaders import Loaders
from knep.doctor.trials import run
from knep.doctor.trials.dropout import capped, functional, settings
from knep.doctor.trials.examination import Examination
from knep.doctor.trials.lr_range import memorised
from knep.doctor.trials.run import Trial
from knep.doctor.trials.scoring import Score
from knep.doctor.trials.suspects import suspects
from knep.doctor.trials.verdict import verdict
from knep.errors import InputError
from knep.utils.rng import generator
from tests.doctor.ward import batched, digits, net, patient


class Bag(nn.Module):
    """Indices of words to scores, by their mean embedding, which is also the last layer but one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.again, self.out = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False), nn.Linear(40, 4)
        self.again.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(self.table(x).mean(1)).tanh())


class Keeps(nn.Module):
    """Keeps what its hidden layer gave, as for Grad-CAM."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(64, 32), nn.Linear(32, 10)
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.relu(self.hidden(x.flatten(1)))
        self.seen["hidden"] = [self.last]
        return self.out(self.last)


def adam(lr: float = 3e-3):
    return lambda m: torch.optim.Adam(m.parameters(), lr=lr)


def words(count: int) -> tuple[Tensor, Tensor]:
    """Sentences of 12 words, a third of them from the ten words of their class."""
    draw = generator(count, 3)
    y = torch.randint(4, (count,), generator=draw)
    any_word, own = (torch.randint(n, (count, 12), generator=draw) for n in (40, 10))
    return torch.where(torch.rand(count, 12, generator=draw) < 0.34, 10 * y[:, None] + own, any_word), y


def test_indices_of_words_have_no_size_and_can_be_memorised():
    p = of(Bag(), batched(*words(320), 32), batched(*words(100), 100), optimizer=adam())
    assert model_findings(p, signals(p)) == []
    assert memorised(p) > 0.9


def test_a_model_that_keeps_features_of_its_last_pass():
    x, y, v, w = digits(320)
    model = Keeps()
    F.cross_entropy(model(x[:8]), y[:8]).backward()
    p = of(model, batched(x, y), batched(v, w), optimizer=adam())
    assert model_findings(p, signals(p)) == []
    assert not run.run(p, 5).diverged
    assert model.last.grad_fn is not None


def test_a_model_that_cannot_be_copied_is_one_line():
    x, y, v, w = digits(100)
    model = net(x, 10)
    model.file = open(__file__)  # noqa: SIM115
    with model.file, pytest.raises(InputError, match="cannot be copied"):
        of(model, batched(x, y), batched(v, w), optimizer=adam())


def test_a_last_batch_that_batch_norm_cannot_take_is_one_line():
    x, y, v, w = digits(321)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    with pytest.raises(InputError, match=r"\(1, 1, 8, 8\).*more than 1 value"):
        knep.doctor.examine(model, batched(x, y), batched(v, w), optimizer=adam(), epochs=2)


def test_a_loss_that_fails_is_one_line():
    x, y, v, w = digits(100)
    p = of(net(x, 10), batched(x, y), batched(v, w), optimizer=adam(), loss=nn.BCEWithLogitsLoss())
    with pytest.raises(InputError, match=r"the loss fails on scores \(\d+, 10\)"):
        diagnose(p)


def test_one_score_for_two_classes_is_one_line():
    x, y, v, w = digits(100)
    binary = lambda s, y: F.binary_cross_entropy_with_logits(s[:, 0], y.float())  # noqa: E731
    with pytest.raises(InputError, match="one score"):
        of(net(x, 1), batched(x, y % 2), batched(v, w % 2), optimizer=adam(), loss=binary)


def rows(y: Tensor, classes: int = 10) -> Tensor:
    return F.one_hot(y, classes)


def squared(scores: Tensor, y: Tensor) -> Tensor:
    """The squared error of the probability of class 1, as people write it."""
    return (scores.softmax(1)[:, 1] - y.float()).pow(2).mean()


# Labels as loaders give them, and losses that take them so.
FORMS = {
    "a column": (lambda y: y[:, None], lambda s, y: F.cross_entropy(s, y.squeeze(1))),
    "floats": (lambda y: y.float(), lambda s, y: F.cross_entropy(s, y.long())),
    "a column of floats": (lambda y: y[:, None].float(), lambda s, y: F.cross_entropy(s, y[:, 0].long())),
    "bytes": (lambda y: y.to(torch.uint8), lambda s, y: F.cross_entropy(s, y.long())),
    "rows with a 1": (lambda y: rows(y).float(), None),
    "rows with a 1, each class by itself": (lambda y: rows(y).double(), nn.BCEWithLogitsLoss()),
    "rows with a 1, of booleans": (rows, lambda s, y: F.cross_entropy(s, y.float())),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_sees_labels_as_the_loader_gives_them(form):
    given, loss = FORMS[form]
    x, y, v, w = digits(200)
    seen = []

    def spy(scores: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return (loss or F.cross_entropy)(scores, labels)

    p = of(net(x, 10), batched(x, given(y)), batched(v, given(w)), optimizer=adam(), loss=spy)
    check_loss(p)
    seen.clear()  # of the check, which also tries the other shape
    run.run(p, 3)
    assert torch.equal(torch.cat([b for _, b in p.train]), y)
    assert {(label.dtype, *label.shape[1:]) for label in seen} == {(given(y).dtype, *given(y).shape[1:])}
    assert torch.equal(p.form.of(y), given(y))
    value = p.criterion(torch.eye(10)[y], y)
    assert torch.equal(value, (loss or F.cross_entropy)(torch.eye(10)[y], given(y)))


# What a loader may give, and what the one line says, or the disease that is found.
ODD = {
    "soft labels": (lambda y: 0.9 * rows(y) + 0.01, nn.MSELoss(), None),
    "several tasks": (lambda y: torch.stack([y, y], 1), None, r"the loss fails on an output of float32 \(64, 10\)"),
    "numbers": (lambda y: y + 0.5, None, r"the loss fails on an output of float32 \(64, 10\) and a target of float32"),
    "whole numbers below zero": (lambda y: -y[:, None].float(), None, "broadcast_shapes"),
    "maps": (lambda y: y[:, None, None].expand(-1, 8, 8), None, r"a target of int64 \(64, 8, 8\)"),
    "a column for cross-entropy": (lambda y: y[:, None], None, r"cross-entropy fails on .*\(12, 1\) of torch.int64"),
    "int32 for cross-entropy": (lambda y: y.int(), nn.CrossEntropyLoss(), r"cross-entropy fails on .*torch.int32"),
    "a column for a loss of rows": (lambda y: (y % 2)[:, None], squared, "broadcast_shapes"),
    "rows for a loss of columns": (lambda y: y % 2, lambda s, y: (s[:, 1:2] - y).abs().sum(), "broadcast_shapes"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_labels_are_examined_or_one_line(kind):
    given, loss, said = ODD[kind]
    x, y, v, w = digits(200)
    batches = batched(x, given(y)), batched(v, given(w))
    if said is None or said == "broadcast_shapes":
        report = knep.doctor.examine(net(x, 10), *batches, optimizer=adam(), loss=loss)
        assert [f.disease for f in report.findings[:1]] == ([said] if said else [])
        return
    with pytest.raises(InputError, match=said) as refused:
        knep.doctor.examine(net(x, 10), *batches, optimizer=adam(), loss=loss)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=torch.rand(10)), squared, nn.NLLLoss(reduction="sum")])
def test_a_sound_loss_is_not_said_to_mix_rows(loss):
    x, y, v, w = digits(200)
    check_loss(of(net(x, 10), batched(x, y), batched(v, w), optimizer=adam(), loss=loss))


def test_numbers_beside_a_column_name_both_shapes():
    x, y, v, w = digits(100)
    model = nn.Sequential(net(x, 1), nn.Flatten(0))
    batches = batched(x, y[:, None] / 3, 50), batched(v, w[:, None] / 3, 50)
    report = knep.doctor.examine(model, *batches, optimizer=adam(), loss=nn.MSELoss())
    assert report.findings[0].disease == "broadcast_shapes"
    assert "(12,) for 12 rows and the target is (12, 1)" in report.findings[0].evidence


def test_labels_in_two_forms_are_one_line():
    x, y, v, w = digits(100)
    with pytest.raises(InputError, match=r"two forms: int64 \(N,\) and int64 \(N, 1\)"):
        of(net(x, 10), batched(x, y), batched(v, w[:, None]), optimizer=adam())
    with pytest.raises(InputError, match=r"batch 1 .* int64 \(N, 1\) after int64 \(N,\)"):
        of(net(x, 10), [(x, y), (v, w[:, None])], optimizer=adam())


def test_of_a_single_batch_some_images_are_held_back():
    x, y, *_ = digits(64)
    p = of(net(x, 10), batched(x, y), optimizer=adam())
    assert [len(part[0][1]) for part in (p.train, p.val)] == [57, 7]
    alone = of(net(x, 10), [(x[:1], y[:1])], optimizer=adam())
    assert len(alone.train) == 1
    assert not alone.val


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_value_that_is_not_finite_is_no_spike(value):
    x, y, v, w = (t.clone() for t in digits(200))
    x[70, 0, 3, 3] = value
    report = diagnose(patient(x, y, v, w))
    assert [f.disease for f in report.findings] == ["non_finite_inputs"]


def test_a_model_that_divides_bytes_by_itself_is_judged_behind_that():
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x.float() / 255 - 0.3) / 0.37)

    x, y, v, w = digits(320)
    x, v = ((255 * t).to(torch.uint8) for t in (x, v))
    p = of(Bytes(), batched(x, y), batched(v, w), optimizer=adam())
    assert model_findings(p, signals(p)) == []


def test_wrapped_models_are_examined_as_what_is_inside():
    x, y, v, w = digits(100)
    inner = net(x, 10)
    for model in (nn.DataParallel(inner), torch.compile(inner, backend="eager")):
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        p = of(model, batched(x, y), batched(v, w), optimizer=optimizer)
        assert type(p.model) is nn.Sequential
        assert len(p.make_optimizer(p.model).param_groups[0]["params"]) == 4


def test_a_weighted_or_summed_loss_is_kept():
    x, y, v, w = digits(100)
    for loss in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.rand(10))):
        p = of(net(x, 10), batched(x, y), batched(v, w), optimizer=adam(), loss=loss)
        scores = torch.randn(8, 10)
        assert torch.equal(p.criterion(scores, y[:8]), loss(scores, y[:8]))


def test_a_loss_of_each_image_is_one_line():
    x, y, v, w = digits(100)
    loss = nn.CrossEntropyLoss(reduction="none")
    p = of(net(x, 10), batched(x, y), batched(v, w), optimizer=adam(), loss=loss)
    with pytest.raises(InputError, match=r"gives \(3,\), not a tensor of one"):
        p.criterion(torch.randn(3, 10), y[:3])


class Ends(nn.Module):
    """A model whose scores depend on no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).detach()


def test_a_model_that_no_gradient_reaches_gets_a_report():
    x, y, v, w = digits(100)
    frozen = net(x, 10).requires_grad_(False)
    sgd = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)  # noqa: E731
    for model, disease in ((Ends(), "cut_off"), (frozen, "frozen_parameters")):
        report = knep.doctor.examine(model, batched(x, y), batched(v, w), optimizer=sgd, epochs=1)
        assert report.findings[0].disease == disease


class Calls(nn.Module):
    """Calls dropout as a function, and has it as a setting of its attention."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.enter, self.attend, self.out = (
            nn.Linear(8, 16),
            nn.MultiheadAttention(16, 2, p, batch_first=True),
            nn.Linear(16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.enter(x[:, 0]).relu(), self.p, self.training)
        return self.out(self.attend(h, h, h, need_weights=False)[0].mean(1))


def test_dropout_is_seen_and_taken_away_wherever_it_is():
    x, y, v, w = digits(128)
    p = of(Calls(0.9), batched(x, y), batched(v, w), optimizer=adam())
    assert settings(p.model) == [0.9]
    assert functional(p) == [0.9]
    quiet = capped(0.0)(p).model.train()
    assert torch.equal(quiet(x), quiet(x))
    assert not torch.equal(p.model.train()(x), p.model(x))
    suspect = next(s for s in suspects(p, run.run(p, 5)) if s.finding.disease == "too_much_dropout")
    assert "forward" in suspect.finding.mend
    assert not suspect.finding.prescribed(suspect.ways[0][0]).overrides


def test_a_model_without_parameters_is_one_line():
    x, y, *_ = digits(100)
    with pytest.raises(InputError, match="no parameters"):
        of(nn.Flatten(), batched(x, y), optimizer=adam())


def memorising(images: int, *findings: Finding) -> Examination:
    """A trial that knows all training images and 93 % of so many of validation, whose loss rises."""
    x, y, v, w = digits(100)
    looks = [(10 * i, Score(loss, 0.93)) for i, loss in enumerate((0.5, 0.2, 0.25, 0.3))]
    base = Trial(losses=[0.1] * 40, curve=looks, train=Score(0.01, 1.0))
    return Examination(patient(x, y, v[:images], w[:images]), 40, base, 0.96, 0.95, list(findings))


def test_overfitting_is_more_than_the_chance_of_a_small_validation_split():
    assert "overfitting" in {f.disease for f in verdict(memorising(300), [])}
    assert not verdict(memorising(40), [])


def test_validation_that_is_unfit_says_nothing_of_overfitting():
    shifted = Finding("labels_off_by_one", "one more than in training", 0.9)
    assert verdict(memorising(300, shifted), []) == [shifted]


class Listed(nn.Module):
    """Keeps its hidden layers in a plain list, as a teacher without gradient or as layers to learn."""

    def __init__(self, learns: bool) -> None:
        super().__init__()
        self.layers = [nn.Linear(64, 32).requires_grad_(learns), nn.Linear(32, 32).requires_grad_(learns)]
        self.shift = torch.zeros(32, requires_grad=learns)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.out(x + self.shift)


def test_layers_in_a_plain_list_are_named():
    x, y, v, w = digits(100)
    found = unregistered(of(Listed(True), batched(x, y), batched(v, w), optimizer=adam()))
    assert found[0].disease == "cut_off"
    assert set(found[0].layers) == {"layers[0]", "layers[1]", "shift"}
    assert "ModuleList" in found[0].mend
    assert not unregistered(of(Listed(False), batched(x, y), batched(v, w), optimizer=adam()))
    assert not unregistered(patient(x, y, v, w))


def test_slow_statistics_follow_a_trial_as_far_as_the_run():
    x, y, v, w = digits(64)
    for momentum, expected in ((0.01, 1 - 0.99**8), (0.05, 0.1), (0.3, 0.3), (1e-4, 1 - 0.9999**8)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 10))
        p = of(model, batched(x, y), batched(v, w), optimizer=adam(), epochs=16)
        trained = run.run(p, 2).model
        assert trained is not None
        assert trained.get_submodule("2").momentum == pytest.approx(expected)


class Noisy(Dataset):
    """Images to which Python, NumPy and PyTorch add a number each."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return torch.full((1, 4, 4), index + noise), index % 2


def test_two_examinations_see_the_same_draws_and_chance_goes_on_as_if_there_were_none():
    own = torch.Generator().manual_seed(3)
    loaders = [DataLoader(Noisy(), 8, shuffle=True), DataLoader(Noisy(), 8, shuffle=True, generator=own)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    for loader in loaders:
        seen = []
        for outside, seed in enumerate((0, 0, 1)):
            torch.manual_seed(outside)
            random.seed(outside)
            np.random.seed(outside)
            made = of(model, loader, optimizer=torch.optim.SGD(model.parameters(), 0.1), seed=seed)
            assert made.shuffled
            seen.append(torch.cat([x for x, _ in made.train]))
        assert torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[0], seen[2])
    random.seed(4)
    np.random.seed(4)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), own.get_state()
    of(model, loaders[1], optimizer=torch.optim.SGD(model.parameters(), 0.1))
    after = random.getstate(), np.random.get_state()[1].tolist()
    assert after == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(own.get_state(), states[3])


def shuffled_loaders():
    return DataLoader(Noisy(), 8, shuffle=True), DataLoader(Noisy(), 8)


def test_loaders_by_their_name_give_the_same_batches_each_time(monkeypatch):
    monkeypatch.setitem(sys.modules, "noisy_project", sys.modules[__name__])
    first = Loaders("noisy_project:shuffled_loaders")
    torch.manual_seed(99)
    second = Loaders("noisy_project:shuffled_loaders")
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(first.train_dataloader(), second.train_dataloader(), strict=True)
    )
    assert first.shuffled
