"""Sick cases whose disease is in the optimisation or the regularization."""

from __future__ import annotations

import torch

from scripts.clinic.cases.bad_data import outlier_images, outliers
from scripts.clinic.cases.bad_model import narrow, noisy
from scripts.clinic.cases.case import Case, say, spread, turn


def training_cases() -> list[Case]:
    return [*_rates(), *_steps(), *_formats(), *_regularizers(), *_lengths()]


def _rate(*rates: float) -> list:
    return [say(f"lr={rate}", f"optimizer.lr={rate}") for rate in rates]


def _rates() -> list[Case]:
    return [
        *spread("lr_too_high", ("mlp", "cnn", "sequential", "lenet"), _rate(0.3, 3.0), curable=True),
        *spread("lr_too_high", ("mlp_sgd", "cnn_sgd", "functional_sgd"), _rate(10.0, 100.0), curable=True),
        *spread("lr_too_high", ("mlp_momentum", "sequential_momentum"), _rate(2.0, 20.0), curable=True),
        *spread("lr_too_low", ("mlp", "cnn", "lenet"), _rate(1e-5, 3e-6), curable=True),
        *spread("lr_too_low", ("shufflenet", "vit"), _rate(1e-6), curable=True),
        *spread("lr_too_low", ("mlp_sgd", "cnn_bn", "vgg", "sequential_momentum", "functional_sgd"),
                _rate(3e-4, 3e-5), curable=True),
        *spread("no_decay", ("jumpy_mlp", "jumpy_cnn", "jumpy_fashion", "jumpy_sequential", "jumpy_few", "jumpy_sgd"),
                [say("none", "scheduler=none"), say("constant", "scheduler=constant")],
                curable=True, also=("lr_too_high",)),
    ]  # fmt: skip


def _steps() -> list[Case]:
    return [
        *spread("clip_throttles", ("mlp_sgd", "cnn_sgd", "functional_sgd", "mlp_momentum", "sequential_momentum"),
                [say("norm", "clip=norm", "clip.theta=0.001"), say("value", "clip=value", "clip.theta=0.00001")],
                curable=True),
        *spread("clip_throttles", ("vgg", "cnn_bn"), [say("adaptive", "clip=adaptive", "clip.factor=0.00001")],
                curable=True),
        *spread("weight_decay_too_large", ("mlp_adamw", "cnn_adamw"),
                [say("100", "optimizer.weight_decay=100"), say("300", "optimizer.weight_decay=300")], curable=True),
        *spread("weight_decay_too_large", ("mlp_sgd", "mlp_momentum", "sequential_momentum", "functional_sgd"),
                [say("0.3", "optimizer.weight_decay=0.3"), say("1", "optimizer.weight_decay=1")], curable=True),
        *spread("momentum_instability", ("swing_mlp", "swing_cnn", "swing_sequential", "swing_few", "swing_vgg",
                "swing_nesterov"), [say("0.99", "optimizer.momentum=0.99"), say("0.999", "optimizer.momentum=0.999")],
                curable=True, mark="loss", also=("lr_too_high",)),
        *spread("loss_spikes", ("mlp_sgd", "sequential_momentum", "functional_sgd", "cnn_sgd", "mlp_momentum"),
                [turn("batches", outliers, count=2, factor=300.0), turn("images", outlier_images)], curable=True),
    ]  # fmt: skip


def _formats() -> list[Case]:
    return [
        *spread("precision_underflow", ("slow_mlp", "slow_sequential", "slow_fashion", "slow_cnn", "slow_functional"),
                [turn("bfloat16", narrow, dtype=torch.bfloat16)]),
        *spread("precision_underflow", ("mlp", "functional", "sequential_tanh", "few_mlp", "fashion_mlp", "cnn"),
                [turn("float16", narrow)]),
    ]  # fmt: skip


def _regularizers() -> list[Case]:
    return [
        *spread("too_much_dropout", ("mlp", "cnn", "sequential_momentum", "vgg", "fashion_mlp", "few_mlp"),
                [say("0.9", "dropout=standard", "dropout.p=0.9"), say("0.97", "dropout=standard", "dropout.p=0.97")],
                curable=True),
        *spread("too_much_dropout", ("cnn_bn",), [say("spatial", "dropout=spatial", "dropout.p=0.9")], curable=True),
        *spread("too_much_smoothing", ("cnn_bn", "sequential_momentum", "vgg", "functional_sgd", "mlp_sgd",
                "fashion_sgd"), [say("0.9", "regularization=label_smoothing", "regularization.epsilon=0.9"),
                 say("0.98", "regularization=label_smoothing", "regularization.epsilon=0.98")], curable=True),
        *spread("too_much_augment", ("mlp", "cnn_bn", "sequential", "vgg", "functional_sgd"),
                [say("shift", "augment=shift", "augment.pixels=6"),
                 say("erase", "augment=erase", "augment.p=1", "augment.smallest=0.7", "augment.largest=0.9")],
                curable=True),
        *spread("too_much_augment", ("fashion_mlp", "synthetic_cnn"),
                [turn("noise", noisy), turn("pixels", noisy, deviation=0.0, permuted=True)]),
        *spread("too_much_penalty", ("mlp", "fashion_sgd", "sequential_momentum", "functional_sgd"),
                [say("l2", "regularization=l2", "regularization.strength=0.5"),
                 say("l1", "regularization=l1", "regularization.strength=0.03")], curable=True),
        *spread("too_much_penalty", ("cnn", "lenet_momentum"),
                [say("elastic", "regularization=elastic", "regularization.l1=0.02", "regularization.l2=0.2"),
                 say("max_norm", "regularization=max_norm", "regularization.limit=0.02")], curable=True),
    ]  # fmt: skip


def _lengths() -> list[Case]:
    return [
        *spread("overfitting", ("long_deep", "long_fashion", "long_cnn", "long_sequential", "long_few",
                "long_functional"),
                [say("long", "trainer.max_epochs=100"), say("fewer", "trainer.max_epochs=80", "data.limit=80")],
                curable=True, mark="loss", also=("too_much_capacity",)),
        *spread("stopping_too_early", ("mlp", "mlp_sgd", "cnn", "sequential_momentum", "vgg", "lenet",
                "functional_sgd"), [say("one_epoch", "trainer.max_epochs=1"),
                say("impatient", "stopping=early", "stopping.patience=1", "stopping.min_delta=0.5")], curable=True),
    ]  # fmt: skip
