"""Learning-rate schedules: the whole curve against its closed form, and the same curve after a stop half-way."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, LambdaLR, LRScheduler, OneCycleLR

import knep

CONF = Path(knep.__file__).parent / "conf" / "scheduler"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
BY_STEP = [option for option in OPTIONS if "monitor" not in OmegaConf.load(CONF / f"{option}.yaml")]
STEPS, EPOCH = 120, 10
RATES = (0.5, 0.02)
T = np.arange(STEPS)


def make(option: str, **hp: Any) -> Callable[..., Any]:
    cfg = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml"))
    assert isinstance(cfg, dict)
    node = {key: value for key, value in cfg.items() if key not in ("interval", "monitor")}
    return instantiate(node, _convert_="all", **hp)


def optimizer(**hp: Any) -> Optimizer:
    """Two groups with rates of their own, as layer-wise decay makes them."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in RATES]
    return torch.optim.SGD(groups, lr=1.0, **hp)


def walk(opt: Optimizer, scheduler: LRScheduler, steps: int) -> list[list[float]]:
    """The rates that `steps` optimizer steps use, one row a step."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in opt.param_groups])
        opt.step()
        scheduler.step()
    return rates


def factors(option: str, steps: int = STEPS, **hp: Any) -> np.ndarray:
    """The curve as shares of the base rate, after checking that all groups have the same."""
    opt = optimizer()
    scheduler = make(option, **hp)(opt, total_steps=steps, steps_per_epoch=EPOCH)
    shares = np.array(walk(opt, scheduler, steps)) / RATES
    np.testing.assert_allclose(shares[:, 0], shares[:, 1], rtol=1e-12, atol=1e-15)
    return shares[:, 0]


def equal(got: np.ndarray, expected: np.ndarray | float) -> None:
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=1e-12, atol=1e-15)


def rise(n: int) -> np.ndarray:
    return np.minimum(1, (T + 1) / n)


def constant() -> None:
    equal(factors("constant", warmup=0.0), 1.0)
    equal(factors("constant", warmup=0.1), rise(12))


def exponential() -> None:
    equal(factors("exponential"), 0.98 ** (T // EPOCH))
    equal(factors("exponential", gamma=0.5, warmup=0.25), rise(30) * 0.5 ** (T // EPOCH))


def step() -> None:
    equal(factors("step", every=3, gamma=0.2), 0.2 ** (T // EPOCH // 3))
    equal(factors("step", every=3, gamma=0.2, warmup=0.1), rise(12) * 0.2 ** (T // EPOCH // 3))


def multistep() -> None:
    equal(factors("multistep"), np.where(T < 60, 1, np.where(T < 90, 0.1, 0.01)))
    # 0.33 * 12 epochs = 3.96: the drop waits for the next epoch
    equal(factors("multistep", milestones=[0.33], gamma=0.5, warmup=0.05), rise(6) * np.where(T < 40, 1, 0.5))


def fall(warm: int) -> np.ndarray:
    """Share of the time after the warm-up that is over."""
    return np.maximum(0, T - warm) / (STEPS - warm)


def cosine() -> None:
    equal(factors("cosine", warmup=0.0), 0.5 * (1 + np.cos(np.pi * T / STEPS)))
    expected = rise(12) * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * fall(12))))
    equal(factors("cosine", warmup=0.1, final=0.1), expected)
    risen = np.where(T < 12, 0.3 + 0.7 * T / 12, 1)
    equal(factors("cosine", warmup=0.1, final=0.1, start=0.3), expected / rise(12) * risen)
    whole = np.where(T < 12, risen, 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * T / STEPS)))
    equal(factors("cosine", warmup=0.1, final=0.1, start=0.3, prefix=False), whole)
    by_epoch = factors("cosine", warmup=2 * EPOCH / STEPS, start=0.3, by_epoch=True)
    each_step = factors("cosine", warmup=2 * EPOCH / STEPS, start=0.3)
    equal(by_epoch, np.repeat(each_step[::EPOCH], EPOCH))


def cosine_restarts() -> None:
    """Three cycles of 16, 32 and 64 steps after 8 of warm-up, as torch's own scheduler has them."""
    opt = optimizer()
    upstream = walk(opt, CosineAnnealingWarmRestarts(opt, T_0=16, T_mult=2), 112)
    curve = factors("cosine_restarts", cycles=3, growth=2.0, warmup=8 / 120)
    equal(curve[:8], (T[:8] + 1) / 8)
    equal(curve[8:], np.array(upstream)[:, 0] / RATES[0])
    s = np.arange(48) / 48
    equal(factors("cosine_restarts", 96, cycles=2, growth=1.0, final=0.2)[48:], 0.6 + 0.4 * np.cos(np.pi * s))


