"""Every task learns, under plain Lightning and as a run; what does not fit is refused in one line."""

from collections import namedtuple

import lightning as L
import pytest
import torch
import torchmetrics.classification as tc
import torchmetrics.regression as tr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.text import Perplexity

import knep
from knep.errors import InputError
from knep.tasks.base import Weighted, pair
from knep.tasks.binary import Binary, Multilabel
from knep.tasks.classification import Classification
from knep.tasks.regression import Regression
from knep.tasks.segmentation import Segmentation
from knep.tasks.tokens import NextToken, Tagging
from knep.utils.monitors import OF_TASK

QUIET = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "accelerator": "cpu",
    "enable_checkpointing": False,
}
N = 96


class Sequences(nn.Module):
    """Tokens (N, L) to scores (N, L, K) for each by the two before."""

    def __init__(self, vocabulary: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.mix = nn.Conv1d(16, 16, 2)
        self.head = nn.Linear(16, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.pad(self.embedding(ids).transpose(1, 2), (1, 0))
        return self.head(torch.relu(self.mix(x)).transpose(1, 2))


def rows(task: str) -> tuple[Tensor, Tensor, nn.Module, int | None]:
    """x, y, a small net and its width, for each task: something that can be learned."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=draw)
    w = torch.randn(6, 3, generator=draw)

    def net(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))

    if task == "multiclass":
        return x, (x @ w).argmax(1), net(3), 3
    if task == "binary":
        return x, (x @ w[:, 0] > 0).long(), net(1), None
    if task == "multilabel":
        return x, ((x @ w) > 0).float(), net(3), 3
    if task == "regression":
        return x, 1000 + 50 * (x @ w[:, :2]), net(2), 2
    if task == "segmentation":
        images = torch.rand(N, 1, 8, 8, generator=draw)
        y = (images[:, 0] > 0.5).long()
        y[:, 0] = 255
        return images, y, nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)), 2
    start = torch.randint(0, 5, (N, 1), generator=draw)
    ids = (start + torch.arange(9)) % 5
    return (
        ids,
        ids if task == "tokens" else ids % 2,
        Sequences(5, 5 if task == "tokens" else 2),
        5 if task == "tokens" else 2,
    )


def fitted(task: str, epochs: int = 2, **more: object) -> tuple[knep.LitModule, L.Trainer, DataLoader]:
    x, y, net, width = rows(task)
    data = DataLoader(TensorDataset(x, y), 16, shuffle=False)
    torch.manual_seed(0)
    lines = ["optimizer=adamw", "optimizer.lr=0.02"]
    module = knep.LitModule(net, knep.load("none", lines), task, num_classes=width, images=data, **more)
    trainer = L.Trainer(max_epochs=epochs, num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, data, data)
    return module, trainer, data


TASKS = tuple(OF_TASK)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_learns_under_a_plain_trainer_and_logs_its_metrics(task: str) -> None:
    module, trainer, _ = fitted(task, 1)
    first = float(trainer.callback_metrics["val/loss"])
    module, trainer, _ = fitted(task, 6)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert {f"val/{name}" for name in OF_TASK[task].names} | {"train/loss"} <= set(logged)
    assert logged["val/loss"] < 0.9 * first
    assert ("train/acc" in logged) == module.task.counts_right
    assert module.task.primary == (f"val/{OF_TASK[task].primary}", OF_TASK[task].mode)


@torch.no_grad()
def whole_split(task: str, module: knep.LitModule) -> tuple[Tensor, Tensor]:
    x, y, _, _ = rows(task)
    return module.eval()(x), y


@pytest.mark.parametrize("task", TASKS)
def test_metrics_are_torchmetrics_over_the_whole_split(task: str) -> None:
    module, trainer, _ = fitted(task)
    out, y = whole_split(task, module)
    if task == "multiclass":
        wanted = {"acc": tc.MulticlassAccuracy(3, average="micro")(out, y), "loss": nn.functional.cross_entropy(out, y)}
    elif task == "binary":
        out = out[:, 0]
        wanted = {"acc": tc.BinaryAccuracy()(out, y), "auroc": tc.BinaryAUROC()(out, y)}
        wanted["loss"] = nn.functional.binary_cross_entropy_with_logits(out, y.float())
    elif task == "multilabel":
        wanted = {"f1": tc.MultilabelF1Score(3)(out, y.long()), "map": tc.MultilabelAveragePrecision(3)(out, y.long())}
        wanted["loss"] = nn.functional.binary_cross_entropy_with_logits(out, y)
    elif task == "regression":
        own = out * y.std(0, correction=0) + y.mean(0)
        wanted = {"rmse": tr.MeanSquaredError(squared=False)(own, y), "mae": tr.MeanAbsoluteError()(own, y)}
        wanted["r2"] = tr.R2Score()(own, y)
        wanted["loss"] = nn.functional.mse_loss(out, (y - y.mean(0)) / y.std(0, correction=0))
    elif task == "segmentation":
        wanted = {"iou": tc.MulticlassJaccardIndex(2, ignore_index=255)(out, y)}
        wanted["acc"] = tc.MulticlassAccuracy(2, average="micro", ignore_index=255)(out, y)
        wanted["loss"] = nn.functional.cross_entropy(out, y, ignore_index=255)
    else:
        out, y = (out[:, :-1], y[:, 1:]) if task == "tokens" else (out, y)
        wanted = {"acc": tc.MulticlassAccuracy(out.shape[2], average="micro")(out.transpose(1, 2), y)}
        wanted["loss"] = nn.functional.cross_entropy(out.transpose(1, 2), y)
        if task == "tokens":
            wanted["perplexity"] = Perplexity()(out, y)
        else:
            wanted["f1"] = tc.MulticlassF1Score(2)(out.transpose(1, 2), y)
    assert set(wanted) == set(OF_TASK[task].names)
    for name, value in wanted.items():
        assert float(trainer.callback_metrics[f"val/{name}"]) == pytest.approx(float(value), rel=2e-5), name


def test_any_metric_of_torchmetrics_by_its_name_and_several_at_once() -> None:
    asked = ["f1", "auroc", {"name": "fbeta", "beta": 2.0}, "MulticlassMatthewsCorrCoef", "acc"]
    module, trainer, _ = fitted("multiclass", metrics=asked)
    out, y = whole_split("multiclass", module)
    wanted = {
        "f1": tc.MulticlassF1Score(3),
        "auroc": tc.MulticlassAUROC(3),
        "fbeta": tc.MulticlassFBetaScore(2.0, 3),
        "MulticlassMatthewsCorrCoef": tc.MulticlassMatthewsCorrCoef(3),
    }
    for name, metric in wanted.items():
        assert float(trainer.callback_metrics[f"val/{name}"]) == pytest.approx(float(metric(out, y)), rel=1e-5)
    module, trainer, _ = fitted("regression", metrics=["pearson", "mape"])
    out, y = whole_split("regression", module)
    own = out * y.std(0, correction=0) + y.mean(0)
    pearson = tr.PearsonCorrCoef(num_outputs=2)(own, y).mean()
    assert float(trainer.callback_metrics["val/pearson"]) == pytest.approx(float(pearson), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("f2", "there is no metric f2"),
        ("confusion_matrix", "a curve or a table"),
        ("wrong", "write for example"),
        (3, "names no"),
    ],
)
def test_a_metric_that_is_none_is_refused(name: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Classification(3, metrics=[name])  # type: ignore[list-item]
    with pytest.raises(InputError, match="for this task"):
        Regression(metrics=["f1"])


def test_targets_are_standardised_inside_and_measured_in_their_unit() -> None:
    module, trainer, _ = fitted("regression", 8)
    _, y, _, _ = rows("regression")
    assert isinstance(module.task, Regression)
    torch.testing.assert_close(module.task.mean, y.mean(0))
    torch.testing.assert_close(module.task.std, y.std(0, correction=0))
    assert float(trainer.callback_metrics["val/loss"]) < 1
    assert 1 < float(trainer.callback_metrics["val/rmse"]) < 1.2 * float(y.std())
    assert float(module.task.predictions(module(rows("regression")[0])).mean()) == pytest.approx(1000, rel=0.1)
    assert {"task.mean", "task.std"} <= set(module.state_dict())


def test_statistics_keep_their_digits_far_from_zero() -> None:
    y = 1e6 + torch.randn(5000, dtype=torch.float64)
    task = Regression()
    task.fit(y.split(100))
    assert float(task.std) == pytest.approx(float(y.std(correction=0)), rel=1e-5)
    constant = Regression()
    constant.fit([torch.full((10,), 3.0)])
    assert (float(constant.mean), float(constant.std)) == (3, 1)
    with pytest.raises(InputError, match="finite"):
        constant.fit([torch.tensor([1.0, torch.nan])])
    with pytest.raises(InputError, match="num_targets=2"):
        constant.fit([torch.zeros(3, 2)])


F, I64 = torch.float32, torch.int64
WRONG = [
    (Classification(3), (F, 8, 3), (F, 8), "write task=regression"),
    (Classification(3), (F, 8, 4), (I64, 8), r"let the model give \(N, 3\)"),
    (Classification(3), (F, 8, 3), (I64, 8, 5, 5), "write task=segmentation"),
    (Classification(3), (F, 8, 3), (torch.bool, 8, 3), "write task=multilabel"),
    (Classification(3), (F, 8, 3), (I64, 8, 1), r"y\.squeeze\(1\)"),
    (Classification(3), (F, 8, 3), (I64, 8, 3), r"y\.argmax\(1\), or write task=multilabel"),
    (Classification(3), (F, 8, 3), (I64, 8, 5), r"let the model give \(N, 3\)"),
    (Regression(), (F, 8, 1), (I64, 8), r"y\.float\(\), or, .* task=multiclass"),
    (Binary(), (F, 8, 2), (I64, 8), r"let the model give \(N, 1\)"),
    (Multilabel(3), (F, 8, 3), (I64, 8), "write task=multiclass"),
    (Multilabel(3), (F, 8, 2), (F, 8, 2), "task=regression|score for each label"),
    (Regression(), (F, 8, 3), (I64, 8), "write task=multiclass"),
    (Regression(), (F, 8, 3), (F, 8), r"let the model give \(N,\) or \(N, 1\)"),
    (Regression(2), (F, 8), (F, 8, 2), r"let the model give \(N, 2\)"),
    (Segmentation(3), (F, 8, 3, 4, 4), (I64, 8, 8, 8), "of the same size"),
    (Segmentation(3), (F, 8, 3), (I64, 8), "write task=multiclass"),
    (NextToken(5), (F, 8, 5), (I64, 8, 4), "scores for each token"),
    (Tagging(5), (F, 8, 4, 6), (I64, 8, 4), "scores for each token"),
]


@pytest.mark.parametrize(("task", "output", "target", "text"), WRONG)
def test_shapes_that_do_not_fit_are_named_in_one_line(task, output, target, text) -> None:
    out, y = torch.zeros(output[1:], dtype=output[0]), torch.zeros(target[1:], dtype=target[0])
    with pytest.raises(InputError, match=text) as found:
        task.check(out, y)
    said = str(found.value)
    assert "\n" not in said
    assert f"task={task.name}" in said
    assert str(tuple(out.shape)) in said
    assert str(tuple(y.shape)) in said
    with pytest.raises(InputError, match="gives a tuple"):
        task.check((out, out), y)


@pytest.mark.parametrize(
    ("task", "output", "target", "text"),
    [
        (Classification(3), torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "class 3"),
        (Binary(), torch.zeros(4), torch.tensor([0, 1, 2, 1]), "must be 0 or 1"),
        (Multilabel(2), torch.zeros(1, 2), torch.tensor([[0.5, 1.0]]), "must be 0 or 1"),
        (Regression(), torch.zeros(2), torch.tensor([0.5, torch.inf]), "not finite"),
        (Segmentation(2), torch.zeros(1, 2, 1, 2), torch.tensor([[[2, 0]]]), "class 2"),
        (Tagging(2), torch.zeros(1, 2, 2), torch.tensor([[-100, 2]]), "class 2"),
    ],
)
def test_targets_out_of_range_are_refused(task, output, target, text) -> None:
    with pytest.raises(InputError, match=text):
        task.check(output, target)


def test_the_first_batch_is_checked_once(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(Classification, "check", lambda self, output, target: seen.append(target.shape))
    fitted("multiclass")
    assert seen == [(16,)]


def test_a_first_batch_that_does_not_fit_stops_the_fit() -> None:
    x, y, net, _ = rows("multiclass")
    module = knep.LitModule(net, knep.load("none", ["optimizer=adamw"]), "regression")
    with pytest.raises(InputError, match="task=regression: the model gives float32"):
        L.Trainer(max_epochs=1, **QUIET).fit(module, DataLoader(TensorDataset(x, y), 16))


Triple = namedtuple("Triple", ("pixels", "label", "row"))


class Dicts(Dataset):
    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: v[i] for k, v in self.columns.items()}


@pytest.mark.parametrize("kind", ["pixel_values and labels", "named", "fields", "function", "list"])
def test_batches_are_read_as_they_come(kind: str) -> None:
    x, y, net, _ = rows("multiclass")
    more: dict = {}
    if kind == "pixel_values and labels":
        data: Dataset = Dicts(pixel_values=x, labels=y, index=torch.arange(N))
    elif kind == "named":
        data, more = Dicts(a=x, b=y, labels=y), {"batch": ("a", "b")}
    elif kind == "fields":
        data, more = (
            [Triple(a, b, i) for i, (a, b) in enumerate(zip(x, y, strict=True))],
            {"batch": ("pixels", "label")},
        )
    elif kind == "function":
        data, more = TensorDataset(torch.arange(N), y, x), {"batch": lambda b: (b[2], b[1])}
    else:
        data = TensorDataset(x, y)
    loader = DataLoader(data, 16)
    module = knep.LitModule(net, knep.load("none", ["optimizer=adamw"]), num_classes=3, images=loader, **more)
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, loader, loader)
    assert 0 <= float(trainer.callback_metrics["val/acc"]) <= 1


def test_a_batch_that_nobody_can_read_says_what_to_write() -> None:
    for batch, text in (
        (torch.zeros(3), "has no input and target"),
        ({"a": torch.zeros(3), "b": torch.zeros(3)}, "the keys a, b"),
        ({"x": torch.zeros(3), "y": torch.zeros(3), "labels": torch.zeros(3)}, "which are input and target"),
        ((torch.zeros(3, 1), torch.zeros(3), torch.zeros(3, 2)), "weighs its 3 rows"),
    ):
        with pytest.raises(InputError, match=text):
            pair(batch)
    with pytest.raises(InputError, match=r"or batch=\('pixels', 'label'\)"):
        pair(Triple(torch.zeros(3, 1), torch.zeros(3), "name"))
    with pytest.raises(InputError, match="names c"):
        pair({"a": torch.zeros(3)}, ("a", "c"))


def test_rows_weigh_as_they_say() -> None:
    x, y, net, _ = rows("multiclass")
    w = torch.rand(N)
    task = Classification(3)
    split = task.split((x, y, w))
    assert isinstance(split[1], Weighted)
    out = net(x)
    each = nn.functional.cross_entropy(out, y, reduction="none")
    torch.testing.assert_close(task.loss(out, split[1]), (w * each).mean())
    loader = DataLoader(TensorDataset(x, y, w), 16)
    module = knep.LitModule(net, knep.load("none", ["optimizer=adamw"]), num_classes=3, images=loader)
    L.Trainer(max_epochs=1, **QUIET).fit(module, loader, loader)
    masks, ids = Segmentation(2), NextToken(5)
    out, y = torch.randn(4, 2, 3, 3), torch.randint(0, 2, (4, 3, 3))
    y[0, 0], w = 255, torch.rand(4)
    each = nn.functional.cross_entropy(out, y, reduction="none", ignore_index=255).flatten(1).sum(1) / (
        y != 255
    ).flatten(1).sum(1)
    torch.testing.assert_close(masks.loss(out, Weighted(y, w)), (w * each).mean())
    out, y = torch.randn(4, 6, 5), torch.randint(0, 5, (4, 6))
    each = nn.functional.cross_entropy(out[:, :-1].transpose(1, 2), y[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(ids.loss(out, Weighted(y, w)), (w * each).mean())


def test_padding_counts_nowhere() -> None:
    for task, out, y, padding in (
        (Classification(3), torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), -1),
        (Binary(), torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 0]), -1),
        (Multilabel(2), torch.randn(6, 2), torch.tensor([[0, 1]] * 6, dtype=torch.uint8), 255),
        (Regression(2), torch.randn(6, 2), torch.randn(6, 2), torch.nan),
        (Segmentation(2), torch.randn(6, 2, 3, 3), torch.randint(0, 2, (6, 3, 3)), -1),
        (NextToken(4), torch.randn(6, 5, 4), torch.randint(0, 4, (6, 5)), -1),
    ):
        padded = y.clone()
        padded[4:] = padding
        whole, part = task.evaluated(out[:4], y[:4]), task.evaluated(out, padded)
        for a, b in zip(whole, part, strict=True):
            torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double())
        for a, b in zip(task.answers(out[:4], y[:4]), task.answers(out, padded), strict=True):
            torch.testing.assert_close(a, b)


def test_a_loss_of_the_recipe_and_of_the_caller_is_minimised() -> None:
    x, y, net, _ = rows("multiclass")
    recipe = knep.load("none", ["optimizer=adamw", "loss=focal", "loss.class_weight=auto"])
    module = knep.LitModule(net, recipe, num_classes=3, images=[(x, y)])
    counts = torch.bincount(y, minlength=3)
    p = net(x).softmax(1).gather(1, y[:, None])[:, 0]
    wanted = (N / (3 * counts[y]) * (1 - p) ** 2 * -p.log()).mean()
    torch.testing.assert_close(module.task.loss(net(x), y), wanted)
    with pytest.raises(InputError, match="give images="):
        knep.LitModule(net, recipe, num_classes=3)

    def squares(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return nn.functional.mse_loss(output.softmax(1), nn.functional.one_hot(target, 3).float(), reduction=reduction)

    module = knep.LitModule(net, knep.load("none", ["optimizer=adamw"]), num_classes=3, loss=squares)
    torch.testing.assert_close(module.task.loss(net(x), y), squares(net(x), y))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"task": "regresion"}, "there is no task regresion"),
        ({"task": "multiclass"}, "needs num_classes"),
        ({"task": "binary", "num_classes": 2}, "the one score of yes"),
        ({"task": Classification(3), "num_classes": 3}, "give them where it is made"),
        ({"task": "multiclass", "num_classes": 3, "images": []}, "images has no batch"),
        ({"task": "regression", "images": [torch.zeros(2, 6)]}, "inputs alone"),
    ],
)
def test_what_is_missing_is_named(given: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        knep.LitModule(nn.Linear(6, 3), knep.load("none", ["optimizer=adamw"]), **given)


def test_the_recipes_edits_are_made_at_construction_unless_told_otherwise() -> None:
    recipe = knep.load("none", ["init=orthogonal", "dropout=standard"])

    def made(**more: object) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        return knep.LitModule(net, recipe, num_classes=3, sample=torch.randn(4, 6), **more).model

    assert any(isinstance(m, nn.Dropout) for m in made().modules())
    assert not any(isinstance(m, nn.Dropout) for m in made(apply=False).modules())


def test_averaging_and_stopping_come_with_the_module(tmp_path) -> None:
    x, y, net, _ = rows("regression")
    loader = DataLoader(TensorDataset(x, y), 16)
    recipe = knep.load(
        "none", ["averaging=ema", "stopping=early", "stopping.patience=1", "optimizer=adamw", "optimizer.lr=1e-9"]
    )
    module = knep.LitModule(net, recipe, "regression", num_classes=2, images=loader)
    trainer = L.Trainer(max_epochs=20, default_root_dir=tmp_path, **(QUIET | {"enable_checkpointing": True}))
    trainer.fit(module, loader, loader)
    assert {"Ema", "Early", "Best"} <= {type(c).__name__ for c in trainer.callbacks}
    assert trainer.current_epoch <= 20


@pytest.mark.parametrize("task", [Classification(3), Regression(), Binary(), Segmentation(3)], ids=lambda t: t.name)
def test_an_evaluation_weighs_rows_as_training_does(task):
    torch.manual_seed(0)
    weight = torch.tensor([0.0, 1.0, 3.0, 0.5])
    output, target = {
        "multiclass": (torch.randn(4, 3), torch.tensor([0, 1, 2, 1])),
        "regression": (torch.randn(4, 1), torch.randn(4)),
        "binary": (torch.randn(4, 1), torch.tensor([0, 1, 1, 0])),
        "segmentation": (torch.randn(4, 3, 2, 2), torch.randint(0, 3, (4, 2, 2))),
    }[task.name]
    counted = task.evaluated(output, Weighted(target, weight))
    trained = task.loss(output, Weighted(target, weight))
    assert float(counted.loss / counted.rows) == pytest.approx(float(trained), rel=1e-5)
    alike = task.evaluated(output, Weighted(target, torch.ones(4)))
    plain = task.evaluated(output, target)
    assert float(alike.loss) == pytest.approx(float(plain.loss))
    assert float(counted.loss) != pytest.approx(float(plain.loss))
    assert float(counted.correct) == float(plain.correct)


def test_targets_that_are_not_finite_are_counted():
    y = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    with pytest.raises(InputError, match="2 of 4 targets of the training split are not finite"):
        Regression().fit([y[:3], y[3:]])


def test_targets_of_probabilities_are_evaluated_by_rows():
    x, y, net, _ = rows("multiclass")
    onehot = nn.functional.one_hot(y, 3).float()
    data = DataLoader(TensorDataset(x, onehot), 16)
    module = knep.LitModule(net, knep.load("none", ["optimizer=adamw"]), num_classes=3, metrics=["f1"])
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, data, data)
    found = trainer.test(module, data, verbose=False)[0]
    with torch.no_grad():
        out = net(x)
    assert found["test/loss"] == pytest.approx(float(nn.functional.cross_entropy(out, y)), rel=1e-5)
    assert found["test/acc"] == pytest.approx(float((out.argmax(1) == y).float().mean()))
    assert found["test/f1"] == pytest.approx(float(tc.MulticlassF1Score(3)(out, y)))
    weight = torch.rand(N)
    of_rows = module.task.evaluated(out, Weighted(onehot, weight))
    assert float(of_rows.loss) == pytest.approx(float(module.task.evaluated(out, Weighted(y, weight)).loss), rel=1e-5)
    means = out.double().log_softmax(1)
    by_class = float(module.task.evaluated(out, y).loss)
    assert float(module.task.of_probabilities(means, onehot)) == pytest.approx(by_class, rel=1e-5)


@pytest.mark.parametrize("task", ["multiclass", "tagging", "tokens", "segmentation"])
def test_classes_come_in_any_whole_dtype(task):
    x, y, net, width = rows(task)
    y = y.clamp_max(1) if task == "segmentation" else y
    for dtype in (torch.int32, torch.uint8):
        x = x.to(dtype) if task == "tokens" and dtype == torch.int32 else x
        data = DataLoader(TensorDataset(x, x if task == "tokens" else y.to(dtype)), 16)
        module = knep.LitModule(net, knep.load("none", ["optimizer=adamw"]), task, num_classes=width)
        trainer = L.Trainer(max_epochs=1, **QUIET)
        trainer.fit(module, data, data)
        assert "val/loss" in trainer.callback_metrics
