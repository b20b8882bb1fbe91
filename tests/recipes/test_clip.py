"""Gradient clipping: what a gradient is after it, to the bit where it must stay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

import knep

CONF = Path(knep.__file__).parent / "conf" / "clip"


def make(option: str, **hp: Any) -> Callable[..., Tensor]:
    return instantiate(OmegaConf.load(CONF / f"{option}.yaml"), _convert_="all", **hp)


def parameters(length: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Parameters of a few shapes whose gradient has this length, and one without a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 30), (8, 3, 3, 3), (17,), (), (50, 40)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    norm = torch.cat([g.flatten() for g in drawn]).norm()
    params = [nn.Parameter(torch.randn(g.shape, generator=generator).to(dtype)) for g in drawn]
    for p, g in zip(params, drawn, strict=True):
        p.grad = (g * length / norm).to(dtype)
    return [*params, nn.Parameter(torch.ones(3))]


def grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def length(tensors: list[Tensor]) -> float:
    return torch.cat([g.double().flatten() for g in tensors]).norm().item()


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def norm_keeps_short_and_shortens_long() -> None:
    clip = make("norm", theta=2.0)
    for dtype in (torch.float64, torch.float32):
        for before in (1e-8, 0.3, 1.999):
            params = parameters(before, dtype)
            old = grads(params)
            assert clip(params).item() == pytest.approx(before, rel=1e-5)
            assert same_bits(grads(params), old)
        for before in (2.01, 50.0, 1e6):
            params = parameters(before, dtype)
            old = grads(params)
            assert clip(params).item() == pytest.approx(before, rel=1e-5)
            assert length(grads(params)) == pytest.approx(2.0, rel=1e-6)
            torch.testing.assert_close(grads(params), [g * 2 / before for g in old], rtol=1e-5, atol=0)


def value_limits_each_element() -> None:
    params = parameters(30.0)
    old = grads(params)
    assert make("value", theta=0.25)(params).item() == pytest.approx(30.0)
    assert same_bits(grads(params), [g.clip(-0.25, 0.25) for g in old])
    assert max(g.abs().max().item() for g in old) > 0.25


def normalize_always_gives_theta() -> None:
    clip = make("normalize", theta=3.0)
    for dtype in (torch.float64, torch.float32):
        for before in (1e-6, 1.0, 1e6):
            params = parameters(before, dtype)
            assert clip(params).item() == pytest.approx(before, rel=1e-5)
            assert length(grads(params)) == pytest.approx(3.0, rel=1e-6)
    params = parameters(0.0)
    assert clip(params).item() == 0
    assert length(grads(params)) == 0


def adaptive_bounds_each_unit_by_its_weights() -> None:
    """Unit by unit, Brock et al. 2021, eq. 3, in plain loops."""
    params = parameters(3.0)
    params[0].data[0] = 0.0  # a dead unit counts with eps
    old = grads(params)
    assert make("adaptive", factor=0.06, eps=1e-3)(params).item() == pytest.approx(3.0)
    touched = 0
    for p, before in zip(params, old, strict=False):
        assert p.grad is not None
        for i in range(len(p) if p.ndim > 1 else 1):
            unit = i if p.ndim > 1 else ...
            limit = 0.06 * max(p[unit].norm().item(), 1e-3)
            g = before[unit]
            expected = g * limit / g.norm() if g.norm() > limit else g
            torch.testing.assert_close(p.grad[unit], expected, rtol=1e-12, atol=0)
            touched += bool(g.norm() > limit)
    assert 0 < touched < sum(len(p) if p.ndim > 1 else 1 for p in params[:-1])


ROWS: dict[str, Callable[[], None]] = {
    "norm": norm_keeps_short_and_shortens_long,
    "value": value_limits_each_element,
    "normalize": normalize_always_gives_theta,
    "adaptive": adaptive_bounds_each_unit_by_its_weights,
}
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))


@pytest.mark.parametrize("option", ROWS)
def test_property(option: str) -> None:
    ROWS[option]()


def test_none_measures_and_leaves_every_bit() -> None:
    params = parameters(7.0)
    old = grads(params)
    assert make("none")(params).item() == pytest.approx(7.0)
    assert same_bits(grads(params), old)


@pytest.mark.parametrize("option", OPTIONS)
def test_half_precision_and_missing_gradients(option: str) -> None:
    clip = make(option)
    for dtype in (torch.float16, torch.bfloat16):
        params = parameters(400.0, dtype)
        total = clip(iter(params))
        assert total.shape == ()
        assert total.item() == pytest.approx(400.0, rel=0.01)
        assert all(g.isfinite().all() and g.dtype == dtype for g in grads(params))
    assert clip([]).item() == 0
    assert clip([nn.Parameter(torch.ones(2))]).item() == 0


@pytest.mark.parametrize("option", OPTIONS)
def test_a_gradient_that_is_not_finite_stays_visible(option: str) -> None:
    params = parameters(1.0)
    assert params[0].grad is not None
    params[0].grad[0, 0] = float("nan")
    assert make(option)(params).isnan()
    assert any(g.isnan().any() for g in grads(params))


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [("norm", "theta", 0), ("norm", "theta", "big"), ("value", "theta", -1), ("normalize", "theta", 0.0),
     ("adaptive", "factor", 0.0), ("adaptive", "eps", -1.0)],
)  # fmt: skip
def test_values_out_of_range_are_named(option: str, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{key} must be a number in .*, got {value}$"):
        make(option, **{key: value})([])
