"""What stands around an optimizer: each against its paper's formula, in any order, saved and loaded to the bit."""

import copy
import io

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn

from knep.config.compose import compose_config
from knep.config.schema import config_hash
from knep.engine.apply_recipe import Recipe
from knep.errors import InputError
from knep.optim.param_groups import param_groups
from knep.optim.wrap import wrapped, wraps_of
from tests.exhaustive import resume_matrix
from tests.recipes.test_optimizer import OPTIONS, TRAINING, closure_for, make, net, train

ALL = ["centralize", "cautious", "lookahead"]
DRAW = np.random.default_rng(0)
GRADS = [DRAW.normal(size=(4, 3)) for _ in range(7)]


def stepped(optimizer_of, asked, grads=GRADS):
    """The weights after each step with these gradients."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    first = weight.detach().numpy().copy()
    optimizer = wrapped(optimizer_of([weight]), asked)
    seen = []
    for g in grads:
        weight.grad = torch.tensor(g)
        optimizer.step()
        seen.append(weight.detach().numpy().copy())
    return first, seen


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.2)


def test_centralize_takes_the_mean_of_each_filter_out():
    """Yong et al. 2020, eq. 1; equal to SGD on gradients that were centralized by hand."""
    _, seen = stepped(sgd, ["centralize"])
    _, wanted = stepped(sgd, [], [g - g.mean(1, keepdims=True) for g in GRADS])
    np.testing.assert_allclose(seen, wanted, rtol=1e-12)
    conv = nn.Conv2d(2, 3, 3)
    for p in conv.parameters():
        p.grad = torch.randn_like(p)
    was, bias = conv.weight.grad.clone(), conv.bias.grad.clone()
    wrapped(torch.optim.SGD(conv.parameters(), lr=0.0), ["centralize"]).step()
    torch.testing.assert_close(conv.weight.grad, was - was.mean((1, 2, 3), keepdim=True))
    assert torch.equal(conv.bias.grad, bias)


def test_cautious_is_the_papers_adamw():
    """Liang et al. 2024, algorithm 1, worked out in numpy; and the library's own AdamW with cautious=True."""
    w, seen = stepped(adamw, ["cautious"])
    m = v = 0.0
    for t, (g, found) in enumerate(zip(GRADS, seen, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        mask = u * g > 0
        w = w * (1 - 0.1 * 0.2) - 0.1 * u * mask * (mask.size / (mask.sum() + 1))
        np.testing.assert_allclose(found, w, rtol=1e-9)
    lion = lambda params: pytorch_optimizer.Lion(params, lr=0.1, weight_decay=0.2, **more)  # noqa: E731
    more = {"cautious": True}
    _, wanted = stepped(lion, [])
    more = {}
    _, found = stepped(lion, ["cautious"])
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_lookahead_goes_back_to_alpha_of_the_way():
    """Zhang et al. 2019, algorithm 1, in numpy, and the library's wrapper."""
    w, seen = stepped(sgd, [{"lookahead": {"k": 3, "alpha": 0.4}}])
    slow, buffer = w, 0.0
    for t, (g, found) in enumerate(zip(GRADS, seen, strict=True), start=1):
        buffer = 0.9 * buffer + g
        w = w - 0.1 * buffer
        if t % 3 == 0:
            slow = slow + 0.4 * (w - slow)
            w = slow
        np.testing.assert_allclose(found, w, rtol=1e-12)
    _, theirs = stepped(lambda p: pytorch_optimizer.Lookahead(sgd(p), k=3, alpha=0.4), [])
    np.testing.assert_allclose(seen, theirs, rtol=1e-12)


def test_the_order_counts():
    for a, b in ((["centralize", "cautious"], ["cautious", "centralize"]), (["cautious", "lookahead"], ALL[:0:-1])):
        one, other = (stepped(adamw, asked)[1][-1] for asked in (a, b))
        assert np.abs(one - other).max() > 1e-6


def wrapped_option(option, model):
    asked = ["centralize"] if option == "schedule_free" else ALL
    return wrapped(make(option, model), asked)


@pytest.mark.parametrize("option", OPTIONS)
def test_any_optimizer_goes_on_to_the_bit_from_its_saved_state(option):
    model = net()
    optimizer = wrapped_option(option, model)
    train(model, optimizer, range(7))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    twin = copy.deepcopy(model)
    resumed = wrapped_option(option, twin)
    resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for m, o in ((model, optimizer), (twin, resumed)):
        train(m, o, range(7, 14))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("option", TRAINING)
def test_a_wrapped_optimizer_learns(option):
    model = net()
    optimizer = wrapped_option(option, model)
    first = closure_for(model, optimizer, 0)().item()
    for _ in range(60):
        optimizer.step(closure_for(model, optimizer, 0))
    assert closure_for(model, optimizer, 0)().item() < 0.95 * first


def test_a_step_that_raises_leaves_the_decay_and_the_next_step_as_they_were():
    model = net()
    optimizer = wrapped(make("adamw", model), ALL)
    decays = [g["weight_decay"] for g in optimizer.param_groups]

    def bad():
        raise RuntimeError("a bad batch")

    with pytest.raises(RuntimeError):
        optimizer.step(bad)
    train(model, optimizer, range(2))
    assert [g["weight_decay"] for g in optimizer.param_groups] == decays
    plain = copy.deepcopy(optimizer)
    assert isinstance(plain, torch.optim.AdamW)
    assert type(plain).wraps is type(optimizer).wraps


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["lookahead", {"lookahead": {"k": 6}}], "optimizer.wrap has lookahead twice"),
        (["cautios"], "optimizer.wrap=cautios is unknown: write some of centralize, cautious, lookahead"),
        ("cautious", "write optimizer.wrap=[cautious]"),
        ([{"lookahead": {"steps": 6}}], "lookahead takes k and alpha alone, not steps"),
        ([{"cautious": {"k": 6}}], "cautious takes no key, not k"),
        ([{"lookahead": {"k": 0}}], "lookahead.k must be"),
        ([{"lookahead": {"alpha": 2.0}}], "lookahead.alpha must be"),
    ],
)
def test_what_is_no_wrap_is_refused(asked, said):
    with pytest.raises(InputError) as found:
        wraps_of(asked)
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_schedule_free_takes_no_wrap_of_its_weights():
    with pytest.raises(InputError, match=r"write optimizer\.wrap=\[centralize\]"):
        wrapped(make("schedule_free", net()), ["lookahead"])


