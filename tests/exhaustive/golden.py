"""Losses of 20 steps of each model on fixed data, beside those of tests/golden.

`python -m tests.exhaustive.golden` compares them, `--write` stores them anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from knep.config.schema import DataSpec, RunConfig

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {
    "mlp": [],
    "cnn": [],
    "resnet": ["model.depth=20"],
    "inception": ["model.width=0.25"],
    "torchvision": ["model.name=shufflenet_v2_x0_5", "data.image_size=32"],
    "transformer": ["task=tokens", "scaling=none", "augment=none", "norm=auto", "model.width=32", "model.depth=2"],
    "unet": ["task=segmentation", "augment=none", "model.widths=[8,16]"],
}
STEPS = 20
TOLERANCE = 1e-6


def losses(model: str, overrides: Sequence[str] = ()) -> list[float]:
    """The training losses of `model` under the default recipe's tricks, in float64 on one thread.

    float64, because batch norm on small batches multiplies a difference of rounding: in float32 the losses of a deep
    network depend on the processor's kernels after a few steps (by 0.3), in float64 two layouts agree to 1e-11.
    """
    from knep.config.compose import compose_config
    from knep.config.instantiate import instantiate
    from knep.engine.build import build_module

    torch.set_num_threads(1)
    synthetic = ["data=synthetic", "data.batch_size=32", "data.split_seed=0"]
    size = [] if any("image_size" in o for o in MODELS[model]) else ["data.image_size=8"]
    cfg = compose_config(["recipe=digits_best", f"model={model}", *synthetic, *size, *MODELS[model], *overrides]).config
    data = instantiate(cfg["data"])
    data.prepare()
    module = build_module(RunConfig.of(cfg), DataSpec.of(data), data, seed=0)
    module.model.double()
    module.train()
    optimizer = module.recipe.optimizer(module.model)
    out = []
    batches = list(data.train_dataloader())
    for step in range(STEPS):
        torch.manual_seed(step)
        x, y = module.augment(*batches[step % len(batches)], data.num_classes)
        if model != "transformer":
            x = module.scaling(x).double().to(memory_format=module.layout)
        if data.target == "class":
            loss = F.cross_entropy(module.model(x), y.double() if y.is_floating_point() else y)
        else:
            loss = module.task.loss(module.model(x), y)
        optimizer.zero_grad()
        loss.backward()
        module.recipe.clip([p for p in module.model.parameters() if p.grad is not None])
        optimizer.step()
        out.append(loss.item())
    return out


def difference(model: str) -> float:
    """The largest distance between the stored losses and today's."""
    stored = json.loads((GOLDEN / f"{model}.json").read_text())
    return max(abs(a - b) for a, b in zip(losses(model), stored, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for model in MODELS:
            (GOLDEN / f"{model}.json").write_text(json.dumps([round(x, 9) for x in losses(model)], indent=1) + "\n")
        return
    worst = {model: difference(model) for model in MODELS}
    for model, distance in worst.items():
        print(f"{model:12} {distance:.2e}  {'same' if distance <= TOLERANCE else 'DIFFERS'}")
    raise SystemExit(any(distance > TOLERANCE for distance in worst.values()))


if __name__ == "__main__":
    main()
