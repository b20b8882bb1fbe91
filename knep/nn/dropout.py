"""Dropout of squares of a map, and of residual branches."""

from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import ops

from knep.errors import InputError
from knep.utils.validation import check, whole


@lru_cache(maxsize=256)
def _seed_rate(height: int, width: int, block: int, p: float) -> float:
    """The rate of block centers at which the share p of a map is covered, blocks overlapping and cut at no edge."""

    def covers(size: int) -> list[int]:  # how many of the size - block + 1 positions of a block cover each pixel
        return [min(i + 1, size - i, block, size - block + 1) for i in range(size)]

    counts = Counter(a * b for a in covers(height) for b in covers(width))
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        covered = 1 - sum(pixels * (1 - rate) ** n for n, pixels in counts.items()) / (height * width)
        low, high = (rate, high) if covered < p else (low, rate)
    return low


class DropBlock(nn.Module):
    """In training, zeroes squares of each feature map (N, C, H, W) and scales the rest to keep the batch's mean
    (Ghiasi et al. 2018, algorithm 1). Identity in eval mode and for p = 0.

    p: expected share of zeroed values, in [0, 1). The paper's rate of block centers ignores that blocks overlap, which
    zeroes 40 % for p = 0.5; here it is solved so that the share is p.
    block_size: pixels, odd; larger than the map it is cut to the largest odd size that fits.
    """

    def __init__(self, p: float, block_size: int) -> None:
        super().__init__()
        check("p", p, "[0, 1)")
        whole("block_size", block_size, 1)
        if block_size % 2 == 0:
            raise InputError(f"block_size must be odd, so that a block has a middle, got {block_size}")
        self.p, self.block_size = p, block_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        n, c, h, w = x.shape
        block = min(self.block_size, h - 1 + h % 2, w - 1 + w % 2)
        rate = _seed_rate(h, w, block, self.p)
        centers = torch.empty(n, c, h - block + 1, w - block + 1, dtype=x.dtype, device=x.device).bernoulli_(rate)
        keep = 1 - F.max_pool2d(F.pad(centers, [block // 2] * 4), block, stride=1, padding=block // 2)
        kept = keep.mean(dtype=torch.float32 if x.dtype.itemsize < 4 else None)
        return x * keep / kept.clamp(min=1 / keep.numel()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, block_size={self.block_size}"


class StochasticDepth(ops.StochasticDepth):
    """torchvision's, which zeroes all of an image's signal with probability p, and says so when printed."""

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        return f"p={self.p:.4g}, mode={self.mode}"
