"""`init`: how weights start. `f(model, *, sample=None, **hp) -> list[Change]`, in place, once before the first step.

n_in is the number of inputs that one output sums over: channels (of its group) x taps of a convolution; n_out the
number of outputs that one input reaches. `knep.surgery.weights` says which layers are covered. Drawn from torch's
global generator; every function raises NoEffectError for a model without such layers.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knep.errors import InputError, NoEffectError
from knep.surgery.edit import Change, bare
from knep.surgery.gain import gains_of
from knep.surgery.record import hooked, like, mode
from knep.surgery.weights import Fans, Weight, assign, covered, fans, fill, groups_of, rms
from knep.utils.validation import check

__all__ = [
    "default",
    "delta_orthogonal",
    "dirac",
    "gaussian",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "lecun_normal",
    "lsuv",
    "none",
    "orthogonal",
    "uniform",
    "unit_normal",
    "whiten_first",
]


def none(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Leaves every weight as the model was built or loaded."""
    return []


def default(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Leaves PyTorch's own init, U(-1/sqrt(n_in), 1/sqrt(n_in)) for weights and biases: std 1/sqrt(3 n_in)."""
    return []


def _normal(model: nn.Module, name: str, std: Callable[[Fans], float]) -> list[Change]:
    return fill(model, name, lambda layer, weight: weight.normal_(0, std(fans(layer, weight))))


def _uniform(model: nn.Module, name: str, limit: Callable[[Fans], float]) -> list[Change]:
    def rule(layer: Any, weight: Tensor) -> None:
        bound = limit(fans(layer, weight))
        weight.uniform_(-bound, bound)

    return fill(model, name, rule)


def uniform(model: nn.Module, *, sample: Tensor | None = None, limit: float = 0.05) -> list[Change]:
    """Weights from U(-limit, limit) whatever the layer's size: multiplies a signal by limit sqrt(n_in / 3).

    limit: in (0, inf). Raises InputError outside it.
    """
    check("limit", limit, "(0, inf)")
    return _uniform(model, "uniform", lambda fan: limit)


def unit_normal(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Weights from N(0, 1): multiplies a signal by sqrt(n_in) per linear layer, so that deep networks overflow."""
    return _normal(model, "unit_normal", lambda fan: 1.0)


def gaussian(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Weights with std 1 / n_in: multiplies a signal by 1 / sqrt(n_in) per linear layer, so that it dies with depth."""
    return _normal(model, "gaussian", lambda fan: 1 / fan.n_in)


def lecun_normal(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Weights with std 1 / sqrt(n_in): keeps a signal's variance through linear layers (LeCun et al. 1998, eq. 16)."""
    return _normal(model, "lecun_normal", lambda fan: fan.n_in**-0.5)


def glorot_normal(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Weights with std sqrt(2 / (n_in + n_out)): between keeping the signal and its gradient (Glorot and Bengio 2010).

    Their eq. 12, drawn from a normal.
    """
    return _normal(model, "glorot_normal", lambda fan: math.sqrt(2 / (fan.n_in + fan.n_out)))


def glorot_uniform(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Weights from U(-a, a), a = sqrt(6 / (n_in + n_out)), the std of `glorot_normal` (Glorot and Bengio, eq. 16)."""
    return _uniform(model, "glorot_uniform", lambda fan: math.sqrt(6 / (fan.n_in + fan.n_out)))


def he_normal(model: nn.Module, *, sample: Tensor | None = None, slope: float | str = 0.0) -> list[Change]:
    """Weights with std sqrt(2 / ((1 + slope^2) n_in)): keeps the mean square under ReLU (He et al. 2015, eq. 15).

    slope: of a leaky ReLU below 0, in [0, 1]; or auto: std gain / sqrt(n_in) with the gain that what follows the layer
    on the sample asks for (`knep.surgery.gain`). Raises InputError for any other, and for auto without a sample.
    """
    gain = _gain(model, sample, slope)
    return fill(
        model, "he_normal", lambda layer, weight: weight.normal_(0, gain(layer) * fans(layer, weight).n_in ** -0.5)
    )


def he_uniform(model: nn.Module, *, sample: Tensor | None = None, slope: float | str = 0.0) -> list[Change]:
    """Weights from U(-a, a), a = sqrt(6 / ((1 + slope^2) n_in)): the std of `he_normal` (He et al. 2015, eq. 15).

    slope: as for `he_normal`.
    """
    gain = _gain(model, sample, slope)

    def rule(layer: Any, weight: Tensor) -> None:
        bound = gain(layer) * math.sqrt(3 / fans(layer, weight).n_in)
        weight.uniform_(-bound, bound)

    return fill(model, "he_uniform", rule)


def _gain(model: nn.Module, sample: Tensor | None, slope: float | str) -> Callable[[nn.Module], float]:
    """The factor on 1 / sqrt(n_in) of each layer."""
    if slope != "auto":
        check("slope", slope, "[0, 1]")
        fixed = math.sqrt(2 / (1 + float(slope) ** 2))
        return lambda layer: fixed
    if sample is None:
        raise InputError("slope=auto looks at what follows each layer: give sample, or a number in [0, 1]")
    model = bare(model)
    gains = gains_of(model, sample, [weight.layer for weight in covered(model)])
    return gains.__getitem__


def orthogonal(model: nn.Module, *, sample: Tensor | None = None, gain: float = 1.0) -> list[Change]:
    """Weight matrices with orthonormal rows or columns: keeps the length of every signal, not only on average.

    Saxe, McClelland and Ganguli 2014. A convolution's matrix is (filters, channels x taps), one for each group.

    gain: factor on the matrix, in (0, inf). Raises InputError outside it.
    """
    check("gain", gain, "(0, inf)")

    def rule(layer: Any, weight: Tensor) -> None:
        for block in weight.chunk(groups_of(layer)):
            block.copy_(_orthogonal_like(block, gain))

    return fill(model, "orthogonal", rule)


def delta_orthogonal(model: nn.Module, *, sample: Tensor | None = None, gain: float = 1.0) -> list[Change]:
    """Convolutions that act on each pixel by an orthogonal matrix: it sits at the centre tap, all other taps are 0.

    Xiao et al. 2018, algorithm 2. Keeps each pixel's length where a convolution has no fewer outputs than inputs and
    stride 1; with fewer it is a projection. Linear layers become orthogonal.

    gain: factor on the matrix, in (0, inf). Raises InputError outside it.
    """
    check("gain", gain, "(0, inf)")

    def rule(layer: Any, weight: Tensor) -> None:
        weight.zero_()
        centre = (slice(None), slice(None), *(size // 2 for size in weight.shape[2:]))
        for block in weight.chunk(groups_of(layer)):
            block[centre] = _orthogonal_like(block[centre], gain)

    return fill(model, "delta_orthogonal", rule)


def _orthogonal_like(weight: Tensor, gain: float) -> Tensor:
    """A random orthogonal tensor of the weight's shape, float32 at least: half precision has no QR decomposition."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return nn.init.orthogonal_(torch.empty(weight.shape, device=weight.device, dtype=dtype), gain)


def dirac(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Convolutions that begin by handing on what they read: filter i copies input channel i, at its centre tap.

    Zagoruyko and Komodakis 2017, sec. 3; as a start of plain weights, Jordan 2024 (airbench). Filters beyond the inputs
    of their group, linear layers and transposed convolutions start as in `he_normal`.
    """

    def rule(layer: Any, weight: Tensor) -> None:
        weight.normal_(0, math.sqrt(2 / fans(layer, weight).n_in))
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            for block in weight.chunk(groups_of(layer)):
                nn.init.dirac_(block[: block.shape[1]])

    return fill(model, "dirac", rule)


def whiten_first(model: nn.Module, *, sample: Tensor | None = None, eps: float = 0.01) -> list[Change]:
    """The first convolution decorrelates the patches of the sample; all other layers start as in `dirac`.

    With V diag(l) V' the covariance of the patches, its filters are the rows of +-diag(l + eps)^(-1/2) V', largest l
    first (Coates and Ng 2012, sec. 2; as a first layer with both signs: Jordan 2024). Where there are more filters than
    that, the others are random mixtures of these rows, of length 1, which give the same variance.

    sample: (N, C, H, W) batch, scaled as in training; eps: added to each variance, in (0, inf). Raises InputError
    without a sample, on the meta device, or where the first convolution has groups.
    """
    check("eps", eps, "(0, inf)")
    model = bare(model)
    if sample is None or sample.is_meta:
        raise InputError("whiten_first measures a batch of training images: give sample, or use init=dirac")
    changes = dirac(model)
    weight, read = _first_convolution(model, sample)
    filters = whitening_filters(read, weight.layer, eps)
    assign(weight, filters)
    first = f"whiten_first, rms {rms(filters)}"
    return [Change(c.path, c.before, first if c.path == weight.name else f"whiten_first: {c.after}") for c in changes]


def _first_convolution(model: nn.Module, sample: Tensor) -> tuple[Weight, Tensor]:
    """The weight of the 2-d convolution that acts first on the sample, and what it reads."""
    weights: dict[nn.Module, Weight] = {w.layer: w for w in covered(model) if isinstance(w.layer, nn.Conv2d)}
    read: list[tuple[Weight, Tensor]] = []

    def note(layer: nn.Module, args: Any, output: Tensor) -> None:
        read.append((weights[layer], args[0]))

    _observe(model, sample, list(weights), note)
    if not read:
        raise NoEffectError("init.whiten_first changed nothing: no trained 2-d convolution acts on the sample")
    return read[0]


def lsuv(model: nn.Module, *, sample: Tensor | None = None) -> list[Change]:
    """Orthogonal weights, each layer then divided by the std of its output on the sample: unit variance everywhere.

    LSUV, Mishkin and Matas 2016, algorithm 1, in one pass: with zero biases a layer is linear in its weight, so one
    division is exact, and the layer passes on the scaled output. Measured in eval mode; modes are restored. A layer
    stays orthogonal if the sample does not reach it as a module (attention's packed projections are read by a
    function), its output is constant, or its scale is not its own (spectral normalization).

    sample: (N, C, H, W) batch, scaled as in training. Raises InputError without one, and on the meta device.
    """
    model = bare(model)
    if sample is None:
        raise InputError("lsuv measures a batch of training images: give sample, or use init=orthogonal")
    if sample.is_meta or any(p.is_meta for p in model.parameters()):
        raise InputError("lsuv measures signals, and the meta device has none: use init=orthogonal")
    changes = {change.path: change for change in orthogonal(model)}
    waiting: dict[nn.Module, Weight] = {
        weight.layer: weight for weight in covered(model) if weight.attribute == "weight"
    }

    def divide(layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        weight = waiting.pop(layer, None)
        std = output.to(torch.promote_types(output.dtype, torch.float32)).std(unbiased=False).to(output.dtype)
        if weight is None or not std > 0 or not std.isfinite():
            return None
        wanted = weight.value / std
        assign(weight, wanted.clone())
        if not torch.allclose(weight.value, wanted, rtol=1e-3):
            return None
        changes[weight.name] = Change(weight.name, changes[weight.name].before, f"lsuv, rms {rms(wanted)}")
        return output / std

    _observe(model, sample, list(waiting), divide)
    return list(changes.values())


def _observe(model: nn.Module, sample: Tensor, layers: list[nn.Module], hook: Callable[..., Any]) -> None:
    """One forward pass in eval mode with `hook` behind each of the layers; every module's mode is restored."""
    with torch.no_grad(), mode(model, False), hooked(layers, leave=hook):
        model(like(model, sample))


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
