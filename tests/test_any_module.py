"""A recipe on LightningModules that know nothing of knep: every slot acts, and says what it did, or is refused."""

import copy
import os
import subprocess
import sys
from collections import deque, namedtuple
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

import knep
from knep.errors import InputError

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def rows(count=64, width=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=generator)
    return x, (x[:, 0] > 0).long()


def loader(batch=16, **how):
    return DataLoader(TensorDataset(*rows()), batch, **how)


def perceptron(norm=False):
    return nn.Sequential(
        nn.Linear(8, 16),
        *([nn.BatchNorm1d(16)] if norm else []),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )


class Own(L.LightningModule):
    """A project's own: its network has a name of its own, and it logs val_loss."""

    def __init__(self, scale=1.0, loss=F.cross_entropy, norm=False):
        super().__init__()
        self.net, self.scale, self.loss = perceptron(norm), scale, loss
        self.norms: list[float] = []
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        x, y = batch[0], batch[1]
        loss = self.scale * self.loss(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen.append(nn.utils.parameters_to_vector(self.net.parameters()).detach().clone())
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))


def fit(module, made, tmp_path, train=None, val=None, epochs=2, **options):
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=made, **{**QUIET, **options})
    trainer.fit(module, train if train is not None else loader(), val if val is not None else loader())
    return trainer


def test_every_step_is_clipped_and_the_share_is_told(tmp_path):
    made = knep.callbacks("none", ["optimizer=sgd", "clip=norm", "clip.theta=0.01"])
    module = Own(scale=100.0)
    fit(module, made, tmp_path)
    assert len(module.norms) == 8
    assert max(module.norms) <= 0.01 * 1.0001
    assert made.effects()["clip"] == "changed the gradient in 100% of 8 steps"


def test_penalty_and_max_norm_act_on_a_loss_that_knows_neither(tmp_path):
    plain, decayed = Own(), Own()
    decayed.load_state_dict(plain.state_dict())
    before = plain.net[0].weight.detach().clone()
    lines = ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=0"]
    made = knep.callbacks("none", [*lines, "regularization=l2", "regularization.strength=0.5"])
    one = {"train": loader(64), "epochs": 1}
    fit(plain, knep.callbacks("none", lines), tmp_path, **one)
    fit(decayed, made, tmp_path, **one)
    torch.testing.assert_close(decayed.net[0].weight, plain.net[0].weight - 0.1 * 0.5 * before)
    assert made.effects()["regularization"] == "penalty in 1 steps"
    bounded = Own()
    made = knep.callbacks("none", [*lines, "regularization=max_norm", "regularization.limit=0.3"])
    fit(bounded, made, tmp_path)
    assert all(float(m.weight.norm(dim=1).max()) <= 0.3001 for m in bounded.net if isinstance(m, nn.Linear))
    assert made.effects()["regularization"] == "weights edited after 8 steps"


@pytest.mark.parametrize("kind", ["ema", "swa", "soup"])
def test_averages_need_no_name_and_statistics_come_from_the_modules_own_step(kind, tmp_path):
    class Counting(Own):
        def __init__(self):
            super().__init__(norm=True)
            self.mean = MeanMetric()
            self.counted: list[float] = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.mean.update(1.0)
            return loss

        def on_train_epoch_end(self):
            self.counted.append(float(self.mean._update_count))
            self.mean.reset()

    lines = ["optimizer=adam", f"averaging={kind}"]
    lines += {"soup": ["averaging.k=2"], "swa": ["averaging.start=0.3"], "ema": ["averaging.decay=0.5"]}[kind]
    made, module = knep.callbacks("none", lines), Counting()
    fit(module, made, tmp_path, epochs=3)
    assert module.counted == [4, 4, 4]  # passes that only estimate are not counted
    assert "validated and ended with the average of" in made.effects()["averaging"]
    norm = module.net[1]
    with torch.no_grad():  # with frozen weights, running statistics are the mean over training batches
        means = torch.stack([module.net[0](x).mean(0) for x, _ in loader()]).mean(0)
    torch.testing.assert_close(norm.running_mean, means, rtol=1e-4, atol=1e-5)


def test_schedule_free_is_evaluated_at_its_average(tmp_path):
    made, module = knep.callbacks("none", ["optimizer=schedule_free", "optimizer.lr=0.1"]), Own()
    at_steps: list[torch.Tensor] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            at_steps.append(nn.utils.parameters_to_vector(pl_module.net.parameters()).detach().clone())

    trainer = fit(module, [*made, Watch(), ModelCheckpoint(save_last=True)], tmp_path, epochs=3)
    assert not any(torch.equal(module.seen[-1], step) for step in at_steps)
    final = nn.utils.parameters_to_vector(module.net.parameters()).detach()
    torch.testing.assert_close(final, module.seen[-1])
    again = Own()
    fresh = L.Trainer(callbacks=knep.callbacks("none", ["optimizer=schedule_free"]), **QUIET, default_root_dir=tmp_path)
    fresh.validate(again, loader(), ckpt_path=trainer.checkpoint_callbacks[-1].last_model_path, verbose=False)
    torch.testing.assert_close(again.seen[-1], final)


def test_stopping_follows_the_name_that_the_module_logs_and_goes_back_to_its_best(tmp_path, capsys):
    made, module = (
        knep.callbacks("none", ["optimizer=sgd", "optimizer.lr=30", "stopping=early", "stopping.patience=1"]),
        Own(),
    )
    trainer = fit(module, made, tmp_path, epochs=30)
    assert trainer.current_epoch < 30
    assert type(trainer.checkpoint_callback).__name__ == "BestFile"  # what ckpt_path="best" means
    best = next(c for c in trainer.checkpoint_callbacks if c.monitor == "val_loss")
    stored = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(stored[name], value) for name, value in module.state_dict().items())
    assert "stopped in epoch" in made.effects()["stopping"]
    assert "val_loss" in made.effects()["stopping"]


