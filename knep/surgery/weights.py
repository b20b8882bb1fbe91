"""Giving weights new values: what the `init` slot is made of.

Covered are the trained weights of `nn.Linear`, all convolutions (grouped and transposed ones included), `nn.Bilinear`,
Hugging Face's `Conv1D`, and the packed projections of `nn.MultiheadAttention`, which are three matrices in one. Their
biases are set to 0. A weight that several layers share is drawn once, for the layer that sums over most inputs.

An embedding as torch draws it, N(0, 1), gets N(0, 0.02), tied to a classifier or not (Radford et al. 2019); rows are
looked up, not summed, so that no rule of fans fits. What its author drew otherwise stays. So does what begins at zero
in a model that does not, such as the last convolution of a diffusion net, and both factors of a low-rank adapter. Norms
keep what they have; any other parameter of two axes or more, such as a recurrent layer's, is listed as left as it is,
with the reason.

`gains_of` measures the gain that keeps a signal's mean square through what follows a layer. For a nonlinearity f it is
1 / sqrt(E f(z)^2), z standard normal: sqrt(2) for ReLU (He et al. 2015), 1 where none follows, such as behind the
classifier. What only scales or moves a signal, such as norms and pooling, is passed.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from knep.errors import InputError
from knep.nn.kinds import adapters, is_norm
from knep.surgery.edit import Change, bare, required
from knep.surgery.record import BENDS, BENDS_OR_GATES, Recorder, mode, name_of
from knep.surgery.sample import Inputs, call, ready

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_EMBEDDED = 0.02  # std of words in GPT-2
_ADAPTER = "a low-rank adapter begins as its author drew it"
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Fans(NamedTuple):
    """Inputs that one output of a layer sums over, and outputs that one input reaches."""

    n_in: int
    n_out: int


@dataclass(frozen=True)
class Weight:
    """A weight that an init draws: the layer's path, the layer, the attribute, and of how many matrices it is made."""

    path: str
    layer: Any
    attribute: str = "weight"
    parts: int = 1

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}".lstrip(".")

    @property
    def bias(self) -> str:
        """The attribute of the bias that belongs to the weight."""
        return "bias" if self.attribute == "weight" else "in_proj_bias"

    @property
    def value(self) -> Tensor:
        return getattr(self.layer, self.attribute).detach()

    @property
    def stored(self) -> nn.Parameter | None:
        """The parameter that training changes, below a parametrization; None where the weight is computed otherwise."""
        if is_parametrized(self.layer, self.attribute):
            return next(self.layer.parametrizations[self.attribute].parameters(), None)
        own = self.layer._parameters.get(self.attribute)
        return (
            own
            if own is not None
            else self.layer._parameters.get(f"{self.attribute}_v", self.layer._parameters.get(f"{self.attribute}_orig"))
        )


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution; 1 for any other layer."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


def fans(layer: nn.Module, weight: Tensor) -> Fans:
    """Fans of a layer: channels of one group x taps of a convolution. Strides and padding do not count.

    weight: (out, in), (out, in / groups, taps ...) or, transposed, (in, out / groups, taps ...); of a bilinear layer
    (out, in 1, in 2), summed over all pairs; of an embedding (words, out), where one word alone is read.
    """
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return Fans(1, weight.shape[1])
    if _is_transposed_linear(layer):
        return Fans(*weight.shape)
    taps = weight[0, 0].numel()
    rows, columns = weight.shape[0] // groups_of(layer) * taps, weight.shape[1] * taps
    transposed = isinstance(layer, _ConvNd) and layer.transposed
    return Fans(rows, columns) if transposed else Fans(columns, rows)


def _is_transposed_linear(layer: nn.Module) -> bool:
    """Whether a layer is Hugging Face's Conv1D: a linear layer whose weight is (in, out)."""
    weight = layer._parameters.get("weight")
    if type(layer).__name__ != "Conv1D" or weight is None or weight.dim() != 2:
        return False
    return getattr(layer, "nf", None) == weight.shape[1]


def _weights_of(path: str, layer: nn.Module) -> list[Weight]:
    if isinstance(layer, (nn.Linear, _ConvNd, nn.Bilinear, *_EMBEDDINGS)) or _is_transposed_linear(layer):
        return [Weight(path, layer)]
    if isinstance(layer, nn.MultiheadAttention):
        names = [name for name in _PROJECTIONS if getattr(layer, name, None) is not None]
        return [Weight(path, layer, name, 3 if name == "in_proj_weight" else 1) for name in names]
    return []


def covered(model: nn.Module) -> Iterator[Weight]:
    """Every weight that an init draws, in module order; one shared by several layers once.

    Raises InputError, naming it, for a weight that is quantised or complex.
    """
    chosen = _trained(model)
    meant = _meant(model, chosen.values())
    yield from (weight for key, weight in chosen.items() if key not in meant)


