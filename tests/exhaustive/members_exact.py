"""Every option of every slot on every model: members in one pass against members in turn, 20 steps in float64.

`python -m tests.exhaustive.members_exact [MODEL ...]` prints what differs by more than 1e-5, what is refused, and the
counts. That members in turn are single runs to the bit is tested in tests/test_members.py, for a recipe of each model.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import yaml

from knep.config.catalog import CONF, options
from knep.config.compose import compose_config
from knep.config.instantiate import instantiate
from knep.config.schema import RunConfig
from knep.ensemble import members_of, supports
from knep.ensemble.loop import fit
from knep.errors import InputError

BAR = 1e-5
TINY = [
    "recipe=none", "scaling=unit", "optimizer=momentum", "data=synthetic", "data.image_size=8", "data.images=130",
    "data.batch_size=10", "data.val_share=0.2", "trainer=cpu", "trainer.precision=64-true", "trainer.max_epochs=2",
    "threads=1", "progress=false", "lean=false",
]  # fmt: skip
MODELS = {
    "mlp": ["model=mlp", "model.widths=[16,12]"],
    "cnn": ["model=cnn", "model.widths=[4,6]"],
    "resnet": ["model=resnet", "model.width=0.25", "norm=batch"],
    "inception": ["model=inception", "model.width=0.25", "norm=batch"],
}
SLOTS = (
    "norm", "activation", "dropout", "init", "optimizer", "clip", "scheduler", "regularization", "augment",
    "averaging", "stopping",
)  # fmt: skip


@cache
def composed(model: str, *overrides: str) -> dict[str, Any]:
    """The config of a small model on few images."""
    return compose_config([*TINY, *MODELS[model], *overrides]).config


def config(model: str, *overrides: str, **slots: str) -> dict[str, Any]:
    """The same with an option per slot, whose node is read from its file: much faster than to compose it."""
    nodes = {slot: yaml.safe_load((CONF / slot / f"{option}.yaml").read_text()) for slot, option in slots.items()}
    return {**composed(model, *overrides), **nodes}


@cache
def data_of(model: str) -> Any:
    data = instantiate(composed(model)["data"])
    data.prepare()
    return data


def distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between the tensors of two state dicts, relative to each one's largest element."""
    assert a.keys() == b.keys()
    return max(
        float((a[k].double() - b[k].double()).abs().max() / b[k].double().abs().max().clamp(min=1e-12)) for k in a
    )


def states(members: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
    return [m.module.state_dict() for m in members]


def together_and_in_turn(runs: Sequence[RunConfig], model: str) -> float:
    """The distance between the members in one pass and those in turn, the largest over the members."""
    a, b = (states(fit(runs, data_of(model), together)) for together in (True, False))
    return max(distance(x, y) for x, y in zip(a, b, strict=True))


def verdict(model: str, slot: str, option: str) -> str:
    """ "same", or what came instead."""
    try:
        cfg = compose_config([*TINY, *MODELS[model], f"{slot}={option}"]).config
        reason = supports(RunConfig.of(cfg))
        far = 0.0 if reason else together_and_in_turn(members_of(RunConfig.of(cfg), 2), model)
    except InputError as error:
        return f"no such run: {error}"
    if reason:
        return f"refused: {reason}"
    return "same" if far <= BAR else f"DIFFERS by {far:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="|".join(MODELS))
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for model in parser.parse_args().models:
        for slot in SLOTS:
            for option in options(slot):
                found = verdict(model, slot, option)
                counts[found.partition(":")[0].partition(" by")[0]] += 1
                if found != "same":
                    print(f"{model} {slot}={option}: {found}", flush=True)
    print(dict(counts))
    raise SystemExit(counts["DIFFERS"] > 0)


if __name__ == "__main__":
    main()