def test_any_logged_name_may_be_watched_and_one_that_nobody_logs_is_refused(tmp_path):
    class Spread(Own):
        def validation_step(self, batch, batch_idx):
            self.log("spread", self.net(batch[0]).std())

    fit(Spread(), knep.callbacks("none", ["stopping=early", "stopping.monitor=spread"]), tmp_path)
    with pytest.raises(InputError, match="name one of spread"):
        fit(Spread(), knep.callbacks("none", ["stopping=early"]), tmp_path)
    with pytest.raises(InputError, match="validation metric"):
        knep.callbacks("none", ["stopping=early", "stopping.monitor=test_loss"])


def test_plateau_works_by_itself(tmp_path):
    class Worse(Own):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    made = knep.callbacks("none", ["optimizer=sgd", "optimizer.lr=0.1", "scheduler=plateau", "scheduler.patience=0"])
    fit(Worse(), made, tmp_path, epochs=4)
    assert made.effects()["scheduler"] == "rate 0.1 to 0.009"


def test_the_modules_own_stay_where_the_recipe_says_none(tmp_path):
    class Mine(Own):
        def configure_optimizers(self):
            self.made = torch.optim.Adagrad(self.parameters(), lr=0.5)
            return self.made

    module = Mine()
    made = knep.callbacks("none", ["optimizer=none", "regularization=max_norm", "regularization.limit=0.3"])
    fit(module, made, tmp_path, gradient_clip_val=0.01)
    assert made.effects()["optimizer"] == "Adagrad, 8 steps, of the module itself"
    assert float(module.net[0].weight.norm(dim=1).max()) <= 0.3001
    made = knep.callbacks("none", ["optimizer=none", "scheduler=cosine", "scheduler.warmup=0"])
    fit(module, made, tmp_path)
    assert made.effects()["scheduler"].startswith("rate 0.5 to 0.0")
    with pytest.raises(InputError, match="would both clip"):
        fit(module, knep.callbacks("none", ["clip=norm"]), tmp_path, gradient_clip_val=1.0)


def test_label_smoothing_is_refused_before_the_first_step_or_taken_in_the_loss(tmp_path):
    lines = ["optimizer=sgd", "regularization=label_smoothing"]
    module = Own()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(InputError, match=r"loss = knep.smoothed\(F.cross_entropy, 0.1\)"):
        fit(module, knep.callbacks("none", lines), tmp_path)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    made = knep.callbacks("none", lines)
    fit(Own(loss=knep.smoothed(F.cross_entropy, 0.1)), made, tmp_path)
    assert made.effects()["regularization"] == "smoothed loss in 8 steps"


def test_smoothed_losses_are_their_formula():
    output, target = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    wanted = -(0.9 * F.one_hot(target, 4) + 0.1 / 4).mul(output.log_softmax(1)).sum(1).mean()
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(), lambda o, t: F.cross_entropy(o, t)):
        torch.testing.assert_close(knep.smoothed(loss, 0.1)(output, target), wanted)
    several = torch.randint(0, 2, (6, 4)).double()
    got = knep.smoothed(F.binary_cross_entropy_with_logits, 0.2)(output, several)
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(output, several * 0.8 + 0.1))
    with torch.no_grad():
        torch.testing.assert_close(knep.smoothed(F.cross_entropy, 0.1)(output, target), F.cross_entropy(output, target))


def test_the_whole_of_modern_takes_two_lines(tmp_path):
    module = Own(loss=knep.smoothed(F.cross_entropy, 0.1), norm=True)
    made = knep.callbacks("modern", ["augment=none", "averaging.decay=0.5"], model="net")
    fit(module, made, tmp_path, epochs=4)
    effects = made.effects()
    assert effects["optimizer"].startswith("Muon")
    assert "16 steps" in effects["optimizer"]
    assert effects["scaling"] != "none"
    assert effects["scheduler"] != "none"
    assert "average of" in effects["averaging"]
    x, _ = rows()
    torch.testing.assert_close(module.knep_scaling(x).mean(0), torch.zeros(8), atol=1e-5, rtol=0)


def test_dict_batches_and_loaders_without_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            x, y = rows()
            yield from ({"inputs": a, "labels": b} for a, b in zip(x, y, strict=True))

    class Dicts(Own):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["inputs"], batch["labels"]), batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step((batch["inputs"], batch["labels"]), batch_idx)

    stream = DataLoader(Stream(), 16)
    made = knep.callbacks("none", ["optimizer=adam", "scheduler=cosine", "scaling=standardize", "averaging=ema"])
    fit(Dicts(norm=True), made, tmp_path, train=stream, val=stream, epochs=None, max_steps=8)
    assert "8 steps" in made.effects()["optimizer"]
    with pytest.raises(InputError, match="max_steps=N"):
        fit(Dicts(), knep.callbacks("none", ["scheduler=cosine"]), tmp_path, train=stream, val=stream)


PROCESSES = """
import sys

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

import knep
from tests.test_any_module import QUIET, Own, loader, rows

torch.manual_seed(0)
module = Own(norm=True, loss=knep.smoothed(F.cross_entropy, 0.1))
made = knep.callbacks("modern", ["augment=none", "scaling=none", "averaging.decay=0.5"])
trainer = L.Trainer(max_epochs=2, devices=2, strategy="ddp", callbacks=made, default_root_dir=sys.argv[1], **QUIET)
trainer.fit(module, loader(8), loader(8))
state = torch.cat([value.double().flatten() for value in module.state_dict().values()])
both = [torch.zeros_like(state) for _ in range(2)]
dist.all_gather(both, state)
if trainer.is_global_zero:
    print("equal", torch.equal(*both), made.effects()["optimizer"], made.effects()["averaging"])
"""


