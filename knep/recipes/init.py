"""`init`: how weights start. `f(model, *, sample=None, **hp) -> list[Change]`, in place, once before the first step.

n_in is the number of inputs that one output sums over: channels (of its group) x taps of a convolution; n_out the
number of outputs that one input reaches. `knep.surgery.weights` says which layers are covered. Drawn from torch's
global generator; every function raises NoEffectError for a model without such layers.

`skipinit`, `rezero`, `layer_scale` and `fixup` put factors, trained and without weight decay, behind the residual
branches that `knep.surgery.residual` proves, and are refused, with the reason, where a branch cannot be read; `t_fixup`
and `deepnorm` read the blocks of a transformer.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knep.errors import InputError, NoEffectError
from knep.nn.branch import BranchScale
from knep.surgery.branches.draw import branch_weights, draw_blocks, draw_embeddings
from knep.surgery.branches.fixup import refuse_for_fixup, shifted
from knep.surgery.branches.scale import branches_of, channels_of, own_scales, scale_ends
from knep.surgery.branches.transformer import (
    Block,
    blocks_of,
    counts_of,
    deepnorm_factors,
    normed_sums,
    removed_norms,
)
from knep.surgery.edit import Change, bare, unfuse
from knep.surgery.graph import refuse_scripted
from knep.surgery.record import Pass, classifier_of, hooked, mode
from knep.surgery.residual import Branch, follow
from knep.surgery.sample import Inputs, call, like, tensors
from knep.surgery.weights import Fans, Weight, assign, covered, fans, fill, gains_of, groups_of, rms
from knep.utils.validation import check

__all__ = [
    "deepnorm",
    "default",
    "delta_orthogonal",
    "dirac",
    "fixup",
    "gaussian",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "layer_scale",
    "lecun_normal",
    "lsuv",
    "none",
    "orthogonal",
    "rezero",
    "skipinit",
    "t_fixup",
    "uniform",
    "unit_normal",
    "whiten_first",
]
BUILD = ("deepnorm", "fixup", "layer_scale", "rezero", "skipinit", "t_fixup")  # see `builds`


def builds(target: str) -> bool:
    """Whether the option of this `_target_` puts something into the model, which has to be there for stored weights."""
    return target in [f"{__name__}.{name}" for name in BUILD]


def none(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Leaves every weight as the model was built or loaded."""
    return []


