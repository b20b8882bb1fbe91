"""Fine-tuning, carried out: which parameters are trained in which epoch, and which norms keep their statistics.

A strategy (`knep.recipes.finetune`) says it of names; a `Tuning` does it to a model, as a function of the epoch alone,
so that a run that is resumed in any epoch goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from knep.errors import InputError
from knep.optim.param_groups import depths, in_blocks
from knep.surgery.edit import unwrapped
from knep.surgery.sample import Inputs


@dataclass(frozen=True)
class Layers:
    """The trained parameters of a model, by name. blocks: of the backbone, parameter -> block, counted from the input
    and without gaps; head: those of the head."""

    blocks: Mapping[str, int]
    head: tuple[str, ...]


@dataclass(frozen=True)
class Strategy:
    """thaws: parameter -> epoch from which it is trained, None for never; factors: parameter -> factor on the rate, 1
    where none is given; head_lr: rate of the head, None for the optimizer's; head: its parameters; freeze_norm: batch
    norms outside of the head keep their statistics for good."""

    thaws: Mapping[str, int | None]
    factors: Mapping[str, float] = field(default_factory=dict)
    head_lr: float | None = None
    head: tuple[str, ...] = ()
    freeze_norm: bool = False

    @property
    def last(self) -> int:
        """The epoch in which the last parameters thaw."""
        return max((epoch for epoch in self.thaws.values() if epoch is not None), default=0)


def layers_of(model: nn.Module, new: Collection[str] | None = None, sample: Inputs | None = None) -> Layers:
    """The backbone of a model in blocks, and its head: the parameters in `new`, or where it names none those of the
    output layer, the deepest.

    Blocks are those of `knep.optim.param_groups.in_blocks`, such as residual or transformer blocks; each other layer
    with weights is one. What has no weights, as a norm or a table of places, belongs to the block before it, or to the
    first. Depth is measured on `sample` (`knep.surgery.layer_depth`);
    without one it is the order of registration. Parameters that are frozen already are left out.
    Raises InputError where no parameter of the model is trained.
    """
    model = unwrapped(model)
    deep, _ = depths(model, sample)
    head = [name for name in deep if name in (new or ())]
    if not head:
        last = max(deep.values())
        head = [name for name, depth in deep.items() if depth == last]
    backbone = {name: depth for name, depth in in_blocks(model, deep).items() if name not in head}
    ranks = {depth: rank for rank, depth in enumerate(sorted(set(backbone.values())))}
    return Layers({name: ranks[depth] for name, depth in backbone.items()}, tuple(head))


class Tuning:
    """A strategy on a model. names and modules are looked up anew each time: copies of the model may take its place.

    shared: whether several processes reduce gradients together; then parameters that thaw later must look trained when
    they are wrapped, and what is frozen has its gradient dropped instead.
    """

    def __init__(self, strategy: Strategy, layers: Layers, loaded: Collection[str] | None = None) -> None:
        self.strategy, self.layers, self.loaded = strategy, layers, loaded
        self.shared = False
        self._frozen: list[Tensor] = []
        self._norms: list[nn.Module] = []

    @property
    def acts(self) -> bool:
        """Whether anything is frozen at any time."""
        return self.strategy.freeze_norm or any(epoch != 0 for epoch in self.strategy.thaws.values())

    def factors(self, lr: float) -> dict[str, float]:
        """Parameter -> factor on the rate `lr`, of all that are trained in any epoch."""
        strategy = self.strategy
        found = {name: strategy.factors.get(name, 1.0) for name, epoch in strategy.thaws.items() if epoch is not None}
        if strategy.head_lr is not None:
            found |= {name: strategy.head_lr / lr for name in strategy.head if name in found}
        return found

    def freeze(self, model: nn.Module) -> None:
        """What is never trained has no gradient from now on: to be called before an optimizer or a wrapper is made."""
        for name, p in unwrapped(model).named_parameters():
            if self.strategy.thaws.get(name, 0) is None:
                p.requires_grad_(False)

    def at(self, model: nn.Module, epoch: int) -> None:
        """Freezes and thaws the model for an epoch, 0-based; norms that are to keep their statistics go to eval."""
        model = unwrapped(model)
        self._frozen = []
        for name, p in model.named_parameters():
            if name not in self.strategy.thaws:
                continue
            thaws = self.strategy.thaws[name]
            frozen = thaws is None or epoch < thaws
            if frozen:
                self._frozen.append(p)
                p.grad = None
            p.requires_grad_(not frozen or (self.shared and thaws is not None))
        self._norms = self._kept(model, epoch)
        self.keep_norms()

    def _kept(self, model: nn.Module, epoch: int) -> list[nn.Module]:
        """The norms whose running statistics stay as they are in this epoch: those of frozen layers, or all loaded."""
        found, before = [], 0
        for path, module in model.named_modules():
            own = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
            thaws = [self.strategy.thaws[name] for name in own if name in self.strategy.thaws]
            first = min((float("inf") if t is None else t for t in thaws), default=before)
            before = first if own else before
            if getattr(module, "running_mean", None) is None:
                continue
            fixed = self.strategy.freeze_norm and not (own and set(own) <= set(self.strategy.head))
            if fixed or epoch < first:
                found.append(module)
        return found

    def keep_norms(self) -> None:
        """Puts the norms that keep their statistics back to eval, where something has set the model to training."""
        for norm in self._norms:
            if norm.training:
                norm.eval()

    @contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Around what estimates batch-norm statistics anew: those that are to keep theirs read and hold them."""
        stored = {norm: [b.detach().clone() for b in norm.buffers(recurse=False)] for norm in self._norms}

        def back(norm: nn.Module, inputs: object = None) -> None:
            norm.eval()
            for buffer, value in zip(norm.buffers(recurse=False), stored[norm], strict=True):
                buffer.copy_(value)

        hooks = [norm.register_forward_pre_hook(back) for norm in self._norms]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for norm in self._norms:
                back(norm)

    def release(self, model: nn.Module) -> None:
        """Lets all parameters look trained again that did before."""
        for name, p in unwrapped(model).named_parameters():
            if name in self.strategy.thaws:
                p.requires_grad_(True)

    def drop(self) -> None:
        """Removes the gradients of what is frozen, where several processes have reduced them."""
        if self.shared:
            for p in self._frozen:
                p.grad = None

    def trained(self, parameters: Collection[Tensor]) -> list[Tensor]:
        """Those of the parameters that are not frozen in the present epoch."""
        frozen = {id(p) for p in self._frozen}
        return [p for p in parameters if id(p) not in frozen]

    def refuse_short(self, epochs: int | None) -> None:
        """Raises InputError where the run of so many epochs ends before all is thawed; None for an unknown length."""
        if epochs is not None and epochs > 0 and self.strategy.last >= epochs:
            raise InputError(
                f"finetune thaws its last layers behind epoch {self.strategy.last}, and the run has {epochs}: write "
                f"trainer.max_epochs={self.strategy.last + 1} or more, or a smaller finetune.epochs"
            )

    def said(self) -> str:
        """One line: the head, and how many parameters thaw when."""
        thaws = self.strategy.thaws
        when = {
            epoch: sum(other == epoch for other in thaws.values())
            for epoch in sorted({e for e in thaws.values() if e is not None})
        }
        parts = [f"{count} from {'the start' if epoch == 0 else f'epoch {epoch + 1}'}" for epoch, count in when.items()]
        never = sum(epoch is None for epoch in thaws.values())
        head = self.layers.head
        shown = ", ".join(head[:2]) + (f" and {len(head) - 2} more" if len(head) > 2 else "")
        return f"finetune: head {shown}; parameters trained: {', '.join(parts)}" + (f"; {never} never" if never else "")