def test_two_processes_end_with_one_model(tmp_path):
    (tmp_path / "own.py").write_text(PROCESSES)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "own.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert "equal True Muon, 8 steps validated and ended with the average of 8 steps" in done.stdout, done.stderr


class Adversaries(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        for optimizer, images, sign in ((d, fake.detach(), 1), (g, fake, -1)):
            optimizer.zero_grad()
            self.manual_backward(sign * self.discriminator(images).mean())
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.discriminator.parameters())


def test_several_networks_have_a_recipe_each(tmp_path):
    recipes = {
        "generator": ["none", ["optimizer=adam", "scheduler=linear", "clip=norm", "clip.theta=0.001"]],
        "discriminator": ["none", ["optimizer=sgd", "activation=gelu", "regularization=max_norm"]],
    }
    made, module = knep.callbacks(model=recipes), Adversaries()
    fit(module, made, tmp_path)
    effects = made.effects()
    assert isinstance(module.discriminator[1], nn.GELU)
    assert isinstance(module.generator[1], nn.ReLU)
    assert effects["generator.optimizer"] == "Adam, 8 steps"
    assert effects["generator.scheduler"] != effects["discriminator.scheduler"]
    assert effects["generator.clip"] == "changed the gradient in 100% of 8 steps"
    assert effects["discriminator.regularization"] == "weights edited after 8 steps"