def _trained(model: nn.Module) -> dict[int, Weight]:
    """id -> every weight that is trained and of a known layer, those included that are to stay."""
    chosen: dict[int, Weight] = {}
    for path, layer in model.named_modules():
        if type(layer).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise InputError(
                f"init cannot draw {path or 'the model'}, {type(layer).__name__} is quantised: use init=none"
            )
        for weight in _weights_of(path, layer):
            stored = weight.stored
            if stored is None or not stored.requires_grad:
                continue
            if not stored.is_floating_point():
                raise InputError(f"init cannot draw {weight.name} of {stored.dtype}: use init=none")
            old = chosen.get(id(stored))
            if old is None or _n_in(weight) > _n_in(old):
                chosen[id(stored)] = weight
    return chosen


def _meant(model: nn.Module, weights: Collection[Weight]) -> dict[int, str]:
    """id of each weight that its author drew in a way that is to stay -> the reason."""
    empty = {id(w.stored) for w in weights if w.stored is not None and _is_zero(w.stored)}
    if len(empty) == len(weights):
        empty.clear()  # where all are zero, nobody meant a part to begin so
    meant = dict.fromkeys(empty, "it begins at zero, which its author meant")
    tables, held = _embedded(model), adapters(model)
    inside: dict[str, list[Weight]] = {}
    for weight in weights:
        inside.setdefault(weight.path.rpartition(".")[0], []).append(weight)
        if id(weight.stored) in tables and not _is_torchs_own(weight.stored):
            meant[id(weight.stored)] = "an embedding that its author drew"
        named = "lora" in weight.name.lower() or "lora" in type(weight.layer).__name__.lower()
        if named or weight.layer in held:
            meant[id(weight.stored)] = _ADAPTER
    for parent, found in inside.items():
        last = [w for w in found if id(w.stored) in empty]
        frozen = parent and any(not p.requires_grad for p in model.get_submodule(parent).parameters())
        for weight in found if frozen else []:
            if any(_n_in(end) == fans(weight.layer, weight.value).n_out for end in last if end is not weight):
                meant.setdefault(id(weight.stored), _ADAPTER)
    return meant


def _is_zero(p: Tensor) -> bool:
    return not p.is_meta and not bool(p.detach().any())


def _embedded(model: nn.Module) -> dict[int, Any]:
    """id of each weight that is an embedding's, alone or among others -> the embedding."""
    return {id(m.weight): m for m in model.modules() if isinstance(m, _EMBEDDINGS)}


def _is_torchs_own(table: Tensor | None) -> bool:
    """Whether an embedding looks as torch draws it: N(0, 1), rows of padding aside."""
    if table is None or table.is_meta:
        return True
    values = table.detach()[table.detach().any(1)].float()
    return bool(values.numel()) and abs(float(values.square().mean().sqrt()) - 1) < max(0.1, 3 / values.numel() ** 0.5)


def _n_in(weight: Weight) -> int:
    return fans(weight.layer, weight.value).n_in


def assign(weight: Weight, value: Tensor) -> None:
    """Give the weight this value; through its parametrization (weight or spectral normalization) where it has one.

    Weight normalization then computes with exactly these values; spectral normalization with these, divided by their
    spectral norm. Raises InputError for a parametrization that cannot be inverted.
    """
    layer, attribute = weight.layer, weight.attribute
    if not is_parametrized(layer, attribute):
        if weight.stored is not getattr(layer, attribute):
            raise InputError(f"init cannot set {weight.name}, a hook computes it: use torch.nn.utils.parametrizations")
        with torch.no_grad():
            getattr(layer, attribute).copy_(value)
        return
    try:
        setattr(layer, attribute, value)
    except (NotImplementedError, RuntimeError) as error:
        kinds = ", ".join(type(p).__name__ for p in layer.parametrizations[attribute])
        raise InputError(f"init cannot set {weight.name} through its parametrization {kinds}: use init=none") from error


def fill(model: nn.Module, name: str, rule: Callable[[Any, Tensor], Any]) -> list[Change]:
    """Give each covered weight values that rule(layer, matrix) writes into a fresh tensor, and each bias 0.

    Drawn from torch's global generator of the weight's device. Parameters that are left are listed behind. Raises
    NoEffectError when no weight is covered.
    """
    model = bare(model)
    changes, drawn = [], list(covered(model))
    meant = _meant(model, _trained(model).values())
    tables = _embedded(model)
    for weight in drawn:
        before, table = weight.value, tables.get(id(weight.stored))
        value = torch.empty_like(before)
        with torch.no_grad():
            if table is not None:
                value.normal_(0, _EMBEDDED)
                if table.padding_idx is not None:
                    value[table.padding_idx] = 0
            else:
                for matrix in value.chunk(weight.parts):
                    rule(weight.layer, matrix)
            how = name if table is None else f"N(0, {_EMBEDDED}), as embeddings begin"
            changes.append(Change(weight.name, f"rms {rms(before)}", f"{how}, rms {rms(value)}"))
            assign(weight, value)
            bias = getattr(weight.layer, weight.bias, None)
            if bias is not None and bias.requires_grad:
                bias.zero_()
    left = _left(model, drawn, meant)
    return required(changes, "init", _why_nothing(left)) + left


