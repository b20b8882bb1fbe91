"""Regularization: penalties and constraints against numpy, on the decayed parameters alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

import knep
from knep.optim.param_groups import decayed
from knep.recipes.regularization import Regularizer

CONF = Path(knep.__file__).parent / "conf" / "regularization"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))


def make(option: str, **hp: Any) -> Regularizer:
    return instantiate(OmegaConf.load(CONF / f"{option}.yaml"), _convert_="all", **hp)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).double()


def arrays(net: nn.Module) -> list[np.ndarray]:
    """Copies of the two weights that penalties may act on, named by hand."""
    return [net.get_parameter(name).detach().numpy().copy() for name in ("0.weight", "3.weight")]


def penalty(option: str, **hp: Any) -> tuple[float, list[Tensor], list[np.ndarray]]:
    """Penalty of a small network, the gradients it sends to the weights, and the weights."""
    net = model()
    value = make(option, **hp).penalty(decayed(net))
    assert isinstance(value, Tensor)
    value.backward()
    others = [p for name, p in net.named_parameters() if name not in ("0.weight", "3.weight")]
    assert all(p.grad is None for p in others)
    got = [p.grad for p in decayed(net) if p.grad is not None]
    return value.item(), got, arrays(net)


def l1_is_the_sum_of_absolute_values() -> None:
    value, grads, weights = penalty("l1", strength=0.3)
    assert value == pytest.approx(0.3 * sum(np.abs(w).sum() for w in weights), rel=1e-12)
    for g, w in zip(grads, weights, strict=True):
        np.testing.assert_allclose(g.numpy(), 0.3 * np.sign(w), rtol=1e-12)


def l2_is_half_the_sum_of_squares() -> None:
    value, grads, weights = penalty("l2", strength=0.3)
    assert value == pytest.approx(0.15 * sum((w**2).sum() for w in weights), rel=1e-12)
    for g, w in zip(grads, weights, strict=True):
        np.testing.assert_allclose(g.numpy(), 0.3 * w, rtol=1e-12)


def elastic_is_the_sum_of_both() -> None:
    value, grads, weights = penalty("elastic", l1=0.2, l2=0.3)
    assert value == pytest.approx(sum(0.2 * np.abs(w).sum() + 0.15 * (w**2).sum() for w in weights), rel=1e-12)
    for g, w in zip(grads, weights, strict=True):
        np.testing.assert_allclose(g.numpy(), 0.2 * np.sign(w) + 0.3 * w, rtol=1e-12)


def after(option: str, **hp: Any) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    net = model()
    before = arrays(net)
    others = {n: p.detach().clone() for n, p in net.named_parameters() if n not in ("0.weight", "3.weight")}
    make(option, **hp).after_step(decayed(net), 0.5)
    assert all(torch.equal(net.get_parameter(n), p) for n, p in others.items())
    return before, arrays(net), 0.5


def weight_decay_shrinks_by_rate_times_strength() -> None:
    before, now, lr = after("weight_decay", strength=0.1)
    for old, new in zip(before, now, strict=True):
        np.testing.assert_allclose(new, old * (1 - lr * 0.1), rtol=1e-14)


def max_norm_scales_back_long_units_only() -> None:
    before, now, _ = after("max_norm", limit=0.6)
    kept = shortened = 0
    for old, new in zip(before, now, strict=True):
        for a, b in zip(old.reshape(len(old), -1), new.reshape(len(new), -1), strict=True):
            if np.linalg.norm(a) <= 0.6:
                kept += 1
                np.testing.assert_array_equal(a, b)
            else:
                shortened += 1
                np.testing.assert_allclose(b, a * 0.6 / np.linalg.norm(a), rtol=1e-12)
    assert kept
    assert shortened
    zero = torch.zeros(2, 3)
    make("max_norm").after_step([zero], 0.1)
    assert torch.equal(zero, torch.zeros(2, 3))


def label_smoothing_is_read_by_the_loss() -> None:
    """Cross-entropy against (1 - epsilon) one-hot + epsilon / classes, by hand."""
    epsilon = make("label_smoothing", epsilon=0.2).label_smoothing
    logits = np.array([[2.0, -1.0, 0.5]])
    log_p = logits - np.log(np.exp(logits).sum())
    expected = -(0.8 * log_p[0, 1] + 0.2 / 3 * log_p.sum())
    loss = nn.functional.cross_entropy(torch.tensor(logits), torch.tensor([1]), label_smoothing=epsilon)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


ROWS: dict[str, Callable[[], None]] = {
    "l1": l1_is_the_sum_of_absolute_values,
    "l2": l2_is_half_the_sum_of_squares,
    "elastic": elastic_is_the_sum_of_both,
    "weight_decay": weight_decay_shrinks_by_rate_times_strength,
    "max_norm": max_norm_scales_back_long_units_only,
    "label_smoothing": label_smoothing_is_read_by_the_loss,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option: str) -> None:
    ROWS[option]()


@pytest.mark.parametrize("option", OPTIONS)
def test_nothing_to_act_on(option: str) -> None:
    regularizer = make(option)
    assert regularizer.penalty([]) == 0
    regularizer.after_step([], 0.1)


def test_none_is_the_identity() -> None:
    net, none = model(), make("none")
    before = arrays(net)
    assert none.penalty(decayed(net)) == 0
    assert none.label_smoothing == 0
    none.after_step(decayed(net), 0.1)
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays(net), strict=True))


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [("l1", "strength", -1), ("l2", "strength", -1), ("elastic", "l1", -1), ("elastic", "l2", "a"),
     ("weight_decay", "strength", -0.1), ("max_norm", "limit", 0), ("label_smoothing", "epsilon", 1.0)],
)  # fmt: skip
def test_values_out_of_range_are_named(option: str, key: str, value: object) -> None:
    with pytest.raises(Exception, match=f"{key} must be a number in .*, got {value}"):
        make(option, **{key: value})
