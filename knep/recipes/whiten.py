"""Filters that decorrelate image patches."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knep.errors import InputError


def patch_covariance(x_NCHW: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Covariance (D, D) of all patches of the images, D = channels x taps, in the order of a convolution's weight."""
    p_MD = F.unfold(x_NCHW.double(), kernel).transpose(1, 2).flatten(0, 1)
    p_MD = p_MD - p_MD.mean(0)
    return p_MD.T @ p_MD / len(p_MD)


def whitening_filters(x_NCHW: Tensor, conv: nn.Conv2d, eps: float) -> Tensor:
    """Weights for `conv`, whose outputs have variance l / (l + eps) on patches of variances l; see `init.whiten_first`.

    Raises InputError for a convolution with groups, or images smaller than its kernel.
    """
    kernel = (conv.kernel_size[0], conv.kernel_size[1])
    if conv.groups > 1:
        raise InputError("whiten_first needs a first convolution without groups: use init=dirac")
    if any(side < taps for side, taps in zip(x_NCHW.shape[2:], kernel, strict=True)):
        raise InputError(f"whiten_first needs images of at least {kernel} pixels, got {tuple(x_NCHW.shape[2:])}")
    values, vectors = torch.linalg.eigh(patch_covariance(x_NCHW, kernel))
    rows_DD = (vectors / (values.clamp(min=0) + eps).sqrt()).T.flip(0)
    both = torch.cat([rows_DD, -rows_DD])[: conv.out_channels]
    more = conv.out_channels - len(both)
    mixtures = F.normalize(torch.randn(more, len(rows_DD), dtype=rows_DD.dtype), dim=1).to(rows_DD.device) @ rows_DD
    return torch.cat([both, mixtures]).reshape(conv.weight.shape).to(conv.weight)