def _why_nothing(left: list[Change]) -> str:
    """Why no weight is drawn, by the weights that are left: those that are trained say more than frozen ones."""
    trained = [change for change in left if not change.after.endswith("frozen")]
    if trained and all(_ADAPTER in change.after for change in trained):
        return f"what is trained are low-rank adapters ({trained[0].path}), which begin as drawn: write init=none"
    why = "the model has no trained weights of linear layers, convolutions or embeddings that may be drawn"
    told = trained or left
    if not told:
        return why
    alike = [change.path for change in told if change.after == told[0].after]
    named = alike[0] if len(alike) == 1 else f"each of {', '.join(alike[:3])}{' ...' if len(alike) > 3 else ''}"
    return f"{why}, and {named} is {told[0].after}: write init=none"


def _left(model: nn.Module, drawn: list[Weight], meant: Mapping[int, str]) -> list[Change]:
    """The parameters of two axes or more that keep their values, norms aside, each with the reason."""
    done = {id(p) for weight in drawn for p in _behind(weight)}
    changes, inside = [], adapters(model)
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if p.dim() > 1 and id(p) not in done and not is_norm(owner):
            unknown = _ADAPTER if owner in inside else f"{type(owner).__name__} is no layer that init knows"
            why = meant.get(id(p), unknown) if p.requires_grad else "frozen"
            changes.append(Change(name, f"rms {rms(p.detach())}", f"left as it is: {why}"))
    return changes


def _behind(weight: Weight) -> list[nn.Parameter]:
    """The parameters that the weight is computed of."""
    if is_parametrized(weight.layer, weight.attribute):
        return list(weight.layer.parametrizations[weight.attribute].parameters())
    return [] if weight.stored is None else [weight.stored]


def rms(weight: Tensor) -> str:
    """Root mean square of the elements, four digits; "unknown" on the meta device, which has shapes alone."""
    if weight.is_meta:
        return "unknown"
    return f"{weight.abs().square().mean().sqrt().item():.4g}"


_PASSED = (
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "native_batch_norm", "native_layer_norm"}
    | {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
    | {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}
    | {"max_pool1d", "max_pool2d", "max_pool3d", "pad", "add", "add_", "__add__", "__radd__"}
    | {"__iadd__", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "contiguous", "squeeze"}
    | {"unsqueeze", "__getitem__", "chunk", "split", "cat", "concat", "clone", "to", "float", "roll", "mean"}
)


class _Watch(Recorder):
    """Which layers' outputs an activation reads first, and its gain; outputs are kept, so that no id comes again."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.carried: dict[int, set[nn.Module]] = {}
        self.kept: list[Any] = []
        self.gains: dict[nn.Module, float] = {}

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self._carry(output, {module})

    def _carry(self, output: Tensor, layers: set[nn.Module]) -> None:
        self.carried[id(output)] = layers
        self.kept.append(output)

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        read = [id(t) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        layers = {layer for i in read for layer in self.carried.get(i, ())}
        output = func(*args, **kwargs)
        name = name_of(func)
        if layers and name in (*BENDS, *BENDS_OR_GATES):
            for layer in layers:
                self.gains.setdefault(layer, gain_of(func, args[1:], kwargs))
        for t in pytree.tree_leaves(output):
            if isinstance(t, Tensor) and (name in _PASSED or id(t) in self.carried):
                self._carry(t, layers if name in _PASSED else set())
        return output


def gain_of(function: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> float:
    """1 / sqrt(E f(z)^2) of an elementwise function, z standard normal, by its quantiles."""
    z = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    if name_of(function) == "prelu":
        slope = args[0] if args else (kwargs or {})["weight"]
        values = nn.functional.leaky_relu(z, 0.25 if slope.is_meta else float(slope.mean()))
    else:
        values = function(z, *args, **{k: v for k, v in (kwargs or {}).items() if k != "inplace"})
    return 1 / math.sqrt(values.square().mean().item())


def gains_of(model: nn.Module, sample: Inputs, layers: list[nn.Module]) -> dict[nn.Module, float]:
    """The gain that each of the layers asks for when the model reads two images of the sample, unitless."""
    with torch.no_grad(), mode(model, False), _Watch(layers) as watch:
        call(model, ready(model, sample))
    return {layer: watch.gains.get(layer, 1.0) for layer in layers}
