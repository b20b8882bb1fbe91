"""A slice of the zoo: one net of each of twelve torchvision families under every slot that touches a model."""

import pytest

from tests.cells import thinned
from tests.exhaustive import zoo

# The large ones have shapes only here; tests/exhaustive/zoo.py runs them all with real numbers up to 100 million.
MILLIONS = 10
FAMILIES = (
    "resnet18",
    "densenet121",
    "googlenet",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "swin_t",
    "vit_b_32",
)
# What a person accepts: there is no branch to skip, there are no maps to drop, and one value has no variance.
REASONS = {"stochastic_depth": "no residual branch", "spatial": "feature maps", "instance": "single value"}


@pytest.mark.parametrize("name", thinned(FAMILIES, 4))
def test_every_trick_works_or_is_refused_with_a_reason(name):
    cells = zoo.try_model(name, list(zoo.SLOTS), MILLIONS)
    assert [c for c in cells if c.outcome == "fails"] == []
    refused = {c.option: c.reason for c in cells if c.outcome == "refused"}
    assert all(REASONS[option] in reason for option, reason in refused.items()), refused
    assert len(cells) >= 19


def test_a_broken_trick_is_seen():
    model, x, _ = zoo.build("squeezenet1_1", MILLIONS)
    outcome, reason = zoo.try_cell(model, x, "dropout", "no_such_option", set())
    assert outcome == "fails"
    assert "no_such_option" in reason
    assert zoo.lost_parameters({"classifier.1.weight"}, set(), model) == {"classifier.1.weight"}
