"""Sampling: how often rows of each class are drawn."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

import knep
from knep.errors import InputError

CONF = Path(knep.__file__).parent / "conf" / "sampling"
Y = torch.tensor([0] * 900 + [2] * 90 + [1] * 10)


def shares(option: str) -> Tensor:
    """Of the draws, by class."""
    make: partial[Tensor] = instantiate(OmegaConf.load(CONF / f"{option}.yaml"), _convert_="all")
    weights = make(Y)
    return torch.bincount(Y, weights=weights) / weights.sum()


def balanced_draws_all_alike() -> None:
    torch.testing.assert_close(shares("balanced"), torch.full((3,), 1 / 3, dtype=torch.float64))


def sqrt_draws_by_the_root() -> None:
    roots = torch.tensor([900.0, 10.0, 90.0], dtype=torch.float64).sqrt()
    torch.testing.assert_close(shares("sqrt"), roots / roots.sum())


ROWS = {"balanced": balanced_draws_all_alike, "sqrt": sqrt_draws_by_the_root}


@pytest.mark.parametrize("option", ROWS)
def test_property(option: str) -> None:
    ROWS[option]()


def test_rows_without_a_class_are_refused() -> None:
    make = instantiate(OmegaConf.load(CONF / "balanced.yaml"), _convert_="all")
    with pytest.raises(InputError, match="sampling=none"):
        make(torch.randn(5))
