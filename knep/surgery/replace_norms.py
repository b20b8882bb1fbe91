"""How a norm comes into a model: into the places of a knep model, for the norm layers of any other, or by insertion."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from knep.errors import InputError
from knep.nn.kinds import ACTIVATIONS, is_norm
from knep.nn.norm import TokenGroupNorm
from knep.nn.place import Place, ZeroGain
from knep.surgery.check_forward import probe
from knep.surgery.edit import Change, bare, copied, describe, frozen_parts, modules_of, replace, required, text, unfuse
from knep.surgery.find_norms import LAYERS, Found, norms_of
from knep.surgery.influence import Influence
from knep.surgery.insert_module import put_behind
from knep.surgery.record import calls, classifier_of
from knep.surgery.sample import Inputs, like, tensors
from knep.surgery.watch import FUNCTIONS, hidden_gates, watch

FROZEN = "kept: frozen"
_PLACES = {"before_activation": "norm", "after_activation": "norm_after"}


@dataclass(frozen=True)
class Site:
    """Where a norm is to stand: the layer there now, the axes it is to normalise, and the shapes that reach it.

    axis: "first", "last" or "pixel", as in `knep.surgery.find_norms`; shape: its channels, or a layer norm's axes.
    """

    path: str
    old: Any
    axis: str
    shape: list[int]
    shapes: list[torch.Size] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.shape[0]

    def eps(self, asked: float | None, default: float) -> float:
        """What the user asked for, or else the layer's own value, or else the default."""
        own = getattr(self.old, "eps", None)
        return asked if asked is not None else default if own is None else own


@dataclass(frozen=True)
class Kind:
    """One norm: which layers it keeps; what it puts before channels on axis 1, on the last axis, and at each pixel.

    pixel: None is `first`, for a kind that has its own statistics there. joint: it can normalise several last axes
    at once. shifts: it has a shift, which makes a bias before it needless.
    """

    name: str
    kept: Callable[[Any], bool]
    first: Callable[[Site], nn.Module]
    last: Callable[[Site], nn.Module]
    pixel: Callable[[Site], nn.Module] | None = None
    joint: bool = False
    shifts: bool = True

    def make(self, site: Site) -> nn.Module:
        """The norm for `site`. Raises InputError where it makes no sense there."""
        if len(site.shape) > 1 and not self.joint:
            raise InputError(
                f"norm.{self.name} cannot act on {site.path}, whose gains belong to single values of shape "
                f"{tuple(site.shape)}, not to channels: use norm=layer, rms or none"
            )
        return {"first": self.first, "last": self.last, "pixel": self.pixel or self.first}[site.axis](site)


def normalise(model: nn.Module, kind: Kind, sample: Inputs | None, position: str, inserted: bool) -> list[Change]:
    """Fills the places at `position`, exchanges all norm layers, or, where there is neither, inserts some if asked."""
    if position not in _PLACES:
        raise InputError(f"position must be one of {', '.join(_PLACES)}, got {position}")
    if inserted and position == "after_activation":
        raise InputError("norm.insert puts norms before activations: use position=before_activation")
    model = bare(model)
    left = _refuse_leaks(model, kind, sample, position, inserted)
    return _normalise(model, kind, sample, position, inserted) + left


def _normalise(model: nn.Module, kind: Kind, sample: Inputs | None, position: str, inserted: bool) -> list[Change]:
    places = [(p, m) for p, m in modules_of(model, Place) if m.kind == _PLACES[position]]
    is_frozen = frozen_parts(model)
    found, strange = norms_of(model, is_frozen)
    left = [Change(p, describe(m), FROZEN) for p, m in modules_of(model, nn.Module) if is_norm(m) and is_frozen(p)]
    if position == "after_activation":
        refuse_empty_zero_gains(model, f"{kind.name} behind the activation")
        _refuse_moving(found)
    if inserted and not places and not found and not left:
        return insert(model, sample, lambda *where: kind.make(Site(*where)), f"norm.{kind.name}")
    shapes = _shapes(model, sample, [m for _, m, _ in found])
    sites = [Site(p, m, "first", [m.features], shapes[m]) for p, m in places]
    new = {site.old: _filling(site, kind) for site in sites}
    for path, old, norm in found:
        if old not in new:
            new[old] = _successor(path, old, norm, kind, shapes[old])
    olds = places + [(path, old) for path, old, _ in found]
    changes = [change for path, old in olds for change in _exchange(model, path, old, new[old], kind)]
    left += [Change(p, describe(m), "not reached: no plain norm, by a probe of its values") for p, m in strange]
    why = f"{left[0].path}: {left[0].before} is {FROZEN}" if left and not strange else _why_none(position, strange)
    return required(changes, f"norm.{kind.name}", why) + left