def linear() -> None:
    equal(factors("linear", warmup=0.0), 1 - T / STEPS)
    equal(factors("linear", warmup=0.1, final=0.2), rise(12) * (1 - 0.8 * fall(12)))
    risen = np.where(T < 12, 0.2 + 0.8 * T / 12, 1)
    equal(factors("linear", warmup=0.1, final=0.2, start=0.2), risen * (1 - 0.8 * fall(12)))


def polynomial() -> None:
    equal(factors("polynomial", power=3.0, warmup=0.1, final=0.2), rise(12) * (0.2 + 0.8 * (1 - fall(12)) ** 3))


def one_cycle() -> None:
    """torch's OneCycleLR, rates and momentum, and its closed form."""
    ours, theirs = optimizer(momentum=0.9), optimizer(momentum=0.9)
    hp: dict[str, Any] = {"warmup": 0.25, "start": 0.1, "final": 1e-3}
    mine = make("one_cycle", **hp)(ours, total_steps=STEPS, steps_per_epoch=EPOCH)
    torchs = OneCycleLR(theirs, list(RATES), STEPS, pct_start=0.25, div_factor=10.0, final_div_factor=100.0)
    for _ in range(STEPS):
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert a["lr"] == pytest.approx(b["lr"], rel=1e-12)
            assert a["momentum"] == pytest.approx(b["momentum"], rel=1e-12)
        for opt, scheduler in ((ours, mine), (theirs, torchs)):
            opt.step()
            scheduler.step()
    up, down = T[:30] / 29, (T[30:] - 29) / 90
    expected = [0.55 - 0.45 * np.cos(np.pi * up), 0.5005 + 0.4995 * np.cos(np.pi * down)]
    equal(factors("one_cycle", **hp), np.concatenate(expected))


def warmup_stable_decay() -> None:
    curve = factors("warmup_stable_decay", warmup=0.1, decay=0.25, final=0.1)
    equal(curve, np.where(T < 90, rise(12), 0.1 + 0.9 * (120 - T) / 30))


def inverse_sqrt() -> None:
    equal(factors("inverse_sqrt", warmup=0.1), np.minimum((T + 1) / 12, np.sqrt(12 / (T + 1))))
    equal(factors("inverse_sqrt", warmup=0.0), 1 / np.sqrt(T + 1))


def cyclic() -> None:
    """torch's CyclicLR in its two triangular forms."""
    for decay, mode in ((1.0, "triangular"), (0.5, "triangular2")):
        opt = optimizer()
        low = [0.2 * lr for lr in RATES]
        upstream = CyclicLR(opt, low, list(RATES), step_size_up=15, mode=mode, cycle_momentum=False)  # type: ignore
        expected = np.array(walk(opt, upstream, STEPS))[:, 0] / RATES[0]
        curve = factors("cyclic", half_cycle=1.5, low=0.2, decay=decay)
        np.testing.assert_allclose(curve, expected, rtol=1e-9)
    triangle = 0.2 + 0.8 * (1 - np.abs((T % 30) / 15 - 1))
    equal(factors("cyclic", half_cycle=1.5, low=0.2), triangle)


def plateau() -> None:
    opt = optimizer()
    scheduler = make("plateau", factor=0.1, patience=1, threshold=0.0, final=0.05)(
        opt, total_steps=STEPS, steps_per_epoch=EPOCH
    )
    shares = []
    for loss in (3.0, 2.0, 2.0, 2.5, 1.9, 1.9, 1.9, 1.9, 1.9):
        scheduler.step(loss)
        shares.append([g["lr"] / lr for g, lr in zip(opt.param_groups, RATES, strict=True)])
    expected = [1, 1, 1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05]  # the second epoch without improvement lowers it
    np.testing.assert_allclose(shares, np.repeat(np.array(expected)[:, None], 2, 1), rtol=1e-12)


ROWS: dict[str, Callable[[], None]] = {
    "constant": constant,
    "exponential": exponential,
    "step": step,
    "multistep": multistep,
    "cosine": cosine,
    "cosine_restarts": cosine_restarts,
    "linear": linear,
    "polynomial": polynomial,
    "one_cycle": one_cycle,
    "warmup_stable_decay": warmup_stable_decay,
    "inverse_sqrt": inverse_sqrt,
    "cyclic": cyclic,
    "plateau": plateau,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option: str) -> None:
    ROWS[option]()


