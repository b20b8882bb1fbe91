"""Parameter groups: what decays, what does not, each parameter once, and the rate by depth."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from knep.errors import InputError
from knep.groups import decayed, param_groups, summary


class Patches(nn.Module):
    """Everything that must not decay, in one model, beside four weights that must."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 5, 4))
        self.words = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(3, 4, 2)
        self.bn = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.ln = nn.LayerNorm((5, 4))
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4, 2)


WEIGHTS = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]


def by_name(groups: list[dict]) -> dict[str, dict]:
    return {group["name"]: group for group in groups}


def test_norms_biases_embeddings_and_tokens_do_not_decay() -> None:
    model = Patches()
    groups = by_name(param_groups(model, lr=0.1, weight_decay=0.5))
    assert list(groups) == ["decay", "no_decay"]
    assert groups["decay"]["param_names"] == WEIGHTS
    assert (groups["decay"]["weight_decay"], groups["no_decay"]["weight_decay"]) == (0.5, 0.0)
    assert {id(p) for p in decayed(model)} == {id(p) for p in groups["decay"]["params"]}


def test_every_parameter_is_in_one_group_under_its_name() -> None:
    model = Patches()
    for layer_decay in (1.0, 0.5):
        groups = param_groups(model, lr=0.1, weight_decay=0.5, layer_decay=layer_decay)
        pairs = [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)]
        assert {name: id(p) for name, p in pairs} == {name: id(p) for name, p in model.named_parameters()}
        assert len(pairs) == len(list(model.parameters()))
        torch.optim.SGD(groups, lr=0.1)


def test_layer_decay_multiplies_the_rate_once_per_layer_behind() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    groups = by_name(param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5))
    assert {name: g["lr"] for name, g in groups.items()} == {
        "layer0.decay": 0.25,
        "layer0.no_decay": 0.25,
        "layer1.decay": 0.5,
        "layer1.no_decay": 0.5,
        "layer2.decay": 1.0,
        "layer2.no_decay": 1.0,
    }
    assert groups["layer0.no_decay"]["param_names"] == ["0.bias", "1.weight", "1.bias"]


def test_tied_weights_are_trained_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    names = [name for g in param_groups(model, lr=0.1, weight_decay=0.1) for name in g["param_names"]]
    assert sorted(names) == ["0.bias", "0.weight", "1.bias"]
    assert len(decayed(model)) == 1


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).requires_grad_(False)
    model[1].weight.requires_grad_(True)
    (group,) = param_groups(model, lr=0.1, weight_decay=0.1)
    assert group["param_names"] == ["1.weight"]
    with pytest.raises(InputError, match="no trained parameters"):
        param_groups(model.requires_grad_(False), lr=0.1, weight_decay=0.1)


def test_weight_norm_decays_directions_and_not_gains() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), nn.Linear(3, 2))
    (weights,) = [g["param_names"] for g in param_groups(model, lr=0.1, weight_decay=0.1) if g["decayed"]]
    assert weights == ["0.parametrizations.weight.original1", "1.weight"]
    deep = by_name(param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.1))
    assert deep["layer0.no_decay"]["param_names"] == ["0.bias", "0.parametrizations.weight.original0"]


def test_summary_has_one_line_per_group() -> None:
    lines = summary(param_groups(nn.Linear(3, 2), lr=0.1, weight_decay=0.05))
    assert lines[0] == "decay: 1 tensors, 6 parameters, lr 0.1, weight decay 0.05"
    assert lines[1] == "no_decay: 1 tensors, 2 parameters, lr 0.1, weight decay 0"


@pytest.mark.parametrize(("key", "value"), [("lr", 0.0), ("lr", "fast"), ("weight_decay", -1.0), ("layer_decay", 1.5)])
def test_values_out_of_range_are_named(key: str, value: object) -> None:
    hp = {"lr": 0.1, "weight_decay": 0.0, "layer_decay": 1.0, key: value}
    with pytest.raises(InputError, match=f"^{key} must be a number in .*, got {value}$"):
        param_groups(nn.Linear(2, 2), **hp)  # type: ignore[arg-type]
