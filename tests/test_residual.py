"""Stochastic depth on blocks as people write them: what is proved is dropped, what is not is refused by name."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import ops

from knep.errors import InputError, NoEffectError
from knep.nn.dropout import StochasticDepth
from knep.recipes import dropout
from knep.surgery.edit import modules_of


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)


class Plain(Block):
    def forward(self, x):
        return x + self.b(self.a(x).relu())


class InPlace(Block):
    def forward(self, x):
        identity = x
        out = self.b(self.a(x).relu())
        out += identity
        return out


class Functional(Block):
    def forward(self, x):
        return F.gelu(self.a(x)) + x


class Method(Block):
    def forward(self, x):
        return x.add(self.a(x).relu())


class Keyword(Block):
    def forward(self, x):
        return torch.add(x, other=self.a(x).relu(), alpha=2)


class Optional(Block):
    def forward(self, x, mask=None, *, scale=1.0):
        y = self.a(x)
        if mask is not None:
            y = y * mask
        return x + y.relu() * scale


class WithMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = Optional()

    def forward(self, x):
        return self.f(x, x > 0, scale=0.5)


class FunctionalDropout(Block):
    def forward(self, x):
        return x + F.dropout(self.a(x).relu(), 0.5, self.training)


class ByMode(Block):
    def forward(self, x):
        y = self.a(x).relu()
        return x + (y * 0.5 if self.training else y)


class TwoSums(Block):
    def forward(self, x):
        x = x + self.a(self.norm(x))
        return x + self.b(self.norm(x)).relu()


class Shared(Block):
    """One layer ends two branches: each gets a rate of its own."""

    def forward(self, x):
        x = x + self.a(self.norm(x))
        return x + self.a(self.norm(x))


class Parallel(Block):
    def forward(self, x):
        h = self.norm(x)
        return x + self.a(h) + self.b(h).tanh()


class OwnWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x + x @ self.w


class Scaled(Block):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x):
        return x + self.gamma * self.a(self.norm(x))


class Mixed(nn.Module):
    """A branch without a weight matrix, beside a shortcut that is a module, as in PoolFormer."""

    def __init__(self):
        super().__init__()
        self.norm, self.pool, self.same = nn.LayerNorm(8), nn.AvgPool1d(3, 1, 1), nn.Identity()

    def forward(self, x):
        return self.same(x) + self.pool(self.norm(x))


class Pair(Block):
    def forward(self, pair):
        x, other = pair
        return x + self.a(x).relu(), other


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = Pair()

    def forward(self, x):
        return self.f((x, 2 * x))[0]


class OverChildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        y = x
        for child in self.children():
            y = child(y)
        return x + y


class InSequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8)))

    def forward(self, x):
        return x + self.f(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)

    def forward(self, x):
        return self.layer(x[:, None])[:, 0]


class Projected(Block):
    """The shortcut is a layer too; the branch has more of them."""

    def forward(self, x):
        return self.a(x) + self.b(self.norm(F.linear(x, self.b.weight))).relu()


class OnValues(Block):
    def forward(self, x):
        return x + self.a(x).relu() if x.sum() < 1e9 else x


class OnTypes(Block):
    def forward(self, x):
        y = self.a(x).relu()
        return x + (2 * y if isinstance(x, torch.Tensor) else y)


class HiddenSum(Block):
    def forward(self, x):
        return x + self.a(x).relu() if isinstance(x, torch.Tensor) else x


class Twins(Block):
    def forward(self, x):
        return self.a(x) + self.b(x)


class Highway(Block):
    def forward(self, x):
        t = self.a(x).sigmoid()
        return t * self.b(x) + (1 - t) * x


class Table(Block):
    """What is added starts from no signal."""

    def forward(self, x):
        return self.a(x) + self.b.bias


class Rotated(Block):
    """Two sides of which neither is a shortcut, as attention with positions has them."""

    def forward(self, x):
        q, k = self.a(x).chunk(2, -1)
        return torch.cat([q * k + q @ self.b.weight[:4, :4], q], -1)


class Net(nn.Module):
    """Its own forward cannot be read, which must spoil nothing inside it."""

    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        if x.shape[0] < 1:
            return x
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


PROVED = {
    Plain: 2,
    InPlace: 2,
    Functional: 2,
    Method: 2,
    Keyword: 2,
    Optional: 2,
    WithMask: 2,
    FunctionalDropout: 2,
    ByMode: 2,
    TwoSums: 4,
    Shared: 4,
    Parallel: 4,
    OwnWeight: 2,
    Scaled: 2,
    Mixed: 2,
    Pairs: 2,
    OverChildren: 2,
    InSequence: 2,
    Encoder: 4,
}


def run(net, x, training):
    torch.manual_seed(0)
    return net.train(training)(x)


def skip_all(net):
    for _, m in modules_of(net, StochasticDepth):
        m.p = 1.0
    return net.train()


@pytest.mark.parametrize("block", PROVED)
def test_a_branch_is_found_and_can_be_skipped(block):
    net, x = Net(block), torch.randn(4, 8)
    plain = copy.deepcopy(net)
    changes = dropout.stochastic_depth(net, sample=x, p=0.0)
    assert len(changes) == PROVED[block]
    assert net.state_dict().keys() == plain.state_dict().keys()
    for training in (True, False):
        assert torch.equal(run(net, x, training), run(plain, x, training))
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for twin in (net, *twins):
        assert torch.equal(skip_all(twin)(x), net.fc(x))


@pytest.mark.parametrize("block", [Plain, Functional, TwoSums, Scaled])
def test_without_a_sample_the_same_is_found_and_the_unread_forward_listed(block):
    net, x = Net(block), torch.randn(4, 8)
    *found, root = dropout.stochastic_depth(net, p=0.5)
    assert len(found) == PROVED[block]
    assert root.path == ""
    assert root.after.startswith("left as it is: torch.fx cannot read its forward")
    assert torch.equal(skip_all(net)(x), net.fc(x))


def test_the_rate_rises_with_the_order_of_execution():
    class Backwards(Net):
        def forward(self, x):
            return self.fc(self.blocks[0](self.blocks[1](x)))

    net = Backwards(TwoSums)
    dropout.stochastic_depth(net, sample=torch.randn(4, 8), p=0.8)
    rates = {name: [m.p for _, m in modules_of(block, StochasticDepth)] for name, block in net.blocks.named_children()}
    assert {name: sorted(r) for name, r in rates.items()} == {
        "1": pytest.approx([0.2, 0.4]),
        "0": pytest.approx([0.6, 0.8]),
    }


def test_a_block_that_is_called_twice_has_the_rate_of_its_first_call():
    class Again(Net):
        def forward(self, x):
            return self.fc(self.blocks[0](self.blocks[1](self.blocks[0](x))))

    net = Again(Plain)
    assert len(dropout.stochastic_depth(net, sample=torch.randn(4, 8), p=0.8)) == 2
    assert [m.p for _, m in modules_of(net, StochasticDepth)] == pytest.approx([0.4, 0.8])


def test_a_shortcut_with_weights_stays_and_the_larger_side_is_dropped():
    net, x = Net(Projected), torch.randn(4, 8)
    dropout.stochastic_depth(net, sample=x)
    first, second = net.blocks
    assert torch.equal(skip_all(net)(x), net.fc(second.a(first.a(x))))


def test_the_model_itself_may_be_a_block():
    net, x = Functional(), torch.randn(4, 8)
    (change,) = dropout.stochastic_depth(net, sample=x)
    assert change.path == "stochastic_depth"
    assert torch.equal(skip_all(net)(x), x)


def test_gradients_flow_and_compiled_models_are_unwrapped():
    net, x = Net(Functional), torch.randn(4, 8)
    changes = dropout.stochastic_depth(torch.compile(net), sample=x, p=0.1)  # type: ignore[arg-type]
    assert [c.path for c in changes] == [f"blocks.{i}.stochastic_depth" for i in (0, 1)]
    net(x).sum().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if ".b." not in n and "norm" not in n)


class DropPath(nn.Module):
    """As many projects have it."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class WithDropPath(Block):
    def __init__(self):
        super().__init__()
        self.drop_path = DropPath(0.1)

    def forward(self, x):
        return x + self.drop_path(self.a(x).relu())


