"""A Hydra app of its own that takes its recipe from knep.

python train.py                             # recipe=modern, with this app's own values
python train.py recipe=mine                 # a recipe of this app
python train.py optimizer=sgd               # this app's conf/optimizer/sgd.yaml, which shadows knep's
python train.py -m optimizer=muon,adamw     # a sweep
"""

from __future__ import annotations

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn

from knep.recipes.recipe import Recipe


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float:
    """Trains a small net on two noisy classes; returns the last loss."""
    torch.manual_seed(cfg.seed)
    x = torch.randn(256, cfg.net.inputs)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(cfg.net.inputs, cfg.net.width), nn.ReLU(), nn.Linear(cfg.net.width, 2))

    recipe = Recipe.from_config(cfg)
    recipe.apply(model)
    optimizer = recipe.optimizer(model)
    scheduler = recipe.scheduler(optimizer, total_steps=cfg.steps)
    losses = []
    for _ in range(cfg.steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        recipe.clip(model.parameters())
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    print(f"{type(optimizer).__name__} lr={recipe.lr} loss={losses[-1]:.4f}")
    return losses[-1]


if __name__ == "__main__":
    main()
