"""A module put into another: same object, same names, same class for isinstance; copies and pickles keep it."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from knep.surgery.graph import graph_of
from knep.surgery.insert_module import inserted, put_before, put_behind, put_inside


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x, scale=1.0):
        return self.fc(x) * scale + x


def inside(module, new, name):
    graph = graph_of(module)
    assert not isinstance(graph, str)
    (call,) = graph.find_nodes(op="call_module", target="fc")
    return put_inside(module, new, name, graph, [(call, None)])


X = torch.tensor([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("put", "make", "expected"),
    [
        (put_before, lambda: nn.Linear(3, 3), lambda m: nn.functional.linear(2 * X, m.weight, m.bias)),
        (put_behind, lambda: nn.Linear(3, 3), lambda m: 2 * nn.functional.linear(X, m.weight, m.bias)),
        (inside, Sum, lambda m: 2 * nn.functional.linear(X, m.fc.weight, m.fc.bias) + X),
    ],
)
def test_the_new_module_acts_in_its_place(put, make, expected):
    module = make()
    kind, names, repeated = type(module), list(module.state_dict()), copy.deepcopy(module)
    assert put(module, Double(), "twice") == "twice"
    assert isinstance(module, kind)
    assert list(module.state_dict()) == names
    assert inspect.signature(module.forward) == inspect.signature(repeated.forward)
    assert [type(m) for m in inserted(module)] == [Double]
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(X), expected(module))
    module.load_state_dict(repeated.state_dict())


def test_a_second_one_has_a_name_of_its_own_and_acts_too():
    module = nn.Linear(3, 3)
    before = module(X)
    assert [put_behind(module, Double(), "twice") for _ in range(3)] == ["twice", "twice_2", "twice_3"]
    for twin in (module, pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(X), 8 * before)
        assert len(inserted(twin)) == 3


def test_what_is_inside_acts_in_training_only_and_arguments_keep_their_meaning():
    module = Sum()
    plain = copy.deepcopy(module)
    inside(module, Double(), "twice")
    assert torch.equal(module.eval()(X, scale=3.0), plain(X, scale=3.0))
    with pytest.raises(AssertionError, match="scale has been specialized"):
        module.train()(X, scale=3.0)


def test_parametrized_modules_stay_so():
    module = parametrizations.weight_norm(nn.Linear(3, 3))
    before = module(X)
    put_behind(module, Double(), "twice")
    assert torch.equal(copy.deepcopy(module)(X), 2 * before)
    module.weight = torch.eye(3)
    torch.testing.assert_close(module(X), 2 * (X + module.bias))


def test_mode_and_dtype_are_those_of_the_module():
    module, new = nn.Linear(3, 3).double().eval(), nn.BatchNorm1d(3)
    put_behind(module, new, "norm")
    assert not new.training
    assert new.weight.dtype == torch.float64
