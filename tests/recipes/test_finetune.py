"""Fine-tuning: when each parameter is trained and at what rate, against formulas and timm's own code."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import knep
from knep.errors import InputError
from knep.optim.param_groups import param_groups
from knep.optim.thawing import Layers, Strategy, Tuning, layers_of
from knep.recipes import finetune

CONF = Path(knep.__file__).parent / "conf" / "finetune"
N = 6  # blocks of the backbone
LAYERS = Layers({f"{b}.{kind}": b for b in range(N) for kind in ("weight", "bias")}, (f"{N}.weight", f"{N}.bias"))


def made(option: str, **more: object) -> Strategy:
    make: partial[Strategy] = instantiate(OmegaConf.load(CONF / f"{option}.yaml"), _convert_="all")
    return make(LAYERS, **more)


def by_block(strategy: Strategy) -> list[int | None]:
    """Epochs of the blocks, the head behind them."""
    return [strategy.thaws[f"{b}.weight"] for b in range(N + 1)]


def full_waits_for_the_head() -> None:
    assert by_block(made("full")) == [0] * (N + 1)
    assert by_block(made("full", epochs=3)) == [3] * N + [0]


def head_trains_the_head_alone() -> None:
    strategy = made("head")
    assert by_block(strategy) == [None] * N + [0]
    assert strategy.freeze_norm


def gradual_thaws_a_stage_from_the_top_at_a_time() -> None:
    assert by_block(made("gradual", stages=3, epochs=2)) == [6, 6, 4, 4, 2, 2, 0]
    assert by_block(made("gradual", stages=99)) == [6, 5, 4, 3, 2, 1, 0]  # ULMFiT: a layer an epoch
    assert by_block(made("gradual", stages=1)) == [1] * N + [0]
    for stages in range(1, 9):
        epochs = [e for e in by_block(made("gradual", stages=stages))[:-1] if e is not None]
        assert epochs == sorted(epochs, reverse=True)
        assert {*epochs} == {*range(1, min(stages, N) + 1)}


def layerwise_rates_fall_by_a_factor_a_block() -> None:
    factors = Tuning(made("layerwise", layer_decay=1 / 2.6), LAYERS).factors(0.1)
    for b in range(N):  # ULMFiT, section 3.2: the rate of a layer is that of the layer above over 2.6
        assert abs(0.1 * factors[f"{b + 1}.weight"] / (0.1 * factors[f"{b}.weight"]) - 2.6) < 1e-6
    assert factors[f"{N}.weight"] == 1.0


ROWS = {
    "full": full_waits_for_the_head,
    "head": head_trains_the_head_alone,
    "gradual": gradual_thaws_a_stage_from_the_top_at_a_time,
    "layerwise": layerwise_rates_fall_by_a_factor_a_block,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option: str) -> None:
    ROWS[option]()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "resnet26"])
@pytest.mark.parametrize("decay", [0.65, 0.75])
def test_layerwise_rates_are_those_of_timm(name: str, decay: float) -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    size = {"img_size": 32} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=5, **size)
    layers = layers_of(net)
    tuning = Tuning(finetune.layerwise(layers, layer_decay=decay), layers)
    names = {id(p): n for n, p in net.named_parameters()}
    theirs = {
        names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(net, layer_decay=decay) for p in g["params"]
    }
    ours = {
        n: g["lr"] / 0.5
        for g in param_groups(net, lr=0.5, weight_decay=0.05, factors=tuning.factors(0.5))
        for n in g["param_names"]
    }
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[n] - theirs[n]) for n in ours) < 1e-6, {
        n: (ours[n], theirs[n]) for n in ours if abs(ours[n] - theirs[n]) > 1e-6
    }


def test_the_rate_of_the_head_is_its_own_and_all_parameters_have_groups_from_the_start() -> None:
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(N + 1)])
    layers = layers_of(net, sample=torch.zeros(2, 4))
    assert layers == LAYERS
    tuning = Tuning(finetune.gradual(layers, head_lr=0.03), layers)
    tuning.at(net, 0)
    groups = param_groups(net, lr=0.01, weight_decay=0.1, factors=tuning.factors(0.01))
    rates = {name: g["lr"] for g in groups for name in g["param_names"]}
    assert rates == {name: pytest.approx(0.03 if name in layers.head else 0.01) for name, _ in net.named_parameters()}
    assert {g["name"] for g in groups} == {"rate0.decay", "rate0.no_decay", "rate1.decay", "rate1.no_decay"}


def test_what_matches_a_pattern_is_never_trained() -> None:
    assert by_block(finetune.full(LAYERS, freeze=["0", "2.weight"])) == [None, 0, None, 0, 0, 0, 0]
    assert finetune.full(LAYERS, freeze=["2.weight"]).thaws["2.bias"] == 0
    with pytest.raises(InputError, match=r"freeze=\[layer1\*\] matches no parameter: write a name or pattern such as"):
        finetune.full(LAYERS, freeze=["layer1*"])
    with pytest.raises(InputError, match="leaves nothing to train"):
        finetune.head(LAYERS, freeze=[f"{N}"])
    with pytest.raises(InputError, match="freeze is a list"):
        finetune.full(LAYERS, freeze="0")


OUT_OF_RANGE = [
    ("full", {"epochs": -1}),
    ("full", {"epochs": 1.5}),
    ("full", {"head_lr": 0}),
    ("gradual", {"epochs": 0}),
    ("gradual", {"stages": 0}),
    ("layerwise", {"layer_decay": 0}),
    ("layerwise", {"layer_decay": 1.1}),
]


@pytest.mark.parametrize(("option", "value"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused_by_name(option: str, value: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(value))):
        made(option, **value)


def net_with_norms() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for c in (1, 4, 4)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def statistics(net: nn.Module) -> list[bool]:
    """Whether each norm's running mean has moved from zero."""
    return [bool(m.running_mean.abs().max() > 0) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("freeze_norm", [False, True])
def test_a_loop_of_ones_own_freezes_weights_and_statistics(freeze_norm: bool) -> None:
    recipe = knep.load("none", ["optimizer=adamw", "finetune=gradual", f"finetune.freeze_norm={freeze_norm}".lower()])
    net, x = net_with_norms(), torch.randn(8, 1, 12, 12)
    tuning = recipe.tuning(net, sample=x)
    assert tuning is not None
    assert layers_of(net).head == ("5.weight", "5.bias")
    optimizer = recipe.optimizer(net, tuning=tuning)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    moved = []
    for epoch in range(4):
        net.train()
        tuning.at(net, epoch)
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append({name.split(".")[0] for name, p in net.named_parameters() if not torch.equal(p, start[name])})
        assert statistics(net) == [not freeze_norm and epoch >= 3 - block for block in range(3)]
    assert moved == [{"5"}, {"2", "5"}, {"1", "2", "5"}, {"0", "1", "2", "5"}]


def test_a_head_that_was_not_loaded_is_the_head_wherever_it_stands() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert layers_of(net, new=["1.weight", "1.bias"]).head == ("1.weight", "1.bias")
    assert layers_of(net, new=["1.weight", "1.bias"]).blocks == {"0.weight": 0, "0.bias": 0, "2.weight": 1, "2.bias": 1}
