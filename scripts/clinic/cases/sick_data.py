"""Sick cases whose disease is in the data."""

from __future__ import annotations

from scripts.clinic.cases.bad_data import (
    blank,
    copied,
    holes,
    late_labels,
    leaked,
    odd_validation,
    one_label,
    rare,
    rescaled,
    shifted_labels,
    shuffled_labels,
    sorted_by_class,
    strange_labels,
)
from scripts.clinic.cases.bad_model import own_loop
from scripts.clinic.cases.case import Case, say, spread, turn

_FIVE = ("mlp", "cnn_bn", "sequential_momentum", "vgg", "synthetic_mlp")


def data_cases() -> list[Case]:
    return [
        *_inputs(),
        *_labels(),
        *_order_and_splits(),
    ]


def _inputs() -> list[Case]:
    return [
        *spread("unscaled_inputs", ("mlp_sgd", "mlp_momentum", "cnn_sgd", "synthetic_sgd", "sequential_sgd",
                "fashion_sgd", "sequential_momentum", "functional_sgd", "tanh_mlp"),
                [say("raw", "scaling=none")], curable=True),
        *spread("unscaled_inputs", ("mlp_sgd", "cnn_sgd", "functional_sgd", "sequential_sgd"),
                [turn("tiny", rescaled, factor=0.003), turn("shifted", rescaled, offset=30.0)]),
        *spread("unscaled_inputs", ("lenet", "sequential_tanh"), [turn("large", rescaled, factor=60.0)]),
        *spread("non_finite_inputs", _FIVE, [turn("some_nan", holes)]),
        *spread("non_finite_inputs", ("mlp_adamw", "functional", "few_cnn"),
                [turn("one_image", holes, share=1e-9), turn("inf", holes, share=0.05, value=float("inf"))]),
        *spread("constant_inputs", _FIVE, [turn("black", blank), turn("copies", blank, copies=True)]),
        *spread("non_finite_inputs", ("sequential",), [turn("own_nan", holes, share=0.1)], both=own_loop),
    ]  # fmt: skip


def _labels() -> list[Case]:
    return [
        *spread("constant_labels", (*_FIVE, "lenet"), [turn("zero", one_label)]),
        *spread("constant_labels", ("mlp_bn", "functional", "few_cnn"), [turn("three", one_label, label=3)]),
        *spread("labels_out_of_range", _FIVE, [turn("one_more", strange_labels)], crashes=True),
        *spread("labels_out_of_range", ("functional", "mlp_sgd", "cnn"),
                [turn("ignore", strange_labels, label=255), turn("negative", strange_labels, label=-7)], crashes=True),
        *spread("labels_off_by_one", _FIVE,
                [turn("train", shifted_labels), turn("val", shifted_labels, split="val")]),
        *spread("labels_off_by_one", ("functional", "few_cnn"), [turn("back", shifted_labels, by=-1)]),
        *spread("labels_off_by_one", ("mlp_sgd", "vgg"), [turn("from_one", shifted_labels, split="both", wrap=False)],
                crashes=True, also=("labels_out_of_range",)),
        *spread("unrelated_labels", _FIVE, [turn("all", shuffled_labels), turn("most", shuffled_labels, share=0.9)]),
        *spread("unrelated_labels", ("functional", "lenet", "few_mlp"), [turn("out_of_step", late_labels)]),
        *spread("class_imbalance", _FIVE, [turn("half", rare, classes=5, keep=0.02)]),
        *spread("class_imbalance", ("functional", "mlp_sgd", "cnn", "lenet"),
                [turn("two", rare, classes=2, keep=0.01), turn("most", rare, classes=8, keep=0.04)]),
    ]  # fmt: skip


def _order_and_splits() -> list[Case]:
    return [
        *spread("sorted_batches", ("mlp_sgd", "cnn_bn", "sequential_momentum", "vgg", "functional_sgd", "fashion_sgd",
                "synthetic_cnn", "few_cnn"), [turn("all", sorted_by_class)]),
        *spread("sorted_batches", ("mlp_momentum", "cnn_sgd", "sequential_sgd"),
                [turn("blocks", sorted_by_class, blocks=2)]),
        *spread("leaked_validation", ("fashion_mlp", "sequential_momentum", "scarce_digits", "long_fashion",
                "hard_mlp", "hard_sequential"), [turn("all", leaked), turn("half", leaked, share=0.5)], mark="leak"),
        *spread("leaked_validation", ("fashion_mlp", "hard_mlp"), [turn("copied", copied, share=0.5)], mark="leak"),
        *spread("validation_scaled_differently", _FIVE,
                [turn("unit", odd_validation, factor=1 / 255), turn("inverted", odd_validation, invert=True)]),
        *spread("validation_scaled_differently", ("functional", "lenet", "fashion_mlp"),
                [turn("brighter", odd_validation, offset=150.0), turn("standardised", odd_validation, factor=0.02,
                      offset=-2.0)]),
    ]  # fmt: skip
