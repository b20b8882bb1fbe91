"""`scaling`: exact ranges; statistics of the training split and of nothing else."""

import numpy as np
import pytest
import torch

from knep.data.digits import Digits
from knep.errors import InputError
from knep.recipes.scaling import none, standardize, symmetric, unit

EXTREMES = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)


def _range(make, low, high):
    out = make([])(EXTREMES)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.flatten(), torch.tensor([low, high]), rtol=0, atol=1e-6)


def _standardize():
    x = torch.randint(0, 256, (300, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[:, 1] //= 3
    scaled = standardize(x.split(70))(x)
    raw = x.numpy().astype(np.float64)
    mean, std = raw.mean((0, 2, 3), keepdims=True), raw.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(scaled.numpy(), (raw - mean) / std, rtol=1e-4, atol=1e-5)
    assert abs(float(scaled.mean())) < 1e-5
    assert abs(float(scaled.std(unbiased=False)) - 1) < 1e-5


ROWS = {
    "unit": lambda: _range(unit, 0.0, 1.0),
    "symmetric": lambda: _range(symmetric, -1.0, 1.0),
    "standardize": _standardize,
}


@pytest.mark.parametrize("option", ROWS)
def test_property(option):
    ROWS[option]()


def test_none_leaves_raw_pixels():
    _range(none, 0.0, 255.0)


def test_statistics_never_see_validation_or_test():
    def fitted(change):
        data = Digits()
        data.prepare()
        for split in ("val", "test"):
            x, y = data._splits[split]
            data._splits[split] = (change(x), y)
        return standardize(data.train_images())

    same, changed = fitted(lambda x: x), fitted(lambda x: 255 - x)
    assert torch.equal(same.shift, changed.shift)
    assert torch.equal(same.scale, changed.scale)


def test_a_constant_channel_is_only_shifted():
    x = torch.full((10, 1, 4, 4), 7, dtype=torch.uint8)
    assert torch.equal(standardize([x])(x), torch.zeros(10, 1, 4, 4))


def test_without_images_it_says_so():
    with pytest.raises(ValueError, match="training images"):
        standardize([])


def test_a_checkpoint_carries_the_statistics():
    fitted, other = standardize([EXTREMES]), unit([])
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other(EXTREMES), fitted(EXTREMES))


@pytest.mark.parametrize("shape", [(64,), (64, 8), (64, 3, 40), (64, 2, 3, 4, 5)])
def test_any_rows_keep_their_shape(shape):
    x = torch.rand(shape) * 255
    for make in (none, unit, symmetric, standardize):
        assert make([x])(x).shape == x.shape
    torch.testing.assert_close(unit([])(x), x / 255)
    y = standardize(x.split(20))(x).transpose(0, min(1, x.dim() - 1)).flatten(1 if x.dim() > 1 else 0)
    torch.testing.assert_close(y.mean(-1), torch.zeros_like(y.mean(-1)), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(-1, correction=0), torch.ones_like(y.mean(-1)), atol=1e-4, rtol=0)


def test_tokens_are_refused_but_by_none():
    x = torch.randint(0, 64, (4, 16))
    assert none([])(x) is x
    for make in (unit, symmetric):
        with pytest.raises(InputError, match=r"int64 \(4, 16\), numbers of tokens, .*: scaling=none"):
            make([])(x)
    with pytest.raises(InputError, match="scaling=none"):
        standardize([x])