def test_none_leaves_the_rate() -> None:
    equal(factors("none"), 1.0)


def test_none_counts_its_steps_as_a_schedule_of_factor_1() -> None:
    states = []
    ours = make("none", total_steps=9, steps_per_epoch=3)
    for start in (ours, lambda opt: LambdaLR(opt, lambda step: 1.0)):
        opt = optimizer()
        scheduler = start(opt)
        walk(opt, scheduler, 7)
        assert scheduler.get_last_lr() == list(RATES)
        states.append(scheduler.state_dict())
    assert states[0] == states[1]


def stored(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize("option", BY_STEP)
def test_a_stop_half_way_changes_nothing(option: str) -> None:
    def start() -> tuple[Optimizer, LRScheduler]:
        opt = optimizer(momentum=0.9)
        return opt, make(option)(opt, total_steps=STEPS, steps_per_epoch=EPOCH)

    opt, scheduler = start()
    walk(opt, scheduler, 47)
    again, resumed = start()
    again.load_state_dict(stored(opt.state_dict()))
    resumed.load_state_dict(stored(scheduler.state_dict()))
    assert walk(again, resumed, STEPS - 47) == walk(opt, scheduler, STEPS - 47)
    assert again.param_groups[0]["momentum"] == opt.param_groups[0]["momentum"]


def test_plateau_resumes_with_its_count() -> None:
    opt = optimizer()
    scheduler = make("plateau", patience=1)(opt, total_steps=STEPS, steps_per_epoch=EPOCH)
    for loss in (1.0, 1.0):
        scheduler.step(loss)
    again = optimizer()
    resumed = make("plateau", patience=1)(again, total_steps=STEPS, steps_per_epoch=EPOCH)
    again.load_state_dict(stored(opt.state_dict()))
    resumed.load_state_dict(stored(scheduler.state_dict()))
    resumed.step(1.0)
    assert again.param_groups[0]["lr"] == pytest.approx(0.3 * RATES[0])


@pytest.mark.parametrize("option", BY_STEP)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_short_runs_and_steps_past_the_end_have_a_rate(option: str, steps: int) -> None:
    opt = optimizer(momentum=0.9)
    scheduler = make(option)(opt, total_steps=steps, steps_per_epoch=1)
    rates = np.array(walk(opt, scheduler, steps + 5))
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert (rates <= np.array(RATES) * (1 + 1e-12)).all()
    assert (rates[0] > 0).all()


def test_one_cycle_moves_only_momentum_that_is_there() -> None:
    plain = optimizer()
    make("one_cycle")(plain, total_steps=STEPS, steps_per_epoch=EPOCH)
    assert plain.param_groups[0]["momentum"] == 0
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(1))], betas=(0.9, 0.99))
    make("one_cycle", momentum_high=0.97)(adam, total_steps=STEPS, steps_per_epoch=EPOCH)
    assert adam.param_groups[0]["betas"] == (0.97, 0.99)
    kept = optimizer(momentum=0.9)
    make("one_cycle", cycle_momentum=False)(kept, total_steps=STEPS, steps_per_epoch=EPOCH)
    assert kept.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [("constant", "warmup", 1.0), ("exponential", "gamma", 0), ("step", "every", 0), ("step", "gamma", 2),
     ("multistep", "milestones", [30]), ("cosine", "final", -1), ("cosine", "start", 2), ("linear", "start", -1),
     ("cosine_restarts", "cycles", 0),
     ("cosine_restarts", "growth", 0.5), ("linear", "warmup", -0.1), ("polynomial", "power", 0),
     ("one_cycle", "start", 2), ("one_cycle", "momentum_high", 1.0), ("warmup_stable_decay", "decay", 1.5),
     ("warmup_stable_decay", "warmup", 0.9), ("inverse_sqrt", "warmup", "long"), ("cyclic", "half_cycle", 0),
     ("cyclic", "low", 2), ("plateau", "factor", 1.0), ("plateau", "patience", -1)],
)  # fmt: skip
def test_values_out_of_range_are_named(option: str, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}.* must be a number in .*, got "):
        make(option, **{key: value})(optimizer(), total_steps=STEPS, steps_per_epoch=EPOCH)
