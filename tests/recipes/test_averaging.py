"""`averaging`: the averaged weights equal a float64 recomputation and are what is validated, saved and returned."""

import tempfile
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch import nn

from knep.errors import InputError
from knep.optim.own_loop import ema_decay
from knep.recipes.averaging import Ema, Ensemble, GreedySoup, Soup, Swa
from knep.recipes.stopping import Early

BATCHES, EPOCHS = 5, 4


class Net(L.LightningModule):
    """A batch-norm net that keeps its weights after each step and each time it is validated."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.scaling = nn.Identity()
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def on_train_batch_end(self, *_):
        self.trained.append(weights(self.model))

    def validation_step(self, batch, batch_idx):
        self.validated.append(weights(self.model))
        self.log("val/loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def saved_weights(module, path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return torch.cat([state[f"model.{n}"].double().flatten() for n, _ in module.model.named_parameters()])


def data():
    g = torch.Generator().manual_seed(1)
    x = 3 + 2 * torch.randn(BATCHES * 16, 4, generator=g)
    y = (x[:, 0] > 3).long() + (x[:, 1] > 3).long()
    return torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=16)


def fit(callback, folder, callbacks=(), module=None, **more):
    module = module or Net()
    best = ModelCheckpoint(folder, filename="best", monitor="val/loss")
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[callback, *callbacks, best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **{"max_epochs": EPOCHS, **more},
    )
    trainer.fit(module, data(), data())
    return module, trainer, best


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def statistics_are_those_of_the_weights(module):
    """The running statistics are the mean over batches of the batch statistics at these weights."""
    linear, norm = module.model[0], module.model[1]
    outputs = [linear(x).detach().double() for x, _ in data()]
    close(norm.running_mean.double(), torch.stack([o.mean(0) for o in outputs]).mean(0))
    close(norm.running_var.double(), torch.stack([o.var(0) for o in outputs]).mean(0))


def _ema():
    with tempfile.TemporaryDirectory() as folder:
        module, _, best = fit(Ema(decay=0.9, bn_batches=0), folder)
        average, per_epoch = module.trained[0], []
        for n, current in enumerate(module.trained):
            decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0
            average = decay * average + (1 - decay) * current
            if (n + 1) % BATCHES == 0:
                per_epoch.append(average)
        close(weights(module.model), average)
        for epoch, expected in enumerate(per_epoch):
            close(module.validated[epoch * BATCHES], expected)
        epoch = torch.load(best.best_model_path, weights_only=True)["epoch"]
        close(saved_weights(module, best.best_model_path), per_epoch[epoch])
        statistics_are_those_of_the_weights(module)


class Told(Net):
    """A net that says its loss on the validation split, as knep's own do."""

    def __init__(self):
        super().__init__()
        self.tried = []

    def validation_loss(self, trainer):
        self.model.eval()
        with torch.no_grad():
            losses = [F.cross_entropy(self.model(x), y) for x, y in held_out()]
        self.tried.append((weights(self.model), float(torch.stack(losses).mean())))
        return self.tried[-1][1]

    def validation_step(self, batch, batch_idx):
        self.validated.append(weights(self.model))
        self.log("val/loss", F.cross_entropy(self.model(batch[0]), batch[1]))


def held_out():
    """Other labels than those that are trained on, so that the last weights need not be the best."""
    g = torch.Generator().manual_seed(2)
    return [(x, torch.where(torch.rand(len(y), generator=g) < 0.4, 0, y)) for x, y in data()]


def _greedy_soup():
    """Wortsman et al. 2022, recipe 1: the best epoch, and each next one where the mean with it is no worse."""
    with tempfile.TemporaryDirectory() as folder:
        soup = GreedySoup(k=4)
        module, _, _ = fit(soup, folder, module=Told())
        steps = [int(Path(p).stem.removeprefix("soup_")) for _, p in soup.state_dict()["kept"]]
        ends = [module.trained[step - 1] for step in steps]
        kept, best, tried = [ends[0]], module.tried[0][1], module.tried[1:]
        for end, (mixed, loss) in zip(ends[1:], tried, strict=True):
            close(mixed, (sum(kept) + end) / (len(kept) + 1))
            if loss <= best:
                kept, best = [*kept, end], loss
        close(weights(module.model), sum(kept) / len(kept))
        assert soup.count == len(kept)
        assert module.validation_loss(None) == pytest.approx(best, rel=1e-5)


def _swa():
    with tempfile.TemporaryDirectory() as folder:
        module, _, _ = fit(Swa(start=0.5), folder)
        ends = [module.trained[(e + 1) * BATCHES - 1] for e in range(EPOCHS)]
        close(weights(module.model), (ends[2] + ends[3]) / 2)
        close(module.validated[0], ends[0])  # before the average begins, the current weights
        close(module.validated[3 * BATCHES], (ends[2] + ends[3]) / 2)
        statistics_are_those_of_the_weights(module)