def test_it_is_a_key_of_every_optimizer_that_no_stored_hash_knows():
    config = compose_config(["recipe=none", "optimizer=momentum", "optimizer.wrap=[centralize,lookahead]"]).config
    model = net()
    optimizer = Recipe.from_config(config).optimizer(model)
    assert isinstance(optimizer, torch.optim.SGD)
    train(model, optimizer, range(1))
    assert {"momentum_buffer", "lookahead_slow"} <= set(optimizer.state[model[0].weight])
    plain = compose_config(["recipe=none", "optimizer=momentum"]).config
    assert plain["optimizer"]["wrap"] == []
    assert config_hash(plain) != config_hash(config)
    groups = param_groups(model, lr=0.1, weight_decay=0.1)
    assert type(wrapped(torch.optim.SGD(groups, lr=0.1), [])) is torch.optim.SGD


def test_several_decays_are_typed_as_a_list_of_numbers_and_go_with_no_rollback():
    lines = ["recipe=none", "averaging=ema"]
    assert compose_config([*lines, "averaging.decay=[0.9,0.99]"]).config["averaging"]["decay"] == [0.9, 0.99]
    for odd, said in (
        (["averaging.decay=[0.9,much]"], "write a number"),
        (["averaging.decay=[]"], "write a number"),
        (["averaging.decay=[0.9,0.99]", "guard=rollback"], "write averaging.decay=0.999, or guard=skip"),
    ):
        with pytest.raises(InputError, match=said):
            compose_config([*lines, *odd])


@pytest.mark.parametrize("row", ["optimizer.wrap=[centralize,cautious,lookahead]", "optimizer=sam"])
def test_a_kill_changes_nothing(row, tmp_path, monkeypatch):
    monkeypatch.setitem(resume_matrix.BESIDE, "optimizer=sam", ("optimizer.wrap=[centralize,{lookahead:{k:3}}]",))
    assert resume_matrix.try_row(row, "inside", tmp_path) == "identical"
