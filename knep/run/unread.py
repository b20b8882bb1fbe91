"""A run that never reads the test split: what a search looks at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from knep.config.instantiate import instantiate
from knep.config.schema import RunConfig
from knep.engine.build import threads
from knep.engine.evaluate import evaluate, measure
from knep.engine.fit import fit_member
from knep.engine.loops.interrupts import heard
from knep.errors import Interrupted, named
from knep.recipes.recipe import Recipe
from knep.run.run import hush


def validated(
    config: Mapping[str, Any], folder: Path, choices: Mapping[str, str], overrides: list[str]
) -> dict[str, Any]:
    """Trains what `config` says and measures it on the validation split; "sealed" is 0 in what it returns.

    Raises InputError for input that cannot work.
    """
    try:
        with heard():
            return _fit(config, folder)
    except Interrupted:
        return {"status": "interrupted"}


def _fit(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    hush()
    whole = RunConfig.of(config)
    L.seed_everything(config["seed"], verbose=False)
    with threads(config["threads"]):
        members = Recipe.from_config(config).members
        with named("data"):
            data = instantiate(config["data"])
            data.prepare()
        fitted = [
            fit_member(whole, data, folder / f"member_{i}" if members > 1 else folder, config["seed"] + i)
            for i in range(members)
        ]
        modules = [m.module for m in fitted]
        status = "interrupted" if any(m.interrupted for m in fitted) else "finished"
        if whole.task_name != "multiclass":
            measured = measure(modules[0], data.val_dataloader())
            numbers = {f"val/{name}": value for name, value in measured.numbers.items()}
            return {"status": status, **numbers, "steps": fitted[0].steps, "sealed": 0}
        val = evaluate(modules, data.val_dataloader(), data.num_classes, mirrored=config["test_flip"])
    return {
        "status": status,
        "val/acc": val.acc,
        "val/loss": val.loss,
        "steps": sum(m.steps for m in fitted),
        "classes": data.num_classes,
        "sealed": 0,
    }
