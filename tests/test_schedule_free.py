"""A schedule-free run validates, keeps, tests and hands out the average of its path, with batch norm's statistics."""

import copy
import csv

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim.swa_utils import update_bn

from knep.config.compose import compose_config
from knep.config.instantiate import instantiate
from knep.config.schema import RunConfig
from knep.engine.evaluate import evaluate
from knep.engine.fit import fit_member
from knep.engine.load import load_module

LINES = [
    "recipe=none", "scaling=unit", "data=synthetic", "data.image_size=8", "data.images=130", "data.batch_size=10",
    "data.val_share=0.2", "model=mlp", "model.widths=[16,12]", "norm=batch", "dropout=standard", "trainer=cpu",
    "trainer.precision=32-true", "trainer.max_epochs=3", "optimizer=schedule_free", "optimizer.warmup_steps=5",
    "optimizer.lr=0.03", "stopping=early", "threads=1", "progress=false", "checkpoint.every=7",
]  # fmt: skip


@pytest.fixture(scope="module")
def data():
    found = instantiate(compose_config(LINES).config["data"])
    found.prepare()
    return found


class Copied(Callback):
    """Keeps what the run has saved by its 29th step: after the 28th, inside its last epoch of ten."""

    def __init__(self, checkpoints):
        self.checkpoints = checkpoints

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 29:
            (self.checkpoints / "inside.ckpt").write_bytes((self.checkpoints / "last.ckpt").read_bytes())


@pytest.fixture(scope="module", params=["true", "false"], ids=["lean loop", "lightning's loop"])
def run(request, data, tmp_path_factory):
    """A fitted member, its validation losses and its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    config = compose_config([*LINES, f"lean={request.param}"]).config
    member = fit_member(RunConfig.of(config), data, folder, 0, [Copied(folder / "checkpoints")])
    with (folder / "metrics.csv").open() as f:
        losses = [float(row["val/loss"]) for row in csv.DictReader(f) if row["val/loss"]]
    return member, losses, folder / "checkpoints"


def val_loss(module, data):
    return evaluate([module], data.val_dataloader(), data.num_classes).loss


def stored(path):
    return torch.load(path, weights_only=True)


def test_each_checkpoint_holds_what_was_validated(run, data):
    member, losses, checkpoints = run
    assert member.best["val/loss"] == pytest.approx(min(losses), rel=1e-5)
    assert val_loss(load_module(checkpoints / "last.ckpt"), data) == pytest.approx(losses[-1], rel=1e-5)
    for name in ("best.ckpt", "final.ckpt"):  # early stopping goes back to the best
        assert val_loss(load_module(checkpoints / name), data) == pytest.approx(min(losses), rel=1e-5)
    for name in ("best.ckpt", "last.ckpt", "inside.ckpt"):
        groups = stored(checkpoints / name)["optimizer_states"][0]["param_groups"]
        assert not any(group["train_mode"] for group in groups)


def test_a_checkpoint_inside_an_epoch_holds_the_average_beside_the_weights_of_training(run):
    state = stored(run[2] / "inside.ckpt")
    assert state["global_step"] == 28
    y, x = (state[key]["model.classifier.weight"] for key in ("current_model_state", "state_dict"))
    optimizer = state["optimizer_states"][0]
    beta = optimizer["param_groups"][0]["betas"][0]
    z = next(s["z"] for s in optimizer["state"].values() if s["z"].shape == x.shape)
    torch.testing.assert_close(beta * x + (1 - beta) * z, y, rtol=1e-5, atol=1e-7)  # eq. 3 of the paper
    assert not torch.equal(x, y)


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt", "inside.ckpt"])
def test_batch_norm_has_the_statistics_of_the_average(run, data, name):
    module = load_module(run[2] / name)
    again = copy.deepcopy(module)
    for layer in again.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    update_bn((again.scaling(x) for x in data.train_images()), again.model)
    found, want = (next(b for n, b in m.named_buffers() if n.endswith("running_mean")) for m in (module, again))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
