"""Fine-tuning: a new head, first alone, then the whole net with smaller rates towards its input.

`python examples/finetune.py`. Give `weights="DEFAULT"` to `resnet18` for a pretrained net; this example downloads
nothing and starts from random weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import digits
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

import knep
from knep.recipes.recipe import Recipe


def epoch(model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, loader: DataLoader) -> float:
    """One pass over the loader; returns the mean loss. Images reach the net in three channels, 0..1."""
    total = 0.0
    for x, y in loader:
        loss = F.cross_entropy(model(x.expand(-1, 3, -1, -1) / 255), y)
        optimizer.zero_grad()
        loss.backward()
        recipe.clip(model.parameters())
        optimizer.step()
        total += loss.item()
    return total / len(loader)


def main() -> list[float]:
    """Returns the loss of each epoch: one with the head alone, two with everything."""
    torch.manual_seed(0)
    train, _ = digits(train=200)
    loader = DataLoader(train, batch_size=50, shuffle=True)
    model = resnet18(weights=None)
    model.fc = nn.Linear(model.fc.in_features, 10)

    # init=none keeps the weights that were learned before; layer_decay gives each layer 0.8 of the next one's rate.
    recipe = knep.load("none", overrides=["init=none", "optimizer=adamw", "optimizer.lr=1e-3", "clip=norm"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("fc.")
    losses = [epoch(model, recipe, recipe.optimizer(model), loader)]

    for parameter in model.parameters():
        parameter.requires_grad = True
    recipe = knep.load("none", overrides=["init=none", "optimizer=adamw", "layer_decay=0.8", "clip=norm"])
    optimizer = recipe.optimizer(model)
    for group in optimizer.param_groups[::10]:
        print(f"{group['name']}: lr {group['lr']:.2e}, {len(group['params'])} tensors")
    losses += [epoch(model, recipe, optimizer, loader) for _ in range(2)]
    print("loss of each epoch:", ", ".join(f"{loss:.3f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()
