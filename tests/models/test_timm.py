import sys

import pytest
import torch

from knep.errors import InputError
from knep.models.timm import timm
from knep.models.torchvision import torchvision
from knep.models.user_model import imported


def test_without_timm_the_line_to_type_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'knep\[timm\]'"):
        timm(3, 10, 32)


def test_a_classifier_reads_the_data_it_is_given():
    assert timm(1, 7, 32, name="resnet18")(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    for values, said in (
        ({"name": "resnt18"}, "did you mean"),
        ({"args": {"pretrained": True}}, "args.pretrained"),
        ({"args": {"no_such": 1}}, "cannot be built"),
    ):
        with pytest.raises(InputError, match=said):
            timm(3, 10, 32, **values)


def test_arguments_reach_torchvision():
    model = torchvision(3, 5, 32, name="mobilenet_v3_small", args={"dropout": 0.4})
    assert model.classifier[2].p == 0.4
    for args, said in (({"weights": "DEFAULT"}, r"args.weights"), ({"no_such": 1}, "cannot be built")):
        with pytest.raises(InputError, match=said):
            torchvision(3, 5, 32, args=args)


def test_arguments_reach_a_model_by_its_path():
    model = imported(3, 5, 32, path="torchvision.models:mobilenet_v3_small", args={"dropout": 0.4})
    assert model.classifier[2].p == 0.4
