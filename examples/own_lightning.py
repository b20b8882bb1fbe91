"""A recipe on your model and your DataLoaders, trained by Lightning. `python examples/own_lightning.py`"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import lightning as L
import torch
from data import digits
from torch import nn
from torch.utils.data import DataLoader

import knep


def main() -> float:
    """Trains with averaging, early stopping and clipping from the recipe; returns the validation accuracy."""
    L.seed_everything(0, verbose=False)
    train, val = digits()
    train_loader = DataLoader(train, batch_size=50, shuffle=True)
    val_loader = DataLoader(val, batch_size=100)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))

    recipe = knep.load("modern", overrides=["augment=none", "averaging.decay=0.9"])
    recipe.dry_run(model)
    module = knep.LitModule(model, recipe, "multiclass", num_classes=10, images=train_loader)
    with TemporaryDirectory() as folder:  # for the checkpoints; a project of yours has a place for them
        trainer = L.Trainer(max_epochs=8, default_root_dir=folder, accelerator="cpu", logger=False)
        trainer.fit(module, train_loader, val_loader)

    # The module holds the averaged weights of the best epoch now, and its scaling: it reads raw images.
    x, y = val.tensors
    with torch.no_grad():
        accuracy = (module.eval()(x).argmax(1) == y).float().mean().item()
    print(f"validation accuracy of the best epoch's averaged weights: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
