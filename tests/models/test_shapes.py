"""What holds for every model: shapes, gradients, places, and the norm slot giving the same net as the constructor."""

import copy

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from knep.config.catalog import CONF, options
from knep.models.cnn import cnn
from knep.models.inception import inception
from knep.models.mlp import mlp
from knep.models.resnet import resnet
from knep.models.torchvision import torchvision
from knep.nn.norm import BatchNorm
from knep.nn.place import Place
from knep.recipes.norm import batch
from knep.surgery.edit import modules_of

SMALL = {
    "mlp": lambda *a, **k: mlp(*a, widths=[8, 8], **k),
    "linear": lambda *a, **k: mlp(*a, widths=[], **k),
    "cnn": lambda *a, **k: cnn(*a, widths=[4, 8], **k),
    "cnn, three convolutions a stage": lambda *a, **k: cnn(*a, widths=[4, 8], convs=3, **k),
    "resnet20": lambda *a, **k: resnet(*a, depth=20, width=0.25, **k),
    "resnet20_preact": lambda *a, **k: resnet(*a, depth=20, width=0.25, preact=True, **k),
    "resnet18": lambda *a, **k: resnet(*a, depth=18, width=0.0625, **k),
    "resnet50": lambda *a, **k: resnet(*a, depth=50, width=0.0625, **k),
    "resnet50_preact": lambda *a, **k: resnet(*a, depth=50, width=0.0625, preact=True, **k),
    "inception": lambda *a, **k: inception(*a, width=0.25, **k),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 65, 224])
def test_images_in_scores_out(make, channels, size):
    with torch.no_grad():
        assert make(channels, 7, size)(torch.rand(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("norm", [None, BatchNorm], ids=["places", "batch"])
def test_gradients_reach_every_parameter(make, norm):
    model = make(3, 5, 16, norm=norm, activation=nn.SiLU)  # ReLU could be 0 for all of so few images
    nn.functional.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.arange(8) % 5).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_filled_places_give_the_net_of_the_constructor(make):
    filled, built = make(3, 5, 16, norm=None), make(3, 5, 16, norm=BatchNorm)
    if "norm" in {m.kind for _, m in modules_of(filled, Place)}:  # softmax regression has none
        batch(filled, sample=torch.randn(2, 3, 16, 16))
    assert filled.state_dict().keys() == built.state_dict().keys()
    built.load_state_dict(filled.state_dict())
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(filled(x), built(x))
    nn.functional.cross_entropy(filled(x), torch.arange(4)).backward()
    assert all(p.grad is not None for p in filled.parameters())


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_every_module_has_one_place(make):
    model = make(1, 5, 16, norm=None)
    modules = [m for _, m in model.named_modules(remove_duplicate=False)]
    assert len(modules) == len(set(modules))
    heads = [m for _, m in modules_of(model, Place) if m.kind == "head"]
    assert [m.features for m in heads] == [model.classifier.in_features]


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_places_know_their_channels(make):
    model, seen = make(1, 5, 16, norm=None), []
    for _, place in modules_of(model, Place):
        place.register_forward_hook(lambda m, args, out: seen.append((m.features, out.shape[1])))
    model(torch.rand(2, 1, 16, 16))
    assert len(seen) == len(list(modules_of(model, Place)))
    assert all(said == true for said, true in seen)


@pytest.mark.parametrize("option", sorted({*options("model")} - {"import", "timm", "transformer", "unet"}))
def test_yaml_builds_and_a_copy_computes_the_same(option):
    model = instantiate(OmegaConf.load(CONF / "model" / f"{option}.yaml"))(in_channels=1, num_classes=10, image_size=8)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize(
    ("option", "x"), [("transformer", torch.ones(2, 8, dtype=torch.int64)), ("unet", torch.rand(2, 3, 8, 8))]
)
def test_models_of_tokens_and_pixels_build_from_their_yaml(option, x):
    model = instantiate(OmegaConf.load(CONF / "model" / f"{option}.yaml"))(in_channels=3, num_classes=10, image_size=8)
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
    assert model(x).shape == ((2, 8, 10) if option == "transformer" else (2, 10, 8, 8))


def test_channels_last_gives_the_same_scores():
    x = torch.randn(2, 3, 16, 16)
    for make in SMALL.values():
        model = make(3, 5, 16).eval()
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5)


def test_torchvision_reads_the_data_it_is_given():
    for name, size in {"mobilenet_v3_small": 32, "regnet_x_400mf": 8, "squeezenet1_1": 32}.items():
        for channels in (1, 3):
            model = torchvision(channels, 7, size, name=name)
            assert model.training
            with torch.no_grad():
                assert model(torch.rand(2, channels, size, size)).shape == (2, 7)