class WithOwn(WithDropPath):
    def __init__(self):
        super().__init__()
        self.drop_path = ops.StochasticDepth(0.1, "batch")


@pytest.mark.parametrize("block", [WithDropPath, WithOwn])
def test_a_stochastic_depth_of_the_models_own_gets_the_rate(block):
    net = Net(block)
    net.blocks.append(Functional())  # and a branch without one gets one
    changes = dropout.stochastic_depth(net, sample=torch.randn(4, 8), p=0.9)
    assert [c.path for c in changes] == ["blocks.0.drop_path", "blocks.1.drop_path", "blocks.2.stochastic_depth"]
    assert [m.p for _, m in modules_of(net, StochasticDepth)] == pytest.approx([0.3, 0.6, 0.9])
    assert net.blocks[0].drop_path.mode == ("batch" if block is WithOwn else "row")


@pytest.mark.parametrize("block", [Functional, InPlace, Encoder])
def test_a_second_time_sets_the_rates_anew(block):
    net, n = Net(block), PROVED[block]
    for p in (0.2, 0.8):
        dropout.stochastic_depth(net, sample=torch.randn(4, 8), p=p)
    assert [m.p for _, m in modules_of(net, StochasticDepth)] == pytest.approx([0.8 * (i + 1) / n for i in range(n)])


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (OnValues, "cannot read"),
        (OnTypes, "reads its forward wrongly"),
        (HiddenSum, "does not see the sum"),
        (Twins, "cannot be told"),
        (Highway, "cannot be told"),
        (Rotated, "cannot be told"),
    ],
)
def test_what_is_not_proved_is_refused_by_name(block, reason):
    net, x = Net(block), torch.randn(4, 8)
    plain = copy.deepcopy(net)
    with pytest.raises(InputError, match=rf"^dropout\.stochastic_depth: blocks\.0: .*{reason}"):
        dropout.stochastic_depth(net, sample=x)
    assert torch.equal(run(net, x, True), run(plain, x, True))