def default(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Leaves PyTorch's own init, U(-1/sqrt(n_in), 1/sqrt(n_in)) for weights and biases: std 1/sqrt(3 n_in)."""
    return []


def _normal(model: nn.Module, name: str, std: Callable[[Fans], float]) -> list[Change]:
    return fill(model, name, lambda layer, weight: weight.normal_(0, std(fans(layer, weight))))


def _uniform(model: nn.Module, name: str, limit: Callable[[Fans], float]) -> list[Change]:
    def rule(layer: nn.Module, weight: Tensor) -> None:
        bound = limit(fans(layer, weight))
        weight.uniform_(-bound, bound)

    return fill(model, name, rule)


def uniform(model: nn.Module, *, sample: Inputs | None = None, limit: float = 0.05) -> list[Change]:
    """Weights from U(-limit, limit) whatever the layer's size: multiplies a signal by limit sqrt(n_in / 3).

    limit: in (0, inf). Raises InputError outside it.
    """
    check("limit", limit, "(0, inf)")
    return _uniform(model, "uniform", lambda fan: limit)


def unit_normal(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Weights from N(0, 1): multiplies a signal by sqrt(n_in) per linear layer, so that deep networks overflow."""
    return _normal(model, "unit_normal", lambda fan: 1.0)


def gaussian(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Weights with std 1 / n_in: multiplies a signal by 1 / sqrt(n_in) per linear layer, so that it dies with depth."""
    return _normal(model, "gaussian", lambda fan: 1 / fan.n_in)


def lecun_normal(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Weights with std 1 / sqrt(n_in): keeps a signal's variance through linear layers (LeCun et al. 1998, eq. 16)."""
    return _normal(model, "lecun_normal", lambda fan: fan.n_in**-0.5)


def glorot_normal(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Weights with std sqrt(2 / (n_in + n_out)): between keeping the signal and its gradient (Glorot and Bengio 2010).

    Their eq. 12, drawn from a normal.
    """
    return _normal(model, "glorot_normal", lambda fan: math.sqrt(2 / (fan.n_in + fan.n_out)))


def glorot_uniform(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Weights from U(-a, a), a = sqrt(6 / (n_in + n_out)), the std of `glorot_normal` (Glorot and Bengio, eq. 16)."""
    return _uniform(model, "glorot_uniform", lambda fan: math.sqrt(6 / (fan.n_in + fan.n_out)))


def he_normal(model: nn.Module, *, sample: Inputs | None = None, slope: float | str = 0.0) -> list[Change]:
    """Weights with std sqrt(2 / ((1 + slope^2) n_in)): keeps the mean square under ReLU (He et al. 2015, eq. 15).

    slope: of a leaky ReLU below 0, in [0, 1]; or auto: std gain / sqrt(n_in) with the gain that what follows the layer
    on the sample asks for (`knep.surgery.weights.gains_of`). Raises InputError for any other, and for auto without a
    sample.
    """
    gain = _gain(model, sample, slope)
    return fill(
        model, "he_normal", lambda layer, weight: weight.normal_(0, gain(layer) * fans(layer, weight).n_in ** -0.5)
    )


def he_uniform(model: nn.Module, *, sample: Inputs | None = None, slope: float | str = 0.0) -> list[Change]:
    """Weights from U(-a, a), a = sqrt(6 / ((1 + slope^2) n_in)): the std of `he_normal` (He et al. 2015, eq. 15).

    slope: as for `he_normal`.
    """
    gain = _gain(model, sample, slope)

    def rule(layer: nn.Module, weight: Tensor) -> None:
        bound = gain(layer) * math.sqrt(3 / fans(layer, weight).n_in)
        weight.uniform_(-bound, bound)

    return fill(model, "he_uniform", rule)


def _gain(model: nn.Module, sample: Inputs | None, slope: float | str) -> Callable[[nn.Module], float]:
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


def orthogonal(model: nn.Module, *, sample: Inputs | None = None, gain: float = 1.0) -> list[Change]:
    """Weight matrices with orthonormal rows or columns: keeps the length of every signal, not only on average.

    Saxe, McClelland and Ganguli 2014. A convolution's matrix is (filters, channels x taps), one for each group.

    gain: factor on the matrix, in (0, inf). Raises InputError outside it.
    """
    check("gain", gain, "(0, inf)")

    def rule(layer: nn.Module, weight: Tensor) -> None:
        for block in weight.chunk(groups_of(layer)):
            block.copy_(_orthogonal_like(block, gain))

    return fill(model, "orthogonal", rule)


def delta_orthogonal(model: nn.Module, *, sample: Inputs | None = None, gain: float = 1.0) -> list[Change]:
    """Convolutions that act on each pixel by an orthogonal matrix: it sits at the centre tap, all other taps are 0.

    Xiao et al. 2018, algorithm 2. Keeps each pixel's length where a convolution has no fewer outputs than inputs and
    stride 1; with fewer it is a projection. Linear layers become orthogonal.

    gain: factor on the matrix, in (0, inf). Raises InputError outside it.
    """
    check("gain", gain, "(0, inf)")

    def rule(layer: nn.Module, weight: Tensor) -> None:
        weight.zero_()
        centre = (slice(None), slice(None), *(size // 2 for size in weight.shape[2:]))
        for block in weight.chunk(groups_of(layer)):
            block[centre] = _orthogonal_like(block[centre], gain)

    return fill(model, "delta_orthogonal", rule)


def _orthogonal_like(weight: Tensor, gain: float) -> Tensor:
    """A random orthogonal tensor of the weight's shape, float32 at least: half precision has no QR decomposition."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return nn.init.orthogonal_(torch.empty(weight.shape, device=weight.device, dtype=dtype), gain)


def dirac(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Convolutions that begin by handing on what they read: filter i copies input channel i, at its centre tap.

    Zagoruyko and Komodakis 2017, sec. 3; as a start of plain weights, Jordan 2024 (airbench). Filters beyond the inputs
    of their group, linear layers and transposed convolutions start as in `he_normal`.
    """

    def rule(layer: nn.Module, weight: Tensor) -> None:
        weight.normal_(0, math.sqrt(2 / fans(layer, weight).n_in))
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            for block in weight.chunk(groups_of(layer)):
                nn.init.dirac_(block[: block.shape[1]])

    return fill(model, "dirac", rule)


def whiten_first(model: nn.Module, *, sample: Inputs | None = None, eps: float = 0.01) -> list[Change]:
    """The first convolution decorrelates the patches of the sample; all other layers start as in `dirac`.

    With V diag(l) V' the covariance of the patches, its filters are the rows of +-diag(l + eps)^(-1/2) V', largest l
    first (Coates and Ng 2012, sec. 2; as a first layer with both signs: Jordan 2024). Where there are more filters than
    that, the others are random mixtures of these rows, of length 1, which give the same variance.

    sample: (N, C, H, W) batch, scaled as in training; eps: added to each variance, in (0, inf). Raises InputError
    without a sample, on the meta device, or where the first convolution has groups.
    """
    check("eps", eps, "(0, inf)")
    model = bare(model)
    if sample is None or any(t.is_meta for t in tensors(sample)):
        raise InputError("whiten_first measures a batch of training images: give sample, or use init=dirac")
    changes = dirac(model)
    weight, read = _first_convolution(model, sample)
    filters = whitening_filters(read, weight.layer, eps)
    assign(weight, filters)
    first = f"whiten_first, rms {rms(filters)}"
    said = {c.path: c.after if c.after.startswith("left") else f"whiten_first: {c.after}" for c in changes}
    said[weight.name] = first
    return [Change(c.path, c.before, said[c.path]) for c in changes]


def _first_convolution(model: nn.Module, sample: Inputs) -> tuple[Weight, Tensor]:
    """The weight of the 2-d convolution that acts first on the sample, and what it reads."""
    weights: dict[nn.Module, Weight] = {w.layer: w for w in covered(model) if isinstance(w.layer, nn.Conv2d)}
    read: list[tuple[Weight, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        read.append((weights[layer], args[0]))

    _observe(model, sample, list(weights), note)
    if not read:
        raise NoEffectError("init.whiten_first changed nothing: no trained 2-d convolution acts on the sample")
    return read[0]


def lsuv(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
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
    if any(t.is_meta for t in (*tensors(sample), *model.parameters())):
        raise InputError("lsuv measures signals, and the meta device has none: use init=orthogonal")
    changes = {change.path: change for change in orthogonal(model)}
    waiting: dict[nn.Module, Weight] = {
        weight.layer: weight for weight in covered(model) if weight.attribute == "weight"
    }

    def divide(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
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


def _observe(model: nn.Module, sample: Inputs, layers: list[nn.Module], hook: Callable[..., Any]) -> None:
    """One forward pass in eval mode with `hook` behind each of the layers; every module's mode is restored."""
    with torch.no_grad(), mode(model, False), hooked(layers, leave=hook):
        call(model, like(model, sample))


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


def skipinit(model: nn.Module, *, sample: Inputs | None = None, value: float = 0.0) -> list[Change]:
    """Each residual branch gets a trained factor that begins at 0, so that a block begins as its shortcut.

    SkipInit, De and Smith 2020, sec. 4: x + alpha f(x). It trains deep residual nets without norms; the other weights
    stay as they were built, for which the authors take those of `he_normal`.

    value: of alpha at the start, in [0, 1]. Raises InputError outside, or for a branch that cannot be read.
    """
    check("value", value, "[0, 1]")
    model = bare(model)
    branches, left = branches_of(model, sample, "init.skipinit")
    return scale_ends(model, sample, branches, "skipinit", lambda branch: BranchScale(value)) + left


def rezero(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Each layer gets one trained factor of 0 for all of its residual branches: x + alpha f(x), alpha = 0.

    ReZero, Bachlechner et al. 2021, eq. 1 and 8: the attention and the feed-forward branch of a transformer's layer
    share it, which `skipinit` gives each its own. The other weights stay as they were built. With norms behind the
    sums a layer begins as these norms of its input.
    """
    model = bare(model)
    branches, left = branches_of(model, sample, "init.rezero")
    shared: dict[nn.Module, BranchScale] = {}

    def make(branch: Branch) -> BranchScale:
        scale = BranchScale(0.0)
        scale.scale = shared.setdefault(branch.owner, scale).scale
        return scale

    return scale_ends(model, sample, branches, "rezero", make) + left


def layer_scale(model: nn.Module, *, sample: Inputs | None = None, value: float = 1e-4) -> list[Change]:
    """Each residual branch gets a small trained factor for each of its channels: x + diag(lambda) f(x).

    LayerScale, Touvron et al. 2021, sec. 2: 0.1 up to 18 layers, 1e-5 for 24, 1e-6 for deeper ones, as in ConvNeXt
    (Liu et al. 2022). A model that has layer scales gets the value in these. The other weights stay as they were built.

    value: of every lambda at the start, in (0, 1]. Raises InputError outside, without a sample, or where the axis
    of the channels cannot be told.
    """
    check("value", value, "(0, 1]")
    model = bare(model)
    own = own_scales(model)
    if own:
        changes = [Change(name, f"rms {rms(p.detach())}", f"layer_scale, {value}") for name, p in own.items()]
        for p in own.values():
            nn.init.constant_(p, value)
        return changes
    branches, left = branches_of(model, sample, "init.layer_scale")
    sizes = iter(channels_of(model, sample, branches, "init.layer_scale").values())
    return scale_ends(model, sample, branches, "layer_scale", lambda branch: BranchScale(value, *next(sizes))) + left


def fixup(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Residual nets without norms: each branch begins at 0, so that a step moves the output alike at any depth.

    Fixup, Zhang, Dauphin and Ma 2019, sec. 3: the last layer of each branch and the classifier are 0; the m - 1 layers
    of a branch before it have He's weights times L^(-1 / (2 m - 2)), L branches; all other layers He's. Each branch
    gets a trained factor of 1, and each convolution, linear layer and activation a trained 0 that is added first.

    Raises InputError for a model with norms, which Fixup is there to replace, or of a transformer.
    """
    model = bare(model)
    refuse_for_fixup(model)
    branches, left = branches_of(model, sample, "init.fixup")
    order = {m: i for i, m in enumerate(model.modules())} if sample is None else Pass(model, sample).start
    parts = branch_weights(model, branches, order)
    factors: dict[nn.Module, float] = {}
    for weights in parts:
        depth = len(weights)
        for i, weight in enumerate(weights, start=1):
            factors[weight.layer] = 0.0 if i == depth else len(branches) ** (-1 / (2 * depth - 2))
    last = classifier_of(model, sample)
    factors |= {last: 0.0} if last is not None else {}

    def rule(layer: nn.Module, weight: Tensor) -> None:
        weight.normal_(0, math.sqrt(2 / fans(layer, weight).n_in)).mul_(factors.get(layer, 1.0))

    drawn = fill(model, "fixup", rule)
    scaled = scale_ends(model, sample, branches, "fixup", lambda branch: BranchScale(1.0))
    return drawn + scaled + shifted(model) + left


def t_fixup(model: nn.Module, *, sample: Inputs | None = None, remove_norms: bool = True) -> list[Change]:
    """Transformers without norms and without a warm-up: weights so small that the first steps of Adam stay bounded.

    T-Fixup, Huang et al. 2020, sec. 3.2: Glorot's uniform weights; embeddings from N(0, 1/d), times (9 N)^(-1/4);
    values, outputs and feed-forward weights times 0.67 N^(-1/4) in N layers that read no encoder, times (9 N)^(-1/4)
    in those that do. Embeddings of places are drawn alike. The model's norms inside its layers are taken out.

    remove_norms: False leaves them, where only the small weights are wanted. Raises NoEffectError for a model without
    blocks of attention.
    """
    model = bare(model)
    refuse_scripted(model, "init.t_fixup")
    blocks = blocks_of(model, "init.t_fixup")
    encoder, decoder = counts_of(blocks)

    def factor(block: Block) -> float:
        return (9 * decoder) ** -0.25 if block.reads else 0.67 * encoder**-0.25

    def draw(weight: Tensor, fan: Fans) -> None:
        weight.uniform_(-1, 1).mul_(math.sqrt(6 / (fan.n_in + fan.n_out)))

    changes = draw_blocks(model, blocks, "t_fixup", draw, factor)
    tables = {c.path: c for c in draw_embeddings(model, (9 * max(encoder, decoder)) ** -0.25)}
    changes = [c for c in changes if c.path not in tables] + list(tables.values())
    if remove_norms:
        changes += removed_norms(model, blocks)
    return changes


def deepnorm(model: nn.Module, *, sample: Inputs | None = None) -> list[Change]:
    """Transformers with norms behind the sums: LN(alpha x + f(x)), which stays trainable at 1000 layers.

    DeepNet, Wang et al. 2022, table 1: for N layers of an encoder or of a decoder alone alpha = (2 N)^(1/4) and
    beta = (8 N)^(-1/4); of both, N and M, 0.81 (N^4 M)^(1/16) and 0.87 (N^4 M)^(-1/16) in the encoder, (3 M)^(1/4) and
    (12 M)^(-1/4) in the decoder. Weights are Glorot's normal ones, values, outputs and feed-forward weights times beta.
    The norm reads x + f(x) / alpha with its eps divided by alpha^2, which is the same function.

    Raises InputError for norms before the branches, NoEffectError for a model without blocks of attention.
    """
    model = bare(model)
    refuse_scripted(model, "init.deepnorm")
    blocks = blocks_of(model, "init.deepnorm")
    sums = [normed_sums(model, block, sample, "init.deepnorm") for block in blocks]
    encoder, decoder = counts_of(blocks)

    def draw(weight: Tensor, fan: Fans) -> None:
        weight.normal_(0, math.sqrt(2 / (fan.n_in + fan.n_out)))

    changes = draw_blocks(
        model, blocks, "deepnorm", draw, lambda block: deepnorm_factors(block.reads, encoder, decoder)[1]
    )
    for block, found in zip(blocks, sums, strict=True):
        alpha, _ = deepnorm_factors(block.reads, encoder, decoder)
        unfuse(block.module)
        for one in found:
            norm: Any = one.norm
            follow(model, one.end, BranchScale(1 / alpha, trained=False), "deepnorm")
            norm.eps = norm.eps / alpha**2
            changes.append(Change(one.path, "x + f(x)", f"{alpha:.4g} x + f(x)"))
    return changes
