"""The same losses as on the day they were stored: 20 steps of each model, within 1e-4."""

import golden
import pytest


@pytest.mark.parametrize("model", golden.MODELS)
def test_losses_are_the_stored_ones(model):
    assert golden.difference(model) <= golden.TOLERANCE


def test_every_model_has_golden_losses():
    from knep.listing import options

    assert set(golden.MODELS) == set(options("model"))