def _refuse_leaks(model: nn.Module, kind: Kind, sample: Inputs | None, position: str, inserted: bool) -> list[Change]:
    """InputError where the new norms would let later positions or other rows through that the old ones did not.

    Found on copies; a Change says so where the model cannot be copied. Models with places for norms are of images.
    """
    values = [] if sample is None else [*tensors(sample), *model.parameters()]
    if (
        sample is None
        or any(t.is_meta for t in values)
        or any(m.kind in _PLACES.values() for _, m in modules_of(model, Place))
    ):
        return []
    try:
        before, after = copied(model), copied(model)
    except InputError:
        return [Change("the model", type(model).__name__, "not checked for leaks: it cannot be copied")]
    changes = _normalise(after, kind, sample, position, inserted)
    paths = [c.path for c in changes if _mixes(after, c)]
    if not paths:
        return []
    try:
        probe(after, like(after, sample))
    except InputError as error:
        raise InputError(f"norm.{kind.name}: with it {error}") from error
    leak = Influence(before, sample, paths).leak(after)
    if leak is None:
        return []
    path = leak.path or "the output"
    who = "later positions change earlier ones" if leak.later else "rows of a batch change one another"
    tokens = [p for p, _, norm in norms_of(model)[0] if norm.axis == "last"]
    by_token = (bool(tokens) or inserted) and kind.name not in ("layer", "rms")
    remedy = "norm=layer or norm=rms" if by_token else "norm=auto or norm=none"
    name = f"{path} ({type(model.get_submodule(leak.path)).__name__})" if leak.path else path
    raise InputError(f"norm.{kind.name} would let {who}, which this model does not, first at {name}: use {remedy}")


def _mixes(after: nn.Module, change: Change) -> bool:
    """Whether a change put a norm into a module that may mix positions, as no norm of the last axis does."""
    if change.after.startswith(("kept", "no norm", "not reached", "none:")):
        return False
    alone = (nn.LayerNorm, nn.RMSNorm, TokenGroupNorm)
    return any(isinstance(m, LAYERS) and not isinstance(m, alone) for m in after.get_submodule(change.path).modules())


def refuse_empty_zero_gains(model: nn.Module, name: str) -> None:
    """InputError where a residual branch is to end with a gain of 0, and no norm with a gain comes there."""
    if any(modules_of(model, ZeroGain)):
        raise InputError(
            f"zero_init_residual needs a norm with a gain at the end of each branch, which norm.{name} does not put "
            "there: use norm=batch, or zero_init_residual=false"
        )


def _why_none(position: str, strange: list[tuple[str, nn.Module]]) -> str:
    if strange:
        path, module = strange[0]
        return f"{path} ({type(module).__name__}) is no plain norm, by a probe of its values, and there is no other"
    hint = ": write norm.insert=true to put one behind each layer that an activation follows"
    where = position.replace("_", " the ")
    return f"the model has no norm layer and no place for one {where}{hint if position == 'before_activation' else ''}"


def _shapes(model: nn.Module, sample: Inputs | None, norms: list[nn.Module]) -> dict[nn.Module, list[torch.Size]]:
    """module -> the shapes that reach it; in training mode too if eval mode leaves norms out, as in auxiliary heads."""
    shapes = defaultdict(list)
    for training in (False, True):
        if sample is not None and (not training or any(m not in shapes for m in norms)):
            for call in calls(model, sample, training=training):
                shapes[call.module].append(call.input.shape)
    return shapes


def _filling(site: Site, kind: Kind) -> nn.Module:
    new = kind.make(site)
    if isinstance(site.old, ZeroGain):
        nn.init.zeros_(new.weight)  # pyright: ignore[reportArgumentType]
    return new


def _successor(path: str, old: nn.Module, norm: Found, kind: Kind, shapes: list[torch.Size]) -> nn.Module:
    """What takes the place of `old`, with its gain, shift, running statistics and children; `old` if it is right."""
    if kind.kept(norm.plain):
        return old
    new = kind.make(Site(path, norm.plain, norm.axis, norm.shape, shapes))
    if isinstance(norm.plain, _BatchNorm) and isinstance(new, _BatchNorm):
        new.track_running_stats = norm.plain.track_running_stats
        new.running_mean, new.running_var = norm.plain.running_mean, norm.plain.running_var
        new.num_batches_tracked = norm.plain.num_batches_tracked
    _keep_affine(norm.plain, new)
    return nn.Sequential(OrderedDict(norm=new, **norm.children)) if norm.children else new


def _keep_affine(old: nn.Module, new: nn.Module) -> None:
    """The very parameters of `old`; a norm without them stays without, one with a gain alone may get a shift of 0."""
    gain, shift = getattr(old, "weight", None), getattr(old, "bias", None)
    if gain is None and shift is None:
        new.register_parameter("weight", None)
        new.register_parameter("bias", None)
    for name, value in (("weight", gain), ("bias", shift)):
        if value is not None:
            setattr(new, name, value)
    if gain is not None and shift is None and isinstance(new.bias, Tensor):
        new.bias.requires_grad_(gain.requires_grad)