REFUSED = {
    "no such network": (Own, ("none", [], {"model": "backbone"}), 'has no network "backbone": write model="net"'),
    "several networks": (Adversaries, ("none", [], {}), 'acts on, model="generator" or model="discriminator"'),
    "one of two": (Adversaries, ("none", [], {"model": "generator"}), "makes 2 optimizers, and model= names 1"),
    "sam by hand": (Adversaries, ("none", ["optimizer=sam"], {"model": "generator"}), "another optimizer"),
    "an image's noise": (Own, ("none", ["augment=mixup"], {}), "give num_classes="),
    "both accumulate": (Own, ("none", ["accumulate=4"], {}), "contradicts Trainer"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_act_is_refused_before_the_first_step(row, tmp_path):
    kind, (recipe, lines, how), said = REFUSED[row]
    options = {"accumulate_grad_batches": 2} if row == "both accumulate" else {}
    module = kind()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(InputError) as error:
        fit(module, knep.callbacks(recipe, lines, **how), tmp_path, **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert "configure_optimizers" not in module.__dict__  # nothing of the fit is left on the module


def test_a_network_that_is_made_in_configure_model_is_edited_there(tmp_path):
    class Late(Own):
        def __init__(self):
            super().__init__()
            self.made = self.net
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = perceptron()

    module = Late()
    del module.made
    made = knep.callbacks("none", ["activation=gelu", "averaging=ema"])
    fit(module, made, tmp_path)
    assert isinstance(module.net[1], nn.GELU)


def test_a_fit_goes_on_from_its_checkpoint_to_the_same_end(tmp_path):
    lines = ["optimizer=adam", "scheduler=cosine", "averaging=ema", "clip=norm", "stopping=early", "activation=gelu"]

    def run(folder, epochs, ckpt=None):
        torch.manual_seed(0)
        module, made = Own(norm=True), knep.callbacks("none", lines)
        keep = ModelCheckpoint(save_last=True, dirpath=folder)
        trainer = L.Trainer(max_epochs=4, max_steps=epochs, default_root_dir=folder, callbacks=[*made, keep], **QUIET)
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt)
        return module, made, keep

    whole, effects, _ = run(tmp_path / "whole", -1)
    _, _, keep = run(tmp_path / "half", 8)
    # max_steps changed the schedule's length in the half run: only counts and names are compared here
    gone, again, _ = run(tmp_path / "half", -1, keep.last_model_path)
    assert again.effects()["optimizer"] == effects.effects()["optimizer"] == "Adam, 16 steps"
    assert gone.state_dict().keys() == whole.state_dict().keys()


class Scheduled(Own):
    """Sets its own rates, by a schedule that begins low."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        return [optimizer], [{"scheduler": warm, "interval": "step"}]

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(optimizer.param_groups[0]["lr"])


def test_the_modules_own_schedule_stays_as_it_is(tmp_path):
    plain, under = Scheduled(), Scheduled()
    fit(plain, [], tmp_path)
    fit(under, knep.callbacks("none", ["optimizer=none"]), tmp_path)
    assert under.norms == plain.norms
    assert plain.norms[:2] == pytest.approx([0.01, 0.0325])


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_best_checkpoint_is_tested_with_its_average(kind, tmp_path):
    class Tested(Own):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    best, module = ModelCheckpoint(monitor="val_loss", dirpath=tmp_path), Tested()
    made = knep.callbacks("none", ["optimizer=sgd", f"averaging={kind}"])
    trainer = fit(module, [*made, best], tmp_path, epochs=4)
    (found,) = trainer.test(module, loader(), ckpt_path="best", verbose=False)
    assert found["test_loss"] == pytest.approx(float(best.best_model_score), rel=1e-6)


def test_pixels_that_are_scaled_already_are_refused(tmp_path):
    with pytest.raises(InputError, match="scaling=none or scaling=standardize"):
        fit(Own(), knep.callbacks("none", ["scaling=unit"]), tmp_path)


def test_a_refused_fit_leaves_the_network_as_it_came(tmp_path):
    module = Own(norm=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    kinds = [type(m) for m in module.net]
    lines = ["norm=layer", "activation=gelu", "dropout=standard", "init=orthogonal", "scaling=standardize"]
    with pytest.raises(InputError, match="is not logged in validation"):
        fit(module, knep.callbacks("none", [*lines, "stopping=early", "stopping.monitor=nope"]), tmp_path)
    assert [type(m) for m in module.net] == kinds
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    made = knep.callbacks("none", ["norm=layer"])
    fit(module, made, tmp_path)
    assert isinstance(module.net[1], nn.LayerNorm | nn.GroupNorm)


def test_of_several_validation_loaders_each_has_a_name_that_can_stop(tmp_path):
    class Two(Own):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    second = "stopping.monitor=val_loss/dataloader_idx_1"
    made = knep.callbacks("none", ["optimizer=sgd", "stopping=early", second])
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=[*made], max_epochs=2, **QUIET)
    trainer.fit(Two(), loader(), [loader(), loader()])
    assert "best val_loss/dataloader_idx_1" in made.effects()["stopping"]
    made = knep.callbacks("none", ["optimizer=sgd", "stopping=early", "stopping.monitor=val_loss"])
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=[*made], max_epochs=2, **QUIET)
    with pytest.raises(InputError, match=r"name one of .*val_loss/dataloader_idx_1"):
        trainer.fit(Two(), loader(), [loader(), loader()])


def test_another_recipe_on_an_edited_network_is_refused(tmp_path):
    module = Own(norm=True)
    fit(module, knep.callbacks("none", ["activation=gelu"]), tmp_path)
    fit(module, knep.callbacks("none", ["activation=gelu", "optimizer=sgd"]), tmp_path)
    with pytest.raises(InputError, match="edited in an earlier fit by another recipe"):
        fit(module, knep.callbacks("none", ["activation=silu"]), tmp_path)
    assert isinstance(module.net[2], nn.GELU)


def test_networks_are_matched_by_their_parameters(tmp_path):
    recipes = {"discriminator": ["none", ["optimizer=sgd"]], "generator": ["none", ["optimizer=adam"]]}
    made, module = knep.callbacks(model=recipes), Adversaries()
    trainer = fit(module, made, tmp_path)
    generator, discriminator = trainer.optimizers
    assert type(generator).__name__ == "Adam"
    assert {id(p) for g in generator.param_groups for p in g["params"]} == {
        id(p) for p in module.generator.parameters()
    }
    assert made.effects()["discriminator.optimizer"] == "SGD, 8 steps"
    assert type(discriminator).__name__ == "SGD"


def test_a_loss_of_the_recipe_is_refused_beside_ones_own():
    with pytest.raises(InputError, match=r"take knep.recipes.loss.focal there"):
        knep.callbacks("none", ["loss=focal"])


def test_a_leak_is_found_on_the_first_batch(tmp_path):
    class Causal(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Tokens()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[0].flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    tokens = DataLoader(TensorDataset(torch.randint(0, 9, (16, 6))), 8)
    with pytest.raises(InputError, match="norm=layer"):
        fit(Causal(), knep.callbacks("none", ["norm=instance"]), tmp_path, train=tokens, val=[])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm, self.out = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 9)

    def forward(self, tokens):
        return self.out(self.norm(self.words(tokens).cumsum(1)))


def test_an_image_that_would_leave_its_mask_behind_is_refused(tmp_path):
    class Dicts(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 1, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch["image"]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    rows = [{"image": torch.rand(1, 8, 8), "mask": torch.ones(8, 8), "label": 0} for _ in range(8)]
    with pytest.raises(InputError, match="image and not mask"):
        fit(Dicts(), knep.callbacks("none", ["augment=shift"]), tmp_path, train=DataLoader(rows, 4), val=[])


def test_a_thawed_layer_joins_the_recipes_optimizer(tmp_path):
    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-2)

    module = Own()
    before = module.net[0].weight.detach().clone()
    made = knep.callbacks("none", ["optimizer=adam", "scheduler=cosine", "scheduler.warmup=0"])
    trainer = fit(module, [Thaw(), *made], tmp_path, epochs=3)
    assert not torch.equal(module.net[0].weight, before)
    assert len(trainer.optimizers[0].param_groups) == 3


def test_a_checkpoint_of_another_recipe_is_refused_by_its_slot(tmp_path):
    keep = ModelCheckpoint(save_last=True, dirpath=tmp_path)
    fit(Own(), [*knep.callbacks("none", ["optimizer=sgd"]), keep], tmp_path, epochs=1)
    with pytest.raises(InputError, match=r"ckpt_path was trained with optimizer=SGD.* recipe says optimizer=Adam"):
        L.Trainer(max_epochs=2, callbacks=knep.callbacks("none", ["optimizer=adam"]), **QUIET).fit(
            Own(), loader(), loader(), ckpt_path=keep.last_model_path
        )
    plain = ModelCheckpoint(save_last=True, dirpath=tmp_path / "plain")
    fit(Own(), [plain], tmp_path, epochs=1)
    with pytest.raises(InputError, match=r"without knep\.callbacks"):
        L.Trainer(max_epochs=2, callbacks=knep.callbacks("none"), **QUIET).fit(
            Own(), loader(), loader(), ckpt_path=plain.last_model_path
        )


def test_mixed_labels_that_a_step_cannot_read_are_one_line(tmp_path):
    class Hard(Own):
        def training_step(self, batch, batch_idx):
            return F.nll_loss(self.net(batch[0]).log_softmax(1), batch[1])

    with pytest.raises(InputError, match="take a loss and metrics that read them"):
        fit(Hard(), knep.callbacks("none", ["augment=mixup"], num_classes=2), tmp_path)


def test_a_checkpoint_is_tested_in_a_new_process_without_a_sample(tmp_path):
    keep = ModelCheckpoint(save_last=True, dirpath=tmp_path)
    lines = ["scaling=standardize", "norm=layer"]
    module = Own(norm=True)
    fit(module, [*knep.callbacks("none", lines), keep], tmp_path)
    fresh = Own(norm=True)
    trainer = L.Trainer(callbacks=knep.callbacks("none", lines), **QUIET)
    trainer.validate(fresh, loader(), ckpt_path=keep.last_model_path, verbose=False)
    x, _ = rows()
    torch.testing.assert_close(fresh.eval().net(x), module.eval().net(x))


class Falling(Own):
    """Its best epoch is the second."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_loss_of_rise", float(abs(self.current_epoch - 1)))


@pytest.mark.parametrize("averaging", ["none", "ema"])
def test_stopping_goes_back_to_its_best_without_files(averaging, tmp_path):
    lines = ["optimizer=sgd", "optimizer.lr=0.5", "stopping=early", "stopping.patience=2", f"averaging={averaging}"]
    made, module = knep.callbacks("none", [*lines, "stopping.monitor=val_loss_of_rise"]), Falling()
    trainer = fit(module, made, tmp_path, epochs=30, enable_checkpointing=False, num_sanity_val_steps=0)
    assert trainer.current_epoch == 4
    assert not list(tmp_path.rglob("*"))
    per_epoch = len(loader())
    assert not torch.equal(module.seen[per_epoch], module.seen[-1])
    torch.testing.assert_close(
        nn.utils.parameters_to_vector(module.net.parameters()).detach(), module.seen[per_epoch], rtol=0, atol=0
    )
    assert made.effects()["stopping"] == "stopped in epoch 4, back to the best val_loss_of_rise 0"


def test_a_second_fit_keeps_its_own_best_and_a_trainer_that_logs_nothing_is_refused(tmp_path):
    lines = ["optimizer=sgd", "stopping=early"]
    made = knep.callbacks("none", lines)
    with pytest.raises(InputError, match=r"barebones=True\) logs nothing: leave barebones out"):
        L.Trainer(max_epochs=2, barebones=True, callbacks=made, accelerator="cpu").fit(Own(), loader(), loader())
    made = knep.callbacks("none", lines)
    fit(Own(), made, tmp_path, enable_checkpointing=False)
    trainer = fit(Own(), made, tmp_path)
    assert Path(trainer.checkpoint_callback.best_model_path).is_file()
    own = ModelCheckpoint(monitor="train_loss", dirpath=tmp_path / "own")
    assert fit(Own(), [*knep.callbacks("none", lines), own], tmp_path).checkpoint_callback is own


class WithLoss(Own):
    """Its loss is a module of its own."""

    def __init__(self, loss):
        super().__init__()
        self.criterion = loss
        self.loss = lambda output, target: self.criterion(output, target)


def bce(output, target):
    return F.binary_cross_entropy_with_logits(output[:, 0], target.float())


SMOOTHED = {
    "a function": (lambda: Own(), "write loss = knep.smoothed(F.cross_entropy, 0.3) there"),
    "of labels": (lambda: Own(loss=bce), "knep.smoothed(F.binary_cross_entropy_with_logits, 0.3) there"),
    "of numbers": (lambda: Own(loss=lambda o, t: F.mse_loss(o[:, 0], t.float())), "F.mse_loss is a loss of numbers"),
    "a module": (
        lambda: WithLoss(nn.CrossEntropyLoss()),
        "write knep.smoothed(self.criterion, 0.3)(output, labels) in training_step",
    ),
    "smooth already": (
        lambda: WithLoss(nn.CrossEntropyLoss(label_smoothing=0.2)),
        "criterion.label_smoothing=0.2 smooths already: load the recipe with regularization=none",
    ),
    "of nobody's": (lambda: Own(loss=lambda o, t: o.square().mean()), "loss = knep.smoothed(your_loss, 0.3)"),
}


@pytest.mark.parametrize("row", SMOOTHED)
def test_the_line_on_smoothing_names_the_loss_that_the_module_computes(row, tmp_path):
    make, said = SMOOTHED[row]
    lines = ["optimizer=sgd", "regularization=label_smoothing", "regularization.epsilon=0.3"]
    with pytest.raises(InputError) as error:
        fit(make(), knep.callbacks("none", lines), tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_second_networks_smoothing_is_seen_too(tmp_path):
    class Teaches(Adversaries):
        def __init__(self, epsilon):
            super().__init__()
            self.loss = knep.smoothed(F.binary_cross_entropy_with_logits, epsilon)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                score = self.discriminator(self.generator(torch.randn(4, 4)))
                self.manual_backward(self.loss(score, torch.ones_like(score)))
                optimizer.step()

    smooth = ["none", ["optimizer=sgd", "regularization=label_smoothing", "regularization.epsilon=0.2"]]
    recipes = {"generator": ["none", ["optimizer=sgd"]], "discriminator": smooth}
    made = knep.callbacks(model=recipes)
    fit(Teaches(0.2), made, tmp_path)
    assert made.effects()["discriminator.regularization"] == "smoothed loss in 8 steps"
    with pytest.raises(InputError, match=r"knep.smoothed\(F.binary_cross_entropy_with_logits, 0.2\)"):
        fit(Teaches(0.1), knep.callbacks(model=recipes), tmp_path)


class Reads(Own):
    """Reads batches of any kind."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch if isinstance(batch, (tuple, list)) else (batch["x"], batch["y"]), batch_idx)


class Rows:
    """A batch that is an object, as a graph library's."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __getitem__(self, key):
        return getattr(self, key)

    def to(self, *args, **kwargs):
        return self

    def __len__(self):
        return len(self.x)


def of(kind):
    """A loader of four batches, of rows that `kind(x, y)` makes."""
    return DataLoader([kind(x, y) for x, y in loader()], None)


LEFT_OVER = {
    "full batch, no length": (
        lambda: DataLoader(Endless(), 16),
        ["optimizer=gd"],
        {},
        "how long one is: give the Trainer limit_train_batches=N, or choose another optimizer",
    ),
    "a graph's rows": (
        lambda: of(lambda x, y: {"x": x, "y": y, "edge_index": torch.zeros(2, 5, dtype=torch.long)}),
        ["augment=mixup"],
        {"num_classes": 2},
        "edge_index of the batch ties them into a graph: write augment=none",
    ),
    "an object": (
        lambda: of(Rows),
        ["scaling=standardize"],
        {},
        "in a batch of Rows: name it, batch=lambda batch: (batch.x, batch.y), for scaling, or load",
    ),
    "lists": (
        lambda: of(lambda x, y: (list(x), list(y))),
        ["augment=mixup"],
        {},
        "in a batch of 2 parts, the first of which is a list and no tensor: load the recipe with scaling=none",
    ),
    "counts": (loader, ["augment=mixup"], {}, "give num_classes=, targets of floats where they are numbers, or write"),
}


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(*rows(), strict=True)


@pytest.mark.parametrize("row", LEFT_OVER)
def test_each_line_has_its_remedy(row, tmp_path):
    make, lines, how, said = LEFT_OVER[row]
    with pytest.raises(InputError) as error:
        fit(Reads(), knep.callbacks("none", lines, **how), tmp_path, train=make())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_remedies_work(tmp_path):
    made = knep.callbacks("none", ["optimizer=gd"])
    fit(Reads(), made, tmp_path, train=DataLoader(Endless(), 16), limit_train_batches=4)
    assert made.effects()["optimizer"] == "SGD, 2 steps"
    made = knep.callbacks("none", ["scaling=standardize"], batch=lambda batch: (batch.x, batch.y))
    fit(Reads(), made, tmp_path, train=of(Rows), val=[])
    assert made.effects()["scaling"].startswith("standardize")


def test_an_accumulated_batch_of_a_kind_of_its_own_is_weighed_by_its_length(tmp_path):
    lines = ["optimizer=gd", "optimizer.lr=0.1"]
    whole, parts = Reads(), Reads()
    parts.load_state_dict(whole.state_dict())
    x, y = rows()
    uneven = DataLoader([Rows(x[:40], y[:40]), Rows(x[40:], y[40:])], None)
    fit(whole, knep.callbacks("none", lines), tmp_path, train=loader(64), val=[])
    fit(parts, knep.callbacks("none", lines), tmp_path, train=uneven, val=[])
    torch.testing.assert_close(parts.net[0].weight, whole.net[0].weight)


def test_an_average_of_several_networks_says_that_it_is_of_all(tmp_path):
    recipes = {"generator": ["none", ["optimizer=adam", "averaging=ema"]], "discriminator": ["none", ["optimizer=sgd"]]}
    made = knep.callbacks(model=recipes)
    fit(Adversaries(), made, tmp_path)
    assert made.effects()["averaging"].endswith("average of 8 steps, of all networks: generator, discriminator")
    assert "averaging=ema averages all parameters of Adversaries, not one network's" in made[2].said


def test_a_soup_goes_on_where_the_logger_has_another_version(tmp_path, capsys):
    lines = ["optimizer=sgd", "averaging=soup", "averaging.k=3"]

    def run(epochs, ckpt=None):
        logger = CSVLogger(tmp_path)
        keep = ModelCheckpoint(save_last=True)
        made = knep.callbacks("none", lines)
        trainer = fit_on(Own(), [*made, keep], tmp_path, epochs, logger, ckpt)
        return keep, made, Path(trainer.log_dir)

    keep, _, first = run(2)
    _, made, second = run(3, keep.last_model_path)
    assert first != second
    assert len(list((second / "checkpoints").glob("soup_*.pt"))) == 3
    assert "goes on without" not in capsys.readouterr().err
    assert made.effects()["averaging"] == "validated and ended with the average of 3 checkpoints"


def fit_on(module, made, folder, epochs, logger, ckpt):
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=made, **QUIET | {"logger": logger})
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt)
    return trainer


