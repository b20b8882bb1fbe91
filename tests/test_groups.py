"""Parameter groups: what decays, what does not, each parameter once, and the rate by depth."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from knep.errors import InputError
from knep.optim.param_groups import decayed, param_groups


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


class LayerNorm2d(nn.Module):
    """A norm of nobody's library, with its gain in the shape of the signal, and tables of names that people use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2, 2))
        self.mix = nn.Parameter(torch.ones(4, 4))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("relative_position_bias_table", "rel_pos_h", "pos_embed", "cls_token", "register_tokens",
                     "logit_scale", "gamma_1", "query_embedding", "attention_biases", "ls"):  # fmt: skip
            shape = (3, 1, 1) if name == "ls" else (3, 4)
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        self.norm, self.kernel = LayerNorm2d(), nn.Parameter(torch.ones(3, 4))
        self.thin, self.fc = nn.Linear(4, 1), nn.Linear(1, 4)


def test_tables_scales_and_norms_of_others_do_not_decay() -> None:
    groups = by_name(param_groups(Named(), lr=0.1, weight_decay=0.1))
    assert groups["decay"]["param_names"] == ["kernel", "thin.weight", "fc.weight"]


class Branches(nn.Module):
    """Two layers beside one, a layer registered first that acts last, and one that never acts."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.unused = nn.Linear(4, 2), nn.Linear(4, 4)
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.shortcut, self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.token
        return self.out(self.norm(self.b(self.a(x).relu()) + self.shortcut(x)))


def test_depth_is_measured_on_the_longest_path_of_the_sample() -> None:
    model = Branches()
    groups = param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5, sample=torch.randn(2, 4))
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert {name: rates[f"{name}.weight"] for name in ("a", "shortcut", "b", "norm", "out")} == {
        "a": 0.25,
        "shortcut": 0.25,
        "b": 0.5,
        "norm": 0.5,
        "out": 1.0,
    }
    assert rates["token"] == 0.25
    assert {name for group in groups for name in group["unreached"]} == {"unused.weight", "unused.bias"}


def test_a_frozen_layer_counts_for_depth_and_flags_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    groups = param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5, sample=torch.randn(2, 4))
    assert by_name(groups)["layer0.decay"]["lr"] == 0.25
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_names_of_a_compiled_model_are_the_models_own() -> None:
    class Compiled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    (weights, _) = param_groups(Compiled(Branches()), lr=0.1, weight_decay=0.1)
    assert weights["param_names"][0] == "out.weight"


@pytest.mark.parametrize(("key", "value"), [("lr", 0.0), ("lr", "fast"), ("weight_decay", -1.0), ("layer_decay", 1.5)])
def test_values_out_of_range_are_named(key: str, value: object) -> None:
    hp = {"lr": 0.1, "weight_decay": 0.0, "layer_decay": 1.0, key: value}
    with pytest.raises(InputError, match=f"^{key} must be a number in .*, got {value}$"):
        param_groups(nn.Linear(2, 2), **hp)  # type: ignore[arg-type]
