"""What holds for every input, tried by hypothesis: schedules, split, scaling, clip. Draws are the same in every run."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knep.data.splits import stratified, subset
from knep.recipes import clip, scaling, scheduler

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=40)
NAMES = "constant exponential step multistep cosine cosine_restarts linear polynomial one_cycle warmup_stable_decay"
SCHEDULES = {name: getattr(scheduler, name) for name in [*NAMES.split(), "inverse_sqrt", "cyclic"]}


def rates(make, total, per_epoch, lr, **options):
    """The learning rate of each step of a run."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=lr)
    schedule = make(optimizer, total_steps=total, steps_per_epoch=per_epoch, **options)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@fixed
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 200), st.integers(1, 40), st.floats(1e-6, 1e3))
def test_a_rate_is_finite_and_not_negative(name, total, per_epoch, lr):
    found = rates(SCHEDULES[name], total, min(per_epoch, total), lr)
    assert all(math.isfinite(rate) and rate >= 0 for rate in found)
    assert max(found) > 0


WARMED = ("constant", "cosine", "linear", "inverse_sqrt", "polynomial")


@fixed
@given(st.sampled_from(WARMED), st.integers(2, 200), st.floats(0, 0.99))
def test_a_warm_up_climbs_to_the_rate(name, total, warmup):
    found = rates(SCHEDULES[name], total, 1, 0.5, warmup=warmup)
    warm = min(round(warmup * total), total - 1)
    assert all(a < b for a, b in itertools.pairwise(found[:warm]))
    assert max(found) <= 0.5 * (1 + 1e-9)
    if warm:
        assert math.isclose(found[warm - 1], 0.5, rel_tol=1e-9)


labels = st.lists(st.integers(0, 4), min_size=2, max_size=80).map(
    lambda y: torch.tensor(y + sorted(set(y)))  # each class at least twice
)


@fixed
@given(labels, st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_a_split_is_whole_disjoint_and_stratified(y, share, seed):
    stay, off = stratified(y, share, seed)
    assert sorted(stay.tolist() + off.tolist()) == list(range(len(y)))
    for k in y.unique():
        count, taken = int((y == k).sum()), int((y[off] == k).sum())
        assert 1 <= taken < count
        assert abs(taken - share * count) <= 1
    assert all(torch.equal(a, b) for a, b in zip((stay, off), stratified(y, share, seed), strict=True))


@fixed
@given(st.lists(st.integers(0, 3), min_size=4, max_size=80), st.integers(4, 100), st.integers(0, 9))
def test_a_subset_keeps_the_proportions(y, limit, seed):
    y = torch.tensor(sorted([*y, 0, 1, 2, 3]))
    index = subset(y, limit, seed)
    assert len(index) == min(limit, len(y))
    assert index.tolist() == sorted(set(index.tolist()))
    for k in range(4):
        exact = len(index) * float((y == k).float().mean())
        assert abs(int((y[index] == k).sum()) - exact) <= 4


images = st.tuples(st.integers(1, 4), st.sampled_from((1, 3)), st.integers(1, 6), st.integers(0, 2**31)).map(
    lambda t: torch.randint(0, 256, (t[0], t[1], t[2], t[2]), generator=torch.Generator().manual_seed(t[3])).byte()
)


@fixed
@given(images)
def test_scalings_have_their_range_and_an_inverse(x):
    for make, low, high in ((scaling.unit, 0, 1), (scaling.symmetric, -1, 1)):
        y = make([x])(x)
        assert float(y.min()) >= low
        assert float(y.max()) <= high
        back = (y - low) * 255 / (high - low)
        assert torch.equal(back.round().byte(), x)


@fixed
@given(images)
def test_standardize_centres(x):
    module = scaling.standardize([x])
    y = module(x).double()
    assert y.isfinite().all()
    assert y.mean((0, 2, 3)).abs().max() < 1e-3
    assert (y.var((0, 2, 3), unbiased=False) <= 1.01).all()


gradients = st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6), min_size=1, max_size=4)


def with_gradients(values):
    parameters = [torch.nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(parameters, values, strict=True):
        p.grad = torch.tensor(v)
    return parameters


def flat(parameters):
    return torch.cat([p.grad for p in parameters]).double()


@fixed
@given(gradients, st.floats(1e-3, 1e3))
def test_a_clipped_gradient_is_no_longer_than_theta_and_keeps_its_direction(values, theta):
    parameters = with_gradients(values)
    before = flat(parameters)
    clip.norm(parameters, theta=theta)
    after = flat(parameters)
    assert after.norm() <= theta * (1 + 1e-5)
    assert torch.allclose(after * before.norm(), before * after.norm(), rtol=1e-4, atol=1e-4 * float(before.norm()))
    if before.norm() < theta:
        assert torch.equal(after, before)


@fixed
@given(gradients, st.floats(1e-3, 1e3))
def test_values_are_clipped_one_by_one(values, theta):
    parameters = with_gradients(values)
    before = flat(parameters)
    clip.value(parameters, theta=theta)
    assert torch.allclose(flat(parameters), before.clamp(-theta, theta), rtol=1e-6)