def test_a_scaling_that_no_step_runs_through_is_refused(tmp_path):
    class Parts(Own):
        """Its network is never called as a whole."""

        def training_step(self, batch, batch_idx):
            x = batch[0]
            for layer in self.net:
                x = layer(x)
            return F.cross_entropy(x, batch[1])

    with pytest.raises(InputError, match="scaling= acts in front of net, whose forward training_step does not call"):
        fit(Parts(), knep.callbacks("none", ["scaling=standardize"]), tmp_path)
    recipes = {"generator": ["none", ["optimizer=adam", "scaling=standardize"]], "discriminator": "none"}
    with pytest.raises(InputError, match=r"fitted on the batches' input \(16, 8\), and generator reads \(16, 4\)"):
        fit(Adversaries(), knep.callbacks(model=recipes), tmp_path)


def test_a_target_under_another_name_is_asked_for(tmp_path):
    rows = DataLoader([{"img": torch.rand(1, 8, 8), "cls": 0} for _ in range(8)], 4)
    with pytest.raises(InputError, match=r'name it, batch=\("img", "key of target"\), or write augment=none'):
        fit(Reads(), knep.callbacks("none", ["augment=shift_flip"]), tmp_path, train=rows, val=[])


@pytest.mark.parametrize("lines", [["averaging=ema"], ["optimizer=schedule_free"]])
def test_statistics_leave_what_steps_write_down(lines, tmp_path):
    class Bank(Own):
        """A memory bank: each training step writes the last batch, and where it is, by assignment too."""

        def __init__(self):
            super().__init__(norm=True)
            self.register_buffer("bank", torch.zeros(16, 8))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def training_step(self, batch, batch_idx):
            self.bank[:] = batch[0] * (1 + torch.is_grad_enabled())
            self.count = self.count + 1
            return super().training_step(batch, batch_idx)

    module = Bank()
    fit(module, knep.callbacks("none", lines), tmp_path, epochs=2)
    assert int(module.count) == 8
    torch.testing.assert_close(module.bank, 2 * rows()[0][48:])