def test_what_is_left_beside_what_is_found_is_listed():
    net = Net(Plain)
    net.blocks.append(OnValues())
    *found, left = dropout.stochastic_depth(net, sample=torch.randn(4, 8))
    assert len(found) == 2
    assert (left.path, left.after.split(":")[0]) == ("blocks.2", "left as it is")


def test_types_are_asked_for_without_a_sample():
    net = nn.Sequential(OnTypes(), nn.Linear(8, 3))
    with pytest.raises(InputError, match="0: its forward asks for types"):
        dropout.stochastic_depth(net)


@pytest.mark.parametrize("block", [Table, lambda: nn.Linear(8, 8)])
def test_without_a_residual_branch_there_is_no_effect(block):
    with pytest.raises(NoEffectError, match="no residual branch"):
        dropout.stochastic_depth(Net(block), sample=torch.randn(4, 8))


def test_torchscript_is_refused_by_name():
    net = nn.Sequential(torch.jit.trace(Plain(), torch.randn(2, 8)), nn.Linear(8, 3))
    with pytest.raises(InputError, match="cannot edit 0, it is TorchScript"):
        dropout.stochastic_depth(net, sample=torch.randn(2, 8))


def test_on_the_meta_device():
    with torch.device("meta"):
        net, x = Net(Functional), torch.randn(4, 8)
    assert len(dropout.stochastic_depth(net, sample=x)) == 2
    assert net(x).shape == (4, 3)