def _soup():
    with tempfile.TemporaryDirectory() as folder:
        soup = Soup(k=2)
        module, _, _ = fit(soup, folder)
        assert len(list(Path(folder, "checkpoints").glob("soup_*.pt"))) == 2
        kept = sorted(int(Path(p).stem.removeprefix("soup_")) for _, p in soup.state_dict()["kept"])
        close(weights(module.model), sum(module.trained[step - 1] for step in kept) / 2)
        statistics_are_those_of_the_weights(module)


def _ensemble():
    from knep.engine.evaluate import evaluate

    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2))
    x, y = torch.randn(40, 1, 2, 2), torch.randint(0, 3, (40,))
    result = evaluate([a, b], [(x[:25], y[:25]), (x[25:], y[25:])], 3)
    mean = ((a(x).softmax(1) + b(x).softmax(1)) / 2).detach()
    assert result.acc == pytest.approx((mean.argmax(1) == y).float().mean().item())
    assert result.loss == pytest.approx(-mean[torch.arange(40), y].log().mean().item(), rel=1e-5)
    assert result.member_acc == [pytest.approx((m(x).argmax(1) == y).float().mean().item()) for m in (a, b)]
    assert Ensemble(members=5).members == 5


def averaged_steps(module, first):
    """The mean of the weights after each step from the `first` (from 1) on."""
    return torch.stack(module.trained[first - 1 :]).mean(0)


@pytest.mark.parametrize(
    ("limits", "first", "said"),
    [
        ({"max_epochs": 2}, 8, "3 steps"),  # 10 steps: the last quarter begins after step 7.5
        ({"max_steps": 13}, 10, "4 steps"),
        ({"max_epochs": -1, "max_steps": 17}, 13, "5 steps"),
    ],
)
def test_swa_takes_the_last_part_of_the_run_as_it_is_limited(limits, first, said, tmp_path):
    swa = Swa()
    module, _, _ = fit(swa, tmp_path, **limits)
    close(weights(module.model), averaged_steps(module, first))
    assert swa.said == said


def test_swa_takes_the_last_part_of_the_time(tmp_path, monkeypatch):
    swa = Swa()
    steps = lambda timer, stage=None: float(module_of[0].global_step) if module_of else 0.0  # noqa: E731
    module_of = []
    monkeypatch.setattr(Timer, "time_elapsed", steps)
    monkeypatch.setattr(Net, "on_train_start", lambda self: module_of.append(self), raising=False)
    module, trainer, _ = fit(swa, tmp_path, max_epochs=100, max_time={"seconds": 12})  # a second a step
    assert trainer.global_step == 12
    close(weights(module.model), averaged_steps(module, 9))


def test_an_average_of_nothing_is_said(tmp_path, capsys):
    stop = L.pytorch.callbacks.EarlyStopping("val/loss", patience=1, stopping_threshold=100.0)  # after epoch 1
    swa = Swa(start=0.5)
    fit(swa, tmp_path, callbacks=[stop])
    assert "averaging: nothing" in capsys.readouterr().out
    assert "begins in epoch 3" in swa.said
    soup = Soup(k=2)
    fit(soup, tmp_path, max_steps=3)
    assert "averaging: nothing" in capsys.readouterr().out
    assert "before its first validation" in soup.said


def test_what_early_stopping_goes_back_to_is_said(tmp_path):
    swa = Swa(start=0.5)
    _, _, best = fit(swa, tmp_path, callbacks=[Early()])
    epoch = torch.load(best.best_model_path, weights_only=True)["epoch"]
    assert (swa.count, "nothing" in swa.said) == (max(0, epoch - 1), epoch < 3)


def test_early_stopping_leaves_a_soup(tmp_path):
    soup = Soup(k=2)
    module, _, _ = fit(soup, tmp_path, callbacks=[Early()])
    kept = [int(Path(p).stem.removeprefix("soup_")) for _, p in soup.state_dict()["kept"]]
    close(weights(module.model), sum(module.trained[step - 1] for step in kept) / 2)
    assert soup.said == "2 checkpoints"