def test_a_teacher_that_was_copied_before_the_edits_is_refused_and_one_behind_them_has_them(tmp_path):
    class Teacher(Own):
        def __init__(self, early):
            super().__init__(norm=True)
            if early:
                self.copy()

        def copy(self):
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def configure_model(self):
            if not hasattr(self, "teacher"):
                self.copy()

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), self.teacher(batch[0]) + 1)

    lines = ["activation=gelu", "init=he_normal", "averaging=ema"]
    for path in ("net", ""):
        with pytest.raises(InputError, match=r"make self.teacher in configure_model.* activation=none init=none"):
            fit(Teacher(early=True), knep.callbacks("none", lines, model=path), tmp_path)
    fit(Teacher(early=True), knep.callbacks("none", ["dropout=standard"], model="net"), tmp_path)
    module = Teacher(early=False)
    fit(module, knep.callbacks("none", lines, model="net"), tmp_path)
    assert isinstance(module.teacher[2], nn.GELU)
    assert not torch.equal(module.teacher[0].weight, module.net[0].weight)


class Words(Own):
    """Tokens (N, L) through a sparse embedding."""

    def __init__(self):
        super().__init__(scale=50.0)
        self.net = nn.Sequential(nn.EmbeddingBag(8, 6, sparse=True), nn.Linear(6, 2))

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].abs().long() % 8, batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch[0].abs().long() % 8, batch[1]), batch_idx)


