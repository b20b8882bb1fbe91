"""Patients that are thought to be sound: knep's own nets with every option, torchvision's, and plain nn.Sequential."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from knep.config.compose import compose_config
from knep.doctor.subject.setup import Patient, from_config

_ACTIVATIONS = ("relu", "leaky_relu", "gelu", "selu", "silu", "mish", "tanh", "sigmoid")
_INITS = ("default", "he_normal", "he_uniform", "glorot_normal", "glorot_uniform", "lecun_normal", "orthogonal",
          "uniform", "lsuv")  # fmt: skip
_NORMS = ("none", "batch", "layer", "group", "instance", "rms", "weight", "spectral")
_TORCHVISION = ("resnet18", "mobilenet_v2", "squeezenet1_1", "vgg11", "shufflenet_v2_x0_5", "mnasnet0_5",
                "mobilenet_v3_small")  # fmt: skip
_DIGITS = ["data=digits", "recipe=none", "optimizer=adam", "scaling=standardize", "trainer.max_epochs=8"]
_RGB = ["data=synthetic", "data.image_size=32", "data.channels=3", "data.images=640", "data.batch_size=32",
        "recipe=none", "optimizer=adam", "scaling=standardize", "trainer.max_epochs=2"]  # fmt: skip


@dataclass(frozen=True)
class Sound:
    """name; build: makes the patient; steps: of the trial; bar: validation accuracy that shows that it learns."""

    name: str
    build: Callable[[], Patient]
    steps: int = 100
    bar: float = 0.8


def sound() -> Iterator[Sound]:
    """All of them, cheap ones first."""
    lines = itertools.chain(_mlps(), _convolutional())
    for own in lines:
        yield Sound(" ".join(own), _maker([*_DIGITS, *own]))
    for name, model in _plain():
        yield Sound(name, _maker([*_DIGITS, "model=mlp"], model))
    for name in _TORCHVISION:
        yield Sound(name, _maker([*_RGB, "model=torchvision", f"model.name={name}"]), steps=30, bar=0.3)


def _maker(lines: list[str], model: Callable[[], nn.Module] | None = None) -> Callable[[], Patient]:
    def build() -> Patient:
        patient = from_config(compose_config(lines).run, lines)
        torch.manual_seed(0)
        return patient if model is None else replace(patient, model=model())

    return build


def _mlps() -> Iterator[list[str]]:
    pairs = {*itertools.product(_INITS, ("relu", "tanh")), *itertools.product(("default",), _ACTIVATIONS)}
    for depth, (init, activation) in itertools.product((2, 4, 10), sorted(pairs)):
        yield [*_deep(depth), f"init={init}", f"activation={activation}"]
    for depth, norm, init in itertools.product((2, 10), _NORMS, ("default", "he_normal")):
        if norm != "instance":  # which has no places behind a linear layer
            yield [*_deep(depth), f"norm={norm}", f"init={init}"]
    for scaling in ("none", "unit", "symmetric"):
        yield ["model=mlp", f"scaling={scaling}"]


def _deep(depth: int) -> list[str]:
    return ["model=mlp", f"model.widths=[{','.join(['64'] * depth)}]"]


def _convolutional() -> Iterator[list[str]]:
    for norm, init in itertools.product(_NORMS, ("default", "orthogonal")):
        yield ["model=cnn", f"norm={norm}", f"init={init}"]
    for activation in _ACTIVATIONS:
        yield ["model=cnn", f"activation={activation}"]
    for depth, norm in ((20, "none"), (20, "batch"), (20, "group"), (56, "batch")):
        yield ["model=resnet", f"model.depth={depth}", f"norm={norm}", "init=he_normal", "model.width=0.25"]
    yield ["model=resnet", "norm=batch", "model.zero_init_residual=true", "model.width=0.25"]
    yield ["model=inception", "norm=batch"]
    yield ["model=inception"]


def _plain() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for depth, act in itertools.product((1, 2, 3, 5), (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.ELU, nn.Hardtanh)):
        yield f"plain mlp {depth} {act.__name__}", lambda depth=depth, act=act: plain_mlp(depth, act)
    for act, norm in itertools.product((nn.ReLU, nn.Tanh, nn.SiLU, nn.ReLU6), (True, False)):
        yield f"plain cnn {act.__name__} norm={norm}", lambda act=act, norm=norm: plain_cnn(act, norm)
    yield "softmax regression", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def plain_mlp(depth: int, act: Callable[[], nn.Module], width: int = 96) -> nn.Sequential:
    """PyTorch's default init."""
    widths = [64, *[width] * depth]
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), act())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def plain_cnn(act: Callable[[], nn.Module], norm: bool) -> nn.Sequential:
    """Four convolutions in the manner of VGG."""
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise((1, 16, 16, 32, 32)):
        layers += [nn.Conv2d(before, width, 3, padding=1), *([nn.BatchNorm2d(width)] if norm else []), act()]
        layers += [nn.MaxPool2d(2)] if width == before else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4, 10))
