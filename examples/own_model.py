"""A recipe in a training loop of your own: plain torch, no Trainer, no config files. `python examples/own_model.py`"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import digits
from torch import nn
from torch.utils.data import DataLoader

import knep

EPOCHS = 4


def build() -> nn.Module:
    """Any nn.Module will do; this one knows nothing of knep."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def main() -> float:
    """Trains for a few epochs; returns the validation accuracy."""
    torch.manual_seed(0)
    train, val = digits()
    loader = DataLoader(train, batch_size=50, shuffle=True)
    recipe = knep.load("modern", overrides=["norm=group", "augment=shift", "augment.pixels=1"])

    scaling = recipe.scaling(x for x, _ in loader)
    model = build()
    report = recipe.apply(model, sample=scaling(next(iter(loader))[0]))
    print(report)

    optimizer = recipe.optimizer(model)
    scheduler = recipe.scheduler(optimizer, total_steps=EPOCHS * len(loader), steps_per_epoch=len(loader))
    smoothing = recipe.regularization.label_smoothing
    for epoch in range(EPOCHS):
        losses, norms = [], []
        model.train()
        for x, y in loader:
            x, y = recipe.augment(x, y, 10)
            loss = F.cross_entropy(model(scaling(x)), y, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            norms.append(recipe.clip(model.parameters()).item())
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"epoch {epoch}: loss {mean:.3f}, longest gradient before clipping {max(norms):.2f}")

    model.eval()
    with torch.no_grad():
        x, y = val.tensors
        accuracy = (model(scaling(x)).argmax(1) == y).float().mean().item()
    print(f"validation accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
