import pytest
import torch
from torch import nn

from knep.errors import InputError
from knep.models.torchvision import torchvision


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_auxiliary_head_in_training(name):
    with torch.device("meta"):
        size = {"googlenet": 32, "inception_v3": 96}[name]
        model = torchvision(1, 5, size, name=name).train()
        assert model(torch.rand(2, 1, size, size)).shape == (2, 5)


def test_first_convolution_keeps_everything_but_its_channels():
    old, new = torchvision(3, 5, 32).conv1, torchvision(4, 5, 32).conv1
    assert new.in_channels == 4
    assert (old.out_channels, old.stride, old.padding, old.bias) == (
        new.out_channels,
        new.stride,
        new.padding,
        new.bias,
    )
    assert new.weight.requires_grad


def test_vision_transformer_is_built_for_the_image():
    with torch.device("meta"):
        model = torchvision(1, 5, 32, name="vit_b_16")
        assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnt18", "ResNet18", "resnet 18"])
def test_the_nearest_name_is_offered(name):
    with pytest.raises(InputError, match="did you mean resnet18"):
        torchvision(3, 10, 32, name=name)


def test_segmentation_nets_are_no_classifiers():
    with pytest.raises(InputError, match="classifier"):
        torchvision(3, 10, 32, name="fcn_resnet50")


@pytest.mark.parametrize(
    ("name", "size", "needs"),
    [("alexnet", 32, "63 pixels"), ("vit_b_16", 28, "multiple"), ("squeezenet1_1", 8, "17 pixels")],
)
def test_images_too_small_are_refused_with_the_size_that_works(name, size, needs):
    with pytest.raises(InputError, match=needs):
        torchvision(3, 10, size, name=name)


def test_the_check_of_sizes_leaves_no_trace():
    model = torchvision(3, 10, 32)
    assert model.training
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).num_batches_tracked == 0
