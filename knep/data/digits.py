"""The handwritten digits that come with scikit-learn: 1,797 images of 8 x 8, no download (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import torch

from knep.data.base import Arrays, InMemory
from knep.data.splits import stratified

_TEST_SHARE, _TEST_SEED = 0.2, 20261124  # the set has no test split of its own: this one is the same for everybody


class Digits(InMemory):
    """Ten classes, one channel; pixels 0..16 are stretched to 0..255. A fixed fifth of each class is the test split."""

    def _arrays(self) -> Arrays:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
        y = torch.from_numpy(labels).long()
        stay, off = stratified(y, _TEST_SHARE, _TEST_SEED)
        return Arrays(x[stay], y[stay], x[off], y[off], [str(k) for k in range(10)])
