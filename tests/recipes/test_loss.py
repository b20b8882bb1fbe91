"""Losses: each against its formula, worked out anew in float64, with what is left out and what weighs more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

import knep
from knep.errors import InputError
from knep.recipes.loss import Bound, balanced_weights, bound, wants_counts

CONF = Path(knep.__file__).parent / "conf" / "loss"


def make(option: str, **hp: Any) -> Callable[..., Tensor]:
    return instantiate(OmegaConf.load(CONF / f"{option}.yaml"), _convert_="all", **hp)


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


SCORES, CLASSES = drawn(40, 5), torch.arange(40) % 5
PIXELS, MASKS = drawn(3, 4, 6, 7), torch.arange(3 * 42).reshape(3, 6, 7) % 5 - 1  # -1 is left out
LABELS, HELD = drawn(30, 4), (drawn(30, 4, seed=1) > 1).double()
NUMBERS, TRUE = drawn(50, 2), drawn(50, 2, seed=2)
WEIGHTS = [0.5, 1.0, 2.0, 4.0, 0.25]


def softmax(scores: Tensor) -> Tensor:
    e = (scores - scores.amax(1, keepdim=True)).exp()
    return e / e.sum(1, keepdim=True)


def of_true(scores: Tensor, target: Tensor) -> Tensor:
    """The probability given to each true class, 1 where it is left out."""
    p = softmax(scores).gather(1, target.clamp_min(0)[:, None])[:, 0]
    return torch.where(target >= 0, p, 1.0)


def of_held(scores: Tensor, target: Tensor) -> Tensor:
    p = 1 / (1 + (-scores).exp())
    return torch.where(target == 1, p, 1 - p)


def agree(
    loss: Callable[..., Tensor], output: Tensor, target: Tensor, wanted: Tensor, count: int | None = None
) -> None:
    """Elements, sum and mean are those of the formula, and its slope is that of finite differences."""
    torch.testing.assert_close(loss(output, target, reduction="none"), wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss(output, target, reduction="sum"), wanted.sum(), rtol=1e-9, atol=1e-11)
    mean = wanted.sum() / (wanted.numel() if count is None else count)
    torch.testing.assert_close(loss(output, target), mean, rtol=1e-9, atol=1e-11)
    few = output[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target[:2]), (few,))


def cross_entropy_is_minus_log_p() -> None:
    loss = make("cross_entropy")
    agree(loss, SCORES, CLASSES, -of_true(SCORES, CLASSES).log())
    agree(loss, PIXELS, MASKS, -of_true(PIXELS, MASKS).log(), int((MASKS >= 0).sum()))
    q = softmax(drawn(40, 5, seed=3))
    agree(loss, SCORES, q, -(q * softmax(SCORES).log()).sum(1))
    smoothed = -0.9 * of_true(SCORES, CLASSES).log() - 0.1 * softmax(SCORES).log().mean(1)
    torch.testing.assert_close(loss(SCORES, CLASSES, label_smoothing=0.1, reduction="none"), smoothed)
    weighted = make("cross_entropy", class_weight=WEIGHTS)
    factors = torch.tensor(WEIGHTS, dtype=torch.float64)
    agree(weighted, SCORES, CLASSES, -factors[CLASSES] * of_true(SCORES, CLASSES).log())
    agree(weighted, SCORES, q, -(q * softmax(SCORES).log()).sum(1) * (q * factors).sum(1))
    assert loss(PIXELS, torch.full_like(MASKS, -1)) == 0  # and no number that is none


def focal_hardly_counts_what_is_right() -> None:
    for gamma in (0.0, 0.5, 2.0):
        loss, p = make("focal", gamma=gamma), of_true(SCORES, CLASSES)
        agree(loss, SCORES, CLASSES, -((1 - p) ** gamma) * p.log())
        p = of_held(LABELS, HELD)
        agree(loss, LABELS, HELD, -((1 - p) ** gamma) * p.log())
    alpha = torch.where(HELD == 1, 0.25, 0.75)
    agree(make("focal", alpha=0.25), LABELS, HELD, -alpha * (1 - p) ** 2 * p.log())
    sure = torch.tensor([[100.0, 0.0]], requires_grad=True)
    make("focal", gamma=0.5)(sure, torch.tensor([0])).backward()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()
    with pytest.raises(InputError, match="class_weight"):
        make("focal", alpha=0.25)(SCORES, CLASSES)


def asymmetric_lets_go_of_easy_negatives() -> None:
    p = 1 / (1 + (-LABELS).exp())
    shifted = (p - 0.05).clamp(min=0)
    wanted = torch.where(HELD == 1, -(1 - p) * p.log(), -(shifted**4) * (1 - shifted).log())
    agree(make("asymmetric"), LABELS, HELD, wanted)
    assert ((HELD == 0) & (p < 0.05)).sum() > 5  # which count for nothing
    bce = make("bce")(LABELS, HELD, reduction="none")
    plain = make("asymmetric", gamma_positive=0.0, gamma_negative=0.0, margin=0.0)
    torch.testing.assert_close(plain(LABELS, HELD, reduction="none"), bce, rtol=1e-6, atol=1e-7)


def poly_adds_epsilon_times_what_is_missing() -> None:
    p = of_true(SCORES, CLASSES)
    agree(make("poly", epsilon=1.5), SCORES, CLASSES, -p.log() + 1.5 * (1 - p))
    p = of_true(PIXELS, MASKS)
    agree(make("poly"), PIXELS, MASKS, -p.log() + (1 - p), int((MASKS >= 0).sum()))
    p = of_held(LABELS, HELD)
    agree(make("poly"), LABELS, HELD, -p.log() + (1 - p))


def logit_adjusted_adds_the_shares() -> None:
    counts = torch.tensor([100.0, 10.0, 1.0, 50.0, 39.0])
    moved = SCORES + 0.7 * (counts.double() / 200).log()
    agree(make("logit_adjusted", tau=0.7, counts=counts), SCORES, CLASSES, -of_true(moved, CLASSES).log())
    with pytest.raises(InputError, match="needs the counts"):
        make("logit_adjusted")(SCORES, CLASSES)


def one_vs_all_is_timms() -> None:
    from timm.loss import BinaryCrossEntropy  # the published one, beside the formula

    p = 1 / (1 + (-SCORES).exp())
    hot = torch.nn.functional.one_hot(CLASSES, 5).double()
    agree(make("one_vs_all"), SCORES, CLASSES, -(hot * p.log() + (1 - hot) * (1 - p).log()).mean(1))
    some = torch.where(CLASSES == 2, -1, CLASSES)  # 2 is left out
    assert make("one_vs_all")(SCORES, some, reduction="none")[2] == 0
    shares = softmax(drawn(40, 5, seed=3))
    for more in ({}, {"target_threshold": 0.2}, {"sum_classes": True}):
        theirs = BinaryCrossEntropy(smoothing=0.0, **more)(SCORES, shares)
        torch.testing.assert_close(make("one_vs_all", **more)(SCORES, shares), theirs, rtol=1e-6, atol=1e-9)
    theirs = BinaryCrossEntropy(smoothing=0.1)(SCORES, CLASSES)
    torch.testing.assert_close(make("one_vs_all")(SCORES, CLASSES, label_smoothing=0.1), theirs, rtol=1e-6, atol=1e-9)


def bce_is_of_each_label() -> None:
    p = of_held(LABELS, HELD)
    agree(make("bce"), LABELS, HELD, -p.log())
    agree(make("bce", class_weight=[0.5, 3.0]), LABELS, HELD, -torch.where(HELD == 1, 3.0, 0.5) * p.log())
    yes = 1 / (1 + (-LABELS).exp())
    soft = HELD * 0.8 + 0.1
    smoothed = -soft * yes.log() - (1 - soft) * (1 - yes).log()
    torch.testing.assert_close(make("bce")(LABELS, HELD, label_smoothing=0.2, reduction="none"), smoothed)


def mse_is_the_square() -> None:
    agree(make("mse"), NUMBERS, TRUE, (NUMBERS - TRUE) ** 2)


def mae_is_the_size() -> None:
    agree(make("mae"), NUMBERS, TRUE, (NUMBERS - TRUE).abs())


def huber_is_square_near_and_straight_beyond() -> None:
    e = (NUMBERS - TRUE).abs()
    agree(make("huber", delta=1.5), NUMBERS, TRUE, torch.where(e <= 1.5, e**2 / 2, 1.5 * (e - 0.75)))


def quantile_has_its_minimum_there() -> None:
    e = TRUE - NUMBERS
    agree(make("quantile", q=0.9), NUMBERS, TRUE, torch.where(e > 0, 0.9 * e, -0.1 * e))
    values = drawn(1001, seed=5)
    at = torch.tensor(
        [make("quantile", q=0.9)(values.new_full((1001,), float(c)), values) for c in values.sort().values]
    )
    assert abs(int(at.argmin()) - 900) <= 1


def dice_is_the_overlap() -> None:
    there = (MASKS >= 0)[:, None].double()
    p = softmax(PIXELS) * there
    g = torch.stack([(k == MASKS).double() for k in range(4)], 1)
    overlap, size = (p * g).sum((2, 3)), (p**2).sum((2, 3)) + (g**2).sum((2, 3))
    agree(make("dice", smooth=2.0), PIXELS, MASKS, 1 - ((2 * overlap + 2) / (size + 2)).mean(1))
    sure = torch.stack([(k == MASKS).double() for k in range(4)], 1) * 100
    assert make("dice")(sure, MASKS) == pytest.approx(0, abs=1e-6)


ROWS = {
    "asymmetric": asymmetric_lets_go_of_easy_negatives,
    "bce": bce_is_of_each_label,
    "one_vs_all": one_vs_all_is_timms,
    "cross_entropy": cross_entropy_is_minus_log_p,
    "dice": dice_is_the_overlap,
    "focal": focal_hardly_counts_what_is_right,
    "huber": huber_is_square_near_and_straight_beyond,
    "logit_adjusted": logit_adjusted_adds_the_shares,
    "mae": mae_is_the_size,
    "mse": mse_is_the_square,
    "poly": poly_adds_epsilon_times_what_is_missing,
    "quantile": quantile_has_its_minimum_there,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option: str) -> None:
    ROWS[option]()


@pytest.mark.parametrize(
    ("option", "hp"),
    [
        ("focal", {"gamma": -1}),
        ("asymmetric", {"margin": 1.0}),
        ("poly", {"epsilon": -2}),
        ("logit_adjusted", {"tau": -1}),
        ("huber", {"delta": 0}),
        ("quantile", {"q": 1.0}),
        ("dice", {"smooth": -1}),
        ("cross_entropy", {"class_weight": [1.0, 2.0]}),
    ],
)
def test_what_is_out_of_range_is_refused(option: str, hp: dict[str, Any]) -> None:
    masks, numbers = option in ("dice", "cross_entropy"), option in ("huber", "quantile")
    x, y = (PIXELS, MASKS) if masks else (NUMBERS, TRUE) if numbers else (LABELS, HELD)
    with pytest.raises(InputError):
        make(option, **hp)(x, y)


def test_balanced_weights_have_mean_one_over_the_rows() -> None:
    counts = torch.tensor([90.0, 9.0, 1.0])
    weights = balanced_weights(counts)
    torch.testing.assert_close(weights, torch.tensor([100 / 270, 100 / 27, 100 / 3]))
    assert (weights * counts).sum() == pytest.approx(100)
    assert balanced_weights(torch.tensor([4.0, 0.0])).tolist() == [0.5, 0.0]
    labels = balanced_weights(torch.tensor([[90.0, 50.0], [10.0, 50.0]]))
    torch.testing.assert_close(labels, torch.tensor([[100 / 180, 1.0], [5.0, 1.0]]))


def test_auto_is_replaced_by_what_was_counted() -> None:
    auto = make("cross_entropy", class_weight="auto")
    assert wants_counts(auto)
    assert wants_counts(make("logit_adjusted"))
    assert not wants_counts(make("cross_entropy"))
    counts = torch.tensor([90.0, 9.0, 1.0])
    made = bound(auto, counts)
    assert isinstance(made, Bound)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    given = make("cross_entropy", class_weight=balanced_weights(counts).tolist())
    torch.testing.assert_close(made(x, y), given(x, y))
    assert bound(make("auto")) is None
    with pytest.raises(InputError, match="give images="):
        bound(auto)
    with pytest.raises(InputError, match="needs the counts"):
        auto(x, y)
