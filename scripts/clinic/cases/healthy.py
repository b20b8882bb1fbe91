"""Healthy cases: every recipe in small, every sound option of every slot, and sound nets of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from scripts.clinic.cases.bad_data import rare
from scripts.clinic.cases.bad_model import own_loop
from scripts.clinic.cases.bases import BASES
from scripts.clinic.cases.case import Case, Mutation

# Options that are there to show what goes wrong, or that make no sense on so little data, and groups of no slot.
UNSOUND = frozenset(
    {
        "scaling=none",
        "init=unit_normal",
        "init=gaussian",
        "init=uniform",
        "activation=sigmoid",
        "augment=flip",  # a mirrored digit is none
        "augment=shift_flip",
        "augment=trivial",
        "augment=cutmix",
        "optimizer=none",
    }
)
SLOTS = (
    "activation", "augment", "averaging", "clip", "dropout", "guard", "init", "norm", "optimizer", "regularization",
    "scaling", "scheduler", "stopping",
)  # fmt: skip
_RESIDUAL = {"dropout=stochastic_depth"}
_MAPS = {
    "dropout=spatial",
    "dropout=dropblock",
    "init=delta_orthogonal",
    "init=dirac",
    "init=whiten_first",
    "norm=instance",
}
_WITH = {
    "regularization=weight_decay": ["optimizer=adam"],
    "regularization=l2": ["optimizer=adam"],
    "scheduler=step": ["scheduler.every=5"],
    "scheduler=cyclic": ["scheduler.half_cycle=1"],
    "optimizer=schedule_free": ["optimizer.warmup_steps=20"],
    "optimizer=gd": ["data.batch_size=64", "trainer.max_epochs=200"],
    "dropout=alpha": ["activation=selu", "init=lecun_normal"],
    "activation=tanh": ["init=glorot_normal"],
    "activation=selu": ["init=lecun_normal"],
}  # fmt: skip
_RECIPE = (
    "trainer=cpu", "progress=false", "threads=1", "seed=0", "data=digits", "data.val_share=0.25", "data.batch_size=64",
    "trainer.max_epochs=15",
)  # fmt: skip
# Recipes that were published for ImageNet and CIFAR-10, at rates of batches of thousands, say nothing on digits.
PUBLISHED = frozenset(
    {
        *("timm_a1", "timm_a2", "timm_a3", "timm_b", "timm_c1", "timm_c2", "timm_d", "timm_ra4", "torchvision_2021"),
        *("deit_s", "convnext_t", "vit_s_plain", "airbench94", "fastai_finetune"),
    }
)
_RECIPE_NETS = {
    "own": (),
    "mlp": ("model=mlp", "model.widths=[96,64]"),
    "cnn": ("model=cnn", "model.widths=[16,32]"),
    "vgg": ("model=import", "model.path=scripts.clinic.cases.nets:vgg"),
}


def healthy_cases() -> list[Case]:
    made = [*_recipes(), *_options(), *_nets(), *_doses(), *_odd_but_sound()]
    return [case for i, (name, lines, both) in enumerate(made) for case in [_case(name, lines, both, "AB"[i % 2])]]


def _case(name: str, lines: Sequence[str], both: Mutation | None, half: str) -> Case:
    return Case(f"healthy/{name}", "", "sound", tuple(lines), both=both, half=half)


Row = tuple[str, Sequence[str], Mutation | None]


def _recipes() -> Iterator[Row]:
    from knep.config.catalog import options

    for recipe in (name for name in options("recipe") if name not in PUBLISHED):
        for net, lines in _RECIPE_NETS.items():
            small = ("model.widths=[16,32]",) if net == "own" else ()
            if recipe == "none":
                small = (*small, "scaling=standardize")
            if "resnet" in recipe and net == "own":
                small = ("model.width=0.5", "optimizer.lr=0.05", "data.limit=700")
            flips = ("augment=shift", "augment.pixels=1") if "fashion" in recipe or "cifar" in recipe else ()
            yield f"recipe/{recipe}/{net}", (f"recipe={recipe}", *_RECIPE, *lines, *small, *flips), None


def _options() -> Iterator[Row]:
    from knep.config.catalog import options

    for slot in SLOTS:
        for number, option in enumerate(options(slot)):
            chosen = f"{slot}={option}"
            if chosen in UNSOUND:
                continue
            more = (chosen, *_WITH.get(chosen, ()))
            if chosen in _RESIDUAL:
                yield f"option/{chosen}/resnet", (*BASES["resnet"], *more), None
                continue
            maps = chosen in _MAPS or number % 2
            base = ("cnn_adamw" if slot in ("norm", "dropout") else "cnn") if maps else "sequential"
            yield f"option/{chosen}/{base}", (*BASES[base], *more), None


def _nets() -> Iterator[Row]:
    sound = (
        "mlp_sgd", "mlp_momentum", "mlp_adamw", "mlp_bn", "mlp_unit", "deep_mlp", "deep_mlp_bn", "deep_tanh",
        "tanh_mlp", "cnn_sgd", "cnn_bn", "cnn_muon", "resnet", "fashion_cnn", "fashion_plain", "fashion_mlp",
        "synthetic_sgd", "synthetic_cnn", "few_mlp", "few_cnn", "sequential_sgd", "sequential_tanh",
        "sequential_norm", "deep_sequential", "deep_norm", "vgg", "vgg_plain", "functional", "functional_sgd",
        "residual_mlp", "lenet",
    )  # fmt: skip
    for base in sound:
        yield f"net/{base}", BASES[base], None


def _doses() -> Iterator[Row]:
    """Mild doses of what makes ill in large ones."""
    doses = {
        "lr_low": ("mlp", ("optimizer.lr=0.001",)),
        "lr_high": ("cnn_bn", ("optimizer.lr=0.1",)),
        "lr_sgd": ("mlp_sgd", ("optimizer.lr=0.3",)),
        "dropout": ("mlp", ("dropout=standard", "dropout.p=0.3")),
        "smoothing": ("cnn_bn", ("regularization=label_smoothing", "regularization.epsilon=0.2")),
        "l2": ("mlp", ("regularization=l2", "regularization.strength=0.001")),
        "decay": ("mlp_adamw", ("optimizer.weight_decay=0.2",)),
        "momentum": ("mlp_momentum", ("optimizer.momentum=0.95",)),
        "clip": ("mlp_sgd", ("clip=norm", "clip.theta=1")),
        "clip_adam": ("cnn", ("clip=norm", "clip.theta=0.1")),
        "batch_16": ("mlp_bn", ("data.batch_size=16", "optimizer.lr=0.02")),
        "batch_256": ("cnn_bn", ("data.batch_size=256", "trainer.max_epochs=40")),
        "shift": ("vgg", ("augment=shift", "augment.pixels=1")),
        "more_epochs": ("vgg", ("trainer.max_epochs=25",)),
        "group_of_two": ("cnn_adamw", ("norm=group", "data.batch_size=8", "trainer.max_epochs=5")),
        "unit": ("cnn_bn", ("scaling=unit",)),
        "symmetric": ("sequential_sgd", ("scaling=symmetric",)),
        "accumulate": ("cnn_bn", ("accumulate=2", "data.batch_size=32")),
    }
    for name, (base, lines) in doses.items():
        yield f"dose/{name}/{base}", (*BASES[base], *lines), None


def _odd_but_sound() -> Iterator[Row]:
    """Projects without knep, and data that look strange and do no harm."""
    for base in ("mlp", "vgg", "functional", "deep_norm", "tanh_mlp", "synthetic_cnn"):
        yield f"own_loop/{base}", BASES[base], own_loop
    sgd = partial(own_loop, make=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    for base in ("sequential", "cnn_bn", "residual_mlp", "few_mlp"):
        yield f"own_sgd/{base}", BASES[base], sgd
    for base in ("mlp", "cnn_bn", "vgg"):
        yield f"mild_imbalance/{base}", BASES[base], partial(rare, classes=4, keep=0.6)
