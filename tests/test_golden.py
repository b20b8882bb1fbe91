"""The same losses as on the day they were stored: 20 steps of each model, within 1e-6 in float64."""

import pytest

from tests.exhaustive import golden


@pytest.mark.parametrize("model", golden.MODELS)
def test_losses_are_the_stored_ones(model):
    assert golden.difference(model) <= golden.TOLERANCE


@pytest.mark.parametrize("lever", ["channels_last=false", "optimizer.fused=false"])
@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_what_makes_it_fast_changes_no_loss(model, lever):
    """Fused optimizers on a CPU read a gradient in its parameter's order: a layout that differs would show here."""
    fast, plain = golden.losses(model), golden.losses(model, [lever])
    assert max(abs(a - b) for a, b in zip(fast, plain, strict=True)) <= 1e-9


def test_every_model_has_golden_losses():
    from knep.config.catalog import options

    assert set(golden.MODELS) == set(options("model")) - {"import", "timm"}
