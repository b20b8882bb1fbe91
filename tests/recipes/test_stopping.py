"""`stopping`: when training ends, shown on crafted validation curves."""

import tempfile

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from knep.recipes.stopping import Early


class Crafted(L.LightningModule):
    """Logs a given validation curve; its one weight counts the epochs trained."""

    def __init__(self, curve):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.curve = curve

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.weight += 1
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(self.curve[self.current_epoch]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(curve, folder, check_val_every_n_epoch=1, stop=Early, **hp):
    module = Crafted(curve)
    best = ModelCheckpoint(folder, filename="best", monitor="val/loss")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=len(curve),
        callbacks=[stop(**hp), best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=check_val_every_n_epoch,
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(torch.zeros(1, 1))
    trainer.fit(module, loader, loader)
    return trainer.current_epoch, float(module.weight.detach())


def _stops_at_the_exact_epoch():
    with tempfile.TemporaryDirectory() as folder:
        # Best at epoch 3 (index 2); patience 2 is used up by epochs 4 and 5.
        epochs, weight = fit([1.0, 0.5, 0.4, 0.45, 0.41, 0.3, 0.2], folder, patience=2)
    assert epochs == 5
    assert weight == 3.0  # the best epoch's weight, not the last one's


ROWS = {
    "early": _stops_at_the_exact_epoch,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option):
    ROWS[option]()


def test_an_improvement_below_min_delta_does_not_count(tmp_path):
    epochs, weight = fit([1.0, 0.95, 0.92, 0.5, 0.4], tmp_path, patience=2, min_delta=0.1)
    assert epochs == 3
    assert weight == 3.0  # the least loss is still the best checkpoint


def test_it_does_not_stop_while_it_improves(tmp_path):
    assert fit([0.5, 0.4, 0.3, 0.2], tmp_path, patience=1) == (4, 4.0)


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        ({"monitor": "test/loss"}, "validation metric"),
        ({"patience": 0}, "patience"),
        ({"min_delta": -1.0}, "min_delta"),
        ({"mode": "up"}, "mode"),
    ],
)
def test_bad_values_are_refused(hp, message):
    with pytest.raises(ValueError, match=message):
        Early(**hp)


def test_patience_counts_validations(tmp_path):
    curve = [9.0, 1.0, 9.0, 1.5, 9.0, 1.5, 9.0, 1.5, 9.0, 1.5]  # validated in every second epoch: best in the first
    assert fit(curve, tmp_path, patience=2, check_val_every_n_epoch=2) == (6, 2.0)


def test_a_run_that_ends_inside_an_epoch_has_nothing_to_compare(tmp_path):
    module = Crafted([1.0])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=2, callbacks=[Early()], default_root_dir=tmp_path, num_sanity_val_steps=0, **quiet)
    loader = torch.utils.data.DataLoader(torch.zeros(4, 1))
    trainer.fit(module, loader, loader)
    assert trainer.global_step == 2