@pytest.mark.parametrize("old", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_that_compute_their_weight_are_averaged(old, tmp_path, monkeypatch):
    made = Net.__init__

    def with_old(self):
        made(self)
        self.model[0] = old(self.model[0])

    monkeypatch.setattr(Net, "__init__", with_old)
    module, _, _ = fit(Swa(start=0.5), tmp_path)
    close(weights(module.model), (module.trained[3 * BATCHES - 1] + module.trained[-1]) / 2)
    module.eval()
    module.model(torch.zeros(2, 4))  # the weight is computed from what was averaged


ROWS = {
    "ema": _ema,
    "swa": _swa,
    "soup": _soup,
    "greedy_soup": _greedy_soup,
    "ensemble": _ensemble,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option):
    ROWS[option]()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ema(decay=1.0), "decay"),
        (lambda: Ema(decay=[0.9, 0.9]), "decay"),
        (lambda: Ema(decay=[]), "decay"),
        (lambda: Ema(warmup="slow"), "warmup must be one of ratio, power, none"),
        (lambda: GreedySoup(k=1), "k must"),
        (lambda: Ema(bn_batches=-1), "bn_batches"),
        (lambda: Swa(start=1.0), "start"),
        (lambda: Soup(k=1), "k must"),
        (lambda: Soup(mode="up"), "mode"),
        (lambda: Ensemble(members=1), "members"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Images(L.LightningDataModule):
    """Another project's data: loaders and nothing else."""

    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        return data()


@pytest.mark.parametrize("make", [Ema, lambda: Swa(start=0.5), lambda: Soup(k=2)])
def test_any_datamodule_will_do_and_validating_later_exchanges_nothing(make, tmp_path):
    module = Net()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=EPOCHS, default_root_dir=tmp_path, callbacks=[make()], **quiet)
    trainer.fit(module, datamodule=Images())
    chosen = weights(module.model)
    trainer.validate(module, datamodule=Images(), verbose=False)
    assert torch.equal(module.validated[-1], chosen)
    assert torch.equal(weights(module.model), chosen)


@pytest.mark.parametrize("make", [Ema, lambda: Swa(start=0.25), lambda: Soup(k=2)])
def test_averages_of_float64_weights_are_float64(make, tmp_path):
    callback = make()
    module, _, _ = fit(callback, tmp_path, precision="64-true")
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    average = module.trained[0]
    for n, current in enumerate(module.trained[1:], 1):
        average = average + (1 - min(0.999, (1 + n) / (10 + n))) * (current - average)
    if isinstance(callback, Swa):
        average = torch.stack(module.trained[2 * BATCHES - 1 :: BATCHES]).mean(0)
    if isinstance(callback, Soup):
        steps = [int(Path(p).stem.removeprefix("soup_")) for _, p in callback.state_dict()["kept"]]
        average = torch.stack([module.trained[step - 1] for step in steps]).mean(0)
    torch.testing.assert_close(weights(module.model), average, rtol=1e-13, atol=1e-14)


def test_the_warmups_are_those_of_timm_and_diffusers():
    from timm.utils import ModelEmaV3

    theirs = ModelEmaV3(nn.Linear(1, 1), decay=0.99, use_warmup=True)
    for n in range(1, 2000, 7):
        assert ema_decay(0.99, n, "power") == pytest.approx(theirs.get_decay(n + 1))
        assert ema_decay(0.99, n, "ratio") == pytest.approx(min(0.99, (1 + n) / (10 + n)))
        assert ema_decay(0.99, n, "none") == 0.99


@pytest.mark.parametrize("warmup", ["power", "none"])
def test_a_warmup_is_the_decay_of_each_step(warmup, tmp_path):
    module, _, _ = fit(Ema(decay=0.8, warmup=warmup), tmp_path)
    average = module.trained[0]
    for n, current in enumerate(module.trained[1:], 1):
        decay = 0.8 if warmup == "none" else min(0.8, 1 - (1 + n) ** (-2 / 3))
        average = decay * average + (1 - decay) * current
    close(weights(module.model), average)


def test_of_several_decays_validation_takes_the_best_each_time(tmp_path):
    decays = [0.99, 0.3, 0.8]
    ema = Ema(decay=decays, bn_batches=0)
    module, _, best = fit(ema, tmp_path, module=Told())
    averages = [[module.trained[0]] for _ in decays]
    for n, current in enumerate(module.trained[1:], 1):
        for decay, seen in zip(decays, averages, strict=True):
            d = min(decay, (1 + n) / (10 + n))
            seen.append(d * seen[-1] + (1 - d) * current)
    assert len(module.tried) == len(decays) * EPOCHS
    chosen = 0
    for epoch in range(EPOCHS):
        tried = module.tried[len(decays) * epoch : len(decays) * (epoch + 1)]
        ends = [seen[(epoch + 1) * BATCHES - 1] for seen in averages]
        for (got, _), wanted in zip(tried, ends, strict=True):
            close(got, wanted)
        losses = [loss for _, loss in tried]
        chosen = losses.index(min(losses))
        close(module.validated[epoch * BATCHES], ends[chosen])
    close(weights(module.model), averages[chosen][-1])
    assert ema.said == f"{BATCHES * EPOCHS} steps, of decay {decays[chosen]}, chosen by validation"
    epoch = torch.load(best.best_model_path, weights_only=True)["epoch"]
    assert any(
        torch.allclose(saved_weights(module, best.best_model_path), seen[(epoch + 1) * BATCHES - 1], atol=1e-5)
        for seen in averages
    )


@pytest.mark.parametrize("make", [lambda: Ema(decay=[0.9, 0.99]), GreedySoup])
def test_what_chooses_by_validation_asks_for_it(make, tmp_path):
    with pytest.raises(InputError, match=r"Net has no validation_loss\(trainer\), .*: write averaging"):
        fit(make(), tmp_path)
