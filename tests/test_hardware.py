"""Levers: what they choose, and that a step's seeds reach the generators it draws from."""

import os

import pytest
import torch
from torch import nn

from knep.config.compose import compose_config
from knep.config.schema import DataSpec
from knep.engine.precision import levers, lost_in_bf16, precision, wrong_in_bf16
from knep.errors import InputError
from knep.utils.hardware import quick_checks
from knep.utils.rng import reseed


def test_a_wanted_precision_is_kept():
    assert precision("16-mixed", "cpu") == "16-mixed"
    assert precision("32-true", "auto") == "32-true"


def test_auto_follows_the_hardware(monkeypatch):
    for has, wanted in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr("knep.engine.precision.cpu_bf16", lambda has=has: has)
        assert precision("auto", "cpu") == wanted


@pytest.mark.parametrize(
    ("task", "shape", "dtype", "lost"),
    [
        ("regression", None, "uint8", "numbers to predict"),
        ("multiclass", (16,), "float32", "a table's numbers"),
        ("multiclass", (3, 8, 8), "float32", None),
        ("multiclass", None, "uint8", None),
        ("tokens", (64,), "int64", None),
    ],
)
def test_numbers_that_bf16_would_round_are_computed_in_float32(monkeypatch, task, shape, dtype, lost):
    monkeypatch.setattr("knep.engine.precision.cpu_bf16", lambda: True)
    found = lost_in_bf16(task, DataSpec(2, 1, 8, ("a", "b"), shape=shape, dtype=dtype))
    assert found == lost
    assert precision("auto", "cpu", None, found) == ("32-true" if lost else "bf16-mixed")
    assert precision("bf16-mixed", "cpu", None, found) == "bf16-mixed"  # who asks for it gets it


def test_a_memory_format_of_images_is_said_of_images_alone():
    run = compose_config(["channels_last=true"]).run
    said = [levers(run, "32-true", torch.device("cpu"), lean=False, images=images) for images in (True, False)]
    assert ["channels_last" in line for line in said] == [True, False]


def test_reseeding_draws_what_manual_seed_draws():
    torch.manual_seed(7)
    wanted = torch.rand(3), torch.randn(3)
    reseed(7, torch.device("cpu"))
    assert torch.equal(wanted[0], torch.rand(3))
    assert torch.equal(wanted[1], torch.randn(3))


def test_the_search_for_a_driver_comes_back(monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with quick_checks():
        assert ("PYTORCH_NVML_BASED_CUDA_CHECK" in os.environ) == torch.cuda.is_available()
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


def test_strided_convolutions_of_single_pixels_are_not_computed_in_bf16(monkeypatch):
    monkeypatch.setattr("knep.engine.precision.cpu_bf16", lambda: True)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 1, 2), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
    )
    assert wrong_in_bf16(net, torch.rand(2, 1, 4, 4)) == "2"
    assert wrong_in_bf16(net, torch.rand(2, 1, 8, 8)) is None
    assert precision("auto", "cpu", "2") == "32-true"
    assert precision("auto", "cpu", None) == "bf16-mixed"
    assert precision("32-true", "cpu", "2") == "32-true"
    with pytest.raises(InputError, match="2 reads single pixels"):
        precision("bf16-mixed", "cpu", "2")