class Waves(Own):
    """A complex layer in front."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 6, dtype=torch.complex64), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.first(x.to(torch.complex64)).abs())

    def __init__(self):
        super().__init__(scale=50.0)
        self.net = self.Net()


@pytest.mark.parametrize("kind", [Words, Waves])
def test_sparse_and_complex_gradients_are_stepped_or_refused(kind, tmp_path):
    module = kind()
    before = [p.detach().clone() for p in module.net.parameters()]
    made = knep.callbacks("none", ["optimizer=sgd", "clip=norm", "clip.theta=0.01", "regularization=l2"])
    fit(module, made, tmp_path)
    assert max(module.norms) <= 0.01 * 1.0001
    assert made.effects()["clip"] == "changed the gradient in 100% of 8 steps"
    assert not any(torch.equal(p, was) for p, was in zip(module.net.parameters(), before, strict=True))
    assert not module.trainer.optimizers[0].defaults["fused"]
    what = "sparse gradients of 0.weight" if kind is Words else "complex gradients of first.weight"
    for line in ("clip=value", *(["optimizer=adamw", "optimizer=muon", "clip=adaptive"] if kind is Words else [])):
        start = ["optimizer=sgd"] if line.startswith("clip") else []
        module = kind()
        with pytest.raises(InputError, match=f"^{line} cannot (step|edit) the {what}: "):
            fit(module, knep.callbacks("none", [*start, line]), tmp_path)
        assert not module.norms
    with pytest.raises(InputError, match="clip=value cannot edit"):
        fit(kind(), knep.callbacks("none", ["optimizer=none", "clip=value"]), tmp_path)


def test_lazy_layers_take_their_sizes_from_the_data(tmp_path):
    def lazy(**how):
        module = Own()
        module.net = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))
        made = knep.callbacks("none", ["norm=group", "init=he_normal", "averaging=ema"], **how)
        fit(module, made, tmp_path)
        return module

    for how in ({}, {"sample": torch.randn(4, 8)}, {"sample": rows(4)}):
        assert [type(m).__name__ for m in lazy(**how).net] == ["Linear", "GroupNorm", "ReLU", "Linear"]
    with pytest.raises(InputError, match=r"net\.0\.weight is of a lazy layer.* sample=x"):
        lazy(forward=None, batch=lambda batch: ("no tensor", batch[1]))


def test_batches_with_names_and_several_loaders_say_how_they_are_read(tmp_path):
    Batch = namedtuple("Batch", ("pixels", "label", "meta"))

    class Named(Own):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch.pixels.clone())
            return super().training_step((batch.pixels, batch.label), batch_idx)

    def named(parts):
        return Batch(torch.stack([x for x, _ in parts]), torch.stack([y for _, y in parts]), ["file"] * len(parts))

    lines = ["augment=mixup", "scaling=standardize"]
    module = Named(loss=lambda out, y: F.cross_entropy(out, y))
    made = knep.callbacks("none", lines, batch=("pixels", "label"), sample=rows(8), num_classes=2)
    fit(module, made, tmp_path, train=loader(collate_fn=named), val=[])
    assert made.effects()["augment"] == "8 batches"
    assert not torch.equal(module.seen[0], rows()[0][:16])
    wrong = knep.callbacks("none", lines, batch=("picture", "label"), num_classes=2)
    with pytest.raises(InputError, match=r"has no 'picture', it has the fields pixels, label, meta"):
        fit(Named(), wrong, tmp_path, train=loader(collate_fn=named), val=[])

    class Two(Own):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    both = {"a": loader(), "b": loader()}
    with pytest.raises(InputError, match=r'the keys a, b: name the batch to read, batch=lambda b: b\["a"\]'):
        fit(Two(), knep.callbacks("none", ["scaling=standardize"]), tmp_path, train=both)
    made = knep.callbacks("none", ["scaling=standardize"], batch=lambda b: b["a"])
    module = Two()
    fit(module, made, tmp_path, train=both)
    torch.testing.assert_close(module.knep_scaling(rows()[0]).mean(), torch.zeros(()), atol=1e-5, rtol=0)


def test_a_weight_that_a_hook_computes_is_left(tmp_path):
    module = Own()
    with pytest.warns(FutureWarning, match="weight_norm"):
        module.net[0] = nn.utils.weight_norm(module.net[0])
    made = knep.callbacks("none", ["norm=weight"])
    fit(module, made, tmp_path)
    assert made.effects()["norm"].endswith("; 1 kept")
    assert "hook computes it" in module.net._knep["report"].changes["norm"][-1].after


class ByHand(Own):
    """Steps its optimizer several times a batch, or only on some batches."""

    def __init__(self, times):
        super().__init__()
        self.automatic_optimization, self.times = False, times

    def training_step(self, batch, batch_idx):
        optimizer: Any = self.optimizers()
        for _ in range(self.times[batch_idx % len(self.times)]):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()


@pytest.mark.parametrize(("times", "steps"), [((3,), 24), ((1, 0), 4)])
def test_a_schedule_that_is_too_short_or_too_long_says_so(times, steps, tmp_path):
    lines = ["optimizer=sgd", "optimizer.lr=0.1", "scheduler=cosine", "scheduler.warmup=0"]
    made = knep.callbacks("none", lines)
    fit(ByHand(times), made, tmp_path)
    assert made.effects()["scheduler"].endswith(f", made for 8 steps and not {steps}")
    said = [line for line in made[2].said if "the schedule was made for 8 steps" in line]
    assert len(said) == 1
    assert "max_steps=" in said[0]
    made = knep.callbacks("none", lines)
    fit(ByHand(times), made, tmp_path, max_steps=steps)
    assert not [line for line in made[2].said if "schedule" in line]
    assert "made for" not in made.effects()["scheduler"]


def test_schedules_know_plans_of_accumulation_and_ask_for_the_length_of_loaders_that_change(tmp_path):
    lines = ["optimizer=sgd", "optimizer.lr=0.1"]
    cosine = [*lines, "scheduler=cosine", "scheduler.warmup=0"]
    plan = GradientAccumulationScheduler({0: 4, 1: 1})
    made = knep.callbacks("none", cosine)
    trainer = fit(Own(), [*made, plan], tmp_path, epochs=3)
    assert made.effects()["optimizer"] == "SGD, 9 steps"
    assert "made for" not in made.effects()["scheduler"]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match="GradientAccumulationScheduler changes how many"):
        fit(Own(), [*knep.callbacks("none", [*lines, "scheduler=exponential"]), plan], tmp_path)
    with pytest.raises(InputError, match=r"reload_dataloaders_every_n_epochs=1 may change it: give .* max_steps=N"):
        fit(Own(), knep.callbacks("none", cosine), tmp_path, reload_dataloaders_every_n_epochs=1)

    class Growing(L.LightningDataModule):
        count = 0

        def train_dataloader(self):
            self.count += 1
            return DataLoader(TensorDataset(*rows(16 * 2**self.count)), 16)

    made = knep.callbacks("none", cosine)
    how: dict[str, Any] = {**QUIET, "max_epochs": 3, "max_steps": 14, "reload_dataloaders_every_n_epochs": 1}
    trainer = L.Trainer(callbacks=made, default_root_dir=tmp_path, **how)
    trainer.fit(Own(), datamodule=Growing())
    assert made.effects()["optimizer"] == "SGD, 14 steps"
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


DOUBLES = {
    "swa": (lambda: StochasticWeightAveraging(0.05), ["scheduler=cosine"], "averaging=swa, or .* scheduler=none"),
    "swa, ema": (lambda: StochasticWeightAveraging(0.05), ["averaging=ema"], "averages beside averaging=ema"),
    "ema, ema": (EMAWeightAveraging, ["averaging=ema"], "EMAWeightAveraging and .* averaging=ema would both"),
}


@pytest.mark.parametrize("row", DOUBLES)
def test_a_slot_that_another_callback_takes_is_refused(row, tmp_path):
    other, lines, said = DOUBLES[row]
    made = knep.callbacks("none", ["optimizer=sgd", *lines])
    with pytest.raises(InputError, match=said):
        fit(Own(), [*made, other()], tmp_path)
    recipe = knep.load("none", ["optimizer=sgd", *lines])
    with pytest.raises(InputError, match=said):
        fit(knep.LitModule(perceptron(), recipe, num_classes=2), [other()], tmp_path)
    fit(Own(), [*knep.callbacks("none", ["optimizer=sgd"]), other()], tmp_path)


def test_statistics_leave_lists_counters_and_queues_of_a_module(tmp_path):
    class Counts(Own):
        def __init__(self):
            super().__init__(norm=True)
            self.calls, self.rows, self.queue, self.by_class = 0, [], deque(maxlen=3), {}

        def training_step(self, batch, batch_idx):
            self.calls += 1
            self.rows.append(batch[0][:2])  # tensors, which no comparison by value may meet
            self.queue.append(batch_idx if torch.is_grad_enabled() else -1)
            self.by_class[self.calls] = float(batch[1].sum())
            if not torch.is_grad_enabled():
                self.estimated = True
            return super().training_step(batch, batch_idx)

    module = Counts()
    kept = module.rows
    fit(module, knep.callbacks("none", ["averaging=ema"]), tmp_path)
    assert (module.calls, len(module.rows), len(module.by_class)) == (8, 8, 8)
    assert list(module.queue) == [1, 2, 3]
    assert module.rows is kept
    assert not hasattr(module, "estimated")
    assert int(module.net[1].num_batches_tracked) == 4  # they were estimated