def _exchange(model: nn.Module, path: str, old: nn.Module, new: nn.Module, kind: Kind) -> Iterator[Change]:
    if new is old:
        yield Change(path, describe(old), "kept")
        return
    yield Change(path, describe(old), text(new))
    replace(model, path, new)
    parent = model.get_submodule(path.rpartition(".")[0])
    unfuse(parent)
    if isinstance(old, Place) and old.kind == "norm" and kind.shifts:
        yield from _take_bias(model, path, old.features)


def _take_bias(model: nn.Module, path: str, features: int) -> Iterator[Change]:
    """The norm's own shift replaces the bias of the layer registered right before it, as in every published net."""
    parent, _, name = path.rpartition(".")
    siblings = list(model.get_submodule(parent)._modules.items())
    at = next(i for i, (sibling, _) in enumerate(siblings) if sibling == name)
    before, m = siblings[at - 1] if at else ("", None)
    units = getattr(m, "out_features", getattr(m, "out_channels", None))
    if isinstance(m, (nn.Linear, _ConvNd)) and m.bias is not None and units == features:
        m.register_parameter("bias", None)
        yield Change(f"{parent}.{before}.bias".lstrip("."), f"{features} values", "none: the norm's shift replaces it")


def _refuse_moving(found: list[tuple[str, nn.Module, Found]]) -> None:
    if found:
        raise InputError(
            f"position=after_activation cannot move {found[0][0]}, which stands where its model calls it: "
            "use before_activation, or a knep model built with norm=None"
        )


_WEIGHTED = (nn.Linear, _ConvNd)


def insert(model: nn.Module, sample: Inputs | None, make: Callable[..., nn.Module], name: str) -> list[Change]:
    """Puts `make(path, layer, axis, shape, shapes)` behind each layer whose output an activation reads at every call.

    Not behind the classifier. The layer stays the same object and no parameter gets another name: the norm is a child
    of it. Where the norm makes no sense, as instance norm behind a linear layer, the layer is left and listed so. A
    forward on `sample` shows what reads what, or else torch.fx: InputError where the model cannot be traced either.
    """
    followed = _followed_on(model, sample) if sample is not None else _followed_in_graph(model, name)
    last = classifier_of(model, sample)
    done: dict[nn.Module, str] = {}
    changes, left = [], []
    for path, old in list(modules_of(model, *_WEIGHTED)):
        if old not in followed or old is last:
            continue
        try:
            if old not in done:
                norm = make(path, old, *_channels(old, followed[old]), followed[old])
                done[old] = f"{describe(old)}, {describe(norm)}"
                put_behind(old, norm, "norm")
        except InputError as error:
            left.append(Change(path, describe(old), f"no norm behind it: {error}"))
            continue
        changes.append(Change(path, describe(old), done[old]))
    why = left[0].after if left else "no linear layer or convolution but the classifier is followed by an activation"
    return required(changes, name, why) + left


def _channels(layer: Any, shapes: list[torch.Size]) -> tuple[str, list[int]]:
    """(axis, channels) of a layer's output; the last axis is right for a linear layer's whatever its shape."""
    if isinstance(layer, nn.Linear):
        flat = bool(shapes) and all(len(shape) == 2 for shape in shapes)
        return "first" if flat else "last", [layer.out_features]
    return "first", [layer.out_channels]


def _followed_on(model: nn.Module, sample: Inputs) -> dict[nn.Module, list[torch.Size]]:
    """layer -> the shapes of its output, for the layers whose output goes straight into an activation at every call."""
    seen, functions = watch(model, sample)
    hidden = hidden_gates(seen)
    read = {id(c.input) for c in seen if isinstance(c.module, ACTIVATIONS) or c.module in hidden}
    read |= {id(c.input) for c in functions if issubclass(FUNCTIONS[c.function], ACTIVATIONS)}
    shapes, others = defaultdict(list), set()
    for call in seen:
        if isinstance(call.module, _WEIGHTED):
            shapes[call.module].append(call.output.shape)
            if id(call.output) not in read:
                others.add(call.module)
    return {module: found for module, found in shapes.items() if module not in others}


def _followed_in_graph(model: nn.Module, name: str) -> dict[nn.Module, list[torch.Size]]:
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # a user's forward can raise anything on the tracer's stand-ins
        raise InputError(f"{name} with insert=true needs sample=, a batch: the model cannot be traced") from error
    followed, others = set(), set()
    for node in graph.nodes:
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, _WEIGHTED):
            (followed if any(_is_activation(model, user) for user in node.users) else others).add(layer)
    return {layer: [] for layer in followed - others}


def _is_activation(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), ACTIVATIONS)
    function: Any = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    return issubclass(FUNCTIONS.get(function, nn.Module), ACTIVATIONS)
