"""Sick cases whose disease is in the model."""

from __future__ import annotations

from scripts.clinic.cases.bad_model import (
    equal_units,
    equal_weights,
    frozen,
    hidden_biases,
    partly_optimized,
    sigmoid_end,
    slow_statistics,
    softmax_end,
    weights_times,
)
from scripts.clinic.cases.case import Case, Knob, say, spread, turn


def _net(name: str) -> Knob:
    return say(name, f"model.path=scripts.clinic.cases.nets:{name}")


def model_cases() -> list[Case]:
    return [*_signals(), *_units(), *_heads_and_parts(), *_norms(), *_capacity()]


def _signals() -> list[Case]:
    deep = ("deep_mlp", "deep_tanh", "deep_sequential")
    return [
        *spread("vanishing_gradient", ("deep_mlp", "deep_tanh"),
                [say("sigmoid", "activation=sigmoid"), say("gaussian", "init=gaussian"),
                 say("uniform", "init=uniform", "init.limit=0.03")], curable=True),
        *spread("vanishing_gradient", ("deep_sequential",), [_net("deep_sigmoid"), say("gaussian", "init=gaussian")],
                curable=True),
        *spread("vanishing_gradient", ("vgg_plain",), [say("gaussian", "init=gaussian"), _net("vgg_sigmoid")],
                curable=True),
        *spread("vanishing_gradient", ("lenet_momentum", "lenet_few"), [_net("lenet_sigmoid")], curable=True),
        *spread("exploding_gradient", ("deep_mlp", "deep_sequential", "vgg_plain"),
                [say("unit_normal", "init=unit_normal")], curable=True),
        *spread("exploding_gradient", deep[::2], [turn("triple", weights_times, factor=3.0),
                turn("double", weights_times, factor=2.0, last=True)]),
        *spread("exploding_gradient", ("deep_sgd", "deep_wide"),
                [say("uniform", "init=uniform", "init.limit=0.6"), say("unit_normal", "init=unit_normal")],
                curable=True),
        *spread("signal_collapse", ("deep_sgd", "deep_sequential", "deep_wide", "deep_mlp"),
                [turn("biases", hidden_biases, value=8.0), turn("large_biases", hidden_biases, value=40.0)]),
        *spread("signal_collapse", ("pooled", "pooled_few"), [_net("pooled_lost")]),
        *spread("signal_collapse", ("waist", "waist_synthetic"), [_net("waist_lost"), _net("waist_gated")]),
    ]  # fmt: skip


def _units() -> list[Case]:
    return [
        *spread("dying_relu", ("mlp", "fashion_mlp", "vgg_plain", "sequential_sgd", "functional_sgd",
                "deep_sequential"),
                [turn("dying", hidden_biases, value=-3.0), turn("dead", hidden_biases, value=-30.0)]),
        *spread("dying_relu", ("sequential", "sequential_sgd"), [_net("mlp_dead"), _net("mlp_dying")], curable=True),
        *spread("saturation", ("tanh_mlp", "deep_tanh", "sequential_tanh", "lenet", "lenet_momentum"),
                [turn("large", weights_times, factor=30.0)]),
        *spread("saturation", ("tanh_mlp", "deep_tanh", "sequential_tanh"),
                [say("unit_normal", "init=unit_normal")], curable=True),
        *spread("saturation", ("mlp", "sequential"),
                [say("sigmoid", "activation=sigmoid", "init=uniform", "init.limit=4")], curable=True),
        *spread("symmetric_weights", ("mlp", "cnn", "sequential_momentum", "functional", "tanh_mlp", "few_mlp"),
                [turn("constant", equal_weights), turn("zero", equal_weights, value=0.0)]),
        *spread("symmetric_weights", ("mlp_sgd", "functional_few", "lenet"), [turn("copies", equal_units)]),
    ]  # fmt: skip


def _heads_and_parts() -> list[Case]:
    return [
        *spread("double_softmax", ("mlp_sgd", "cnn_bn", "sequential_momentum", "vgg", "functional_sgd", "fashion_sgd"),
                [turn("softmax", softmax_end), turn("sigmoid", sigmoid_end)]),
        *spread("double_softmax", ("sequential_sgd",), [_net("mlp_softmax"), _net("mlp_squashed")]),
        *spread("double_softmax", ("functional_few",), [_net("functional_softmax"), _net("functional_sigmoid")]),
        *spread("cut_off", ("functional_sgd", "functional_few"), [_net("functional_detach"),
                _net("functional_no_grad"), _net("functional_late")]),
        *spread("cut_off", ("mlp_sgd", "deep_sequential", "vgg", "cnn_sgd", "sequential_momentum"),
                [turn("head_only", partly_optimized), turn("biases_only", partly_optimized, keep="biases")]),
        *spread("frozen_parameters", ("shufflenet",), [turn("features", frozen)]),
        *spread("frozen_parameters", ("mlp_sgd", "deep_sequential", "vgg", "cnn_sgd", "functional_sgd",
                "sequential_momentum", "few_cnn"),
                [turn("features", frozen), turn("all_but_first", frozen, first=1, last=None)]),
    ]  # fmt: skip


def _norms() -> list[Case]:
    return [
        *spread("tiny_norm_batches", ("two_mlp", "two_deep", "two_momentum", "three_mlp", "two_fashion", "two_few",
                "two_sequential", "two_resnet"), [say("batch", "norm=batch")], curable=True),
        *spread("tiny_norm_batches", ("mlp_bn", "deep_mlp_bn", "deep_norm"),
                [say("ghost", "norm=ghost_batch", "norm.ghost_size=2"),
                 say("ghost_of_3", "norm=ghost_batch", "norm.ghost_size=3")], curable=True),
        *spread("stale_statistics", ("cnn_bn", "mlp_bn", "synthetic_cnn", "few_cnn"),
                [say("slow", "norm.momentum=0.0003"), say("still", "norm.momentum=0.00001")], curable=True),
        *spread("stale_statistics", ("vgg",), [_net("vgg_slow_norm"), _net("vgg_eval_norm")]),
        *spread("stale_statistics", ("resnet", "deep_norm"), [turn("slow", slow_statistics, momentum=1e-3)]),
    ]  # fmt: skip


def _capacity() -> list[Case]:
    return [
        *spread("too_little_capacity", ("mlp", "fashion_mlp", "synthetic_mlp"),
                [say("two", "model.widths=[2]"), say("one", "model.widths=[64,1]")]),
        *spread("too_little_capacity", ("cnn", "few_cnn"), [say("one", "model.widths=[1,1]")]),
        *spread("too_little_capacity", ("sequential", "sequential_momentum"), [_net("mlp_tiny"), _net("mlp_waist")]),
        *spread("too_little_capacity", ("vgg",), [_net("vgg_tiny")]),
        *spread("too_much_capacity", ("scarce_mlp", "scarce_fashion", "scarce_digits", "scarce_few"),
                [say("wide", "model.widths=[2048,1024]"), say("deep", "model.widths=[512,512,512,512]")],
                mark="loss", also=("overfitting",)),
        *spread("too_much_capacity", ("scarce_sequential",), [_net("mlp_huge")], mark="loss", also=("overfitting",)),
    ]  # fmt: skip
