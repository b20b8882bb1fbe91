"""The slots that edit the networks of a module, and the scaling in front of them, before the first step of a fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from knep.engine.any_module.part import (
    Part,
    edits_of,
    inputs_wanted,
    is_batch,
    network,
    refuse_scaled,
    scale_input,
    unknown,
)
from knep.engine.any_module.undo import Undo
from knep.errors import InputError, named
from knep.optim.statistics import again
from knep.recipes.recipe import Report
from knep.surgery.check_forward import as_inputs, probe
from knep.tasks.batches import Reading

_SCALING = "knep_scaling"  # the submodule of the LightningModule that holds the scaling of its network's input
_SCALED_ON = 100  # training batches that a scaling is fitted on


class Edits:
    """Edits of the networks of one module. say: one line to the user; the rest as for `RecipeCallback`."""

    def __init__(
        self,
        parts: list[Part],
        say: Callable[[Trainer, str], None],
        *,
        sample: Any,
        forward: Callable[..., Any] | None,
        reading: Reading,
    ) -> None:
        self._parts, self._say = parts, say
        self._sample, self._forward, self._reading = sample, forward, reading
        self._unread: dict[int, Tensor] = {}  # id of a part -> the input that its network is expected to read
        self._taken_back: list[Undo] = []  # until the first step
        self._scalings: list[nn.Module] = []  # whose numbers come from a checkpoint

    def anew(self) -> None:
        """Before a fit, validation or test of a module."""
        self._taken_back, self._scalings = [], []

    def settle(self) -> None:
        """After a step: edits stay."""
        self._taken_back = []

    def take_back(self, module: LightningModule) -> None:
        """The module as it came."""
        for undo in self._taken_back:
            undo.back()
        for name in [name for name, _ in module.named_children() if name.startswith(_SCALING)]:
            delattr(module, name)

    def size_scalings(self, state: dict[str, Any]) -> None:
        """Makes room for the numbers of a checkpoint's scalings. state: its state_dict."""
        for scaling_of, name in zip(self._scalings, [k for k in state if k.startswith(_SCALING)][::2], strict=False):
            stem = name.rpartition(".")[0]
            for buffer in ("shift", "scale"):
                setattr(scaling_of, buffer, torch.zeros_like(state[f"{stem}.{buffer}"]))

    def watch_input(self, module: LightningModule) -> list[Any]:
        """Hooks that look, once, whether a scaled network reads the batches' input: before it is scaled."""
        return [
            self.found(part, module).register_forward_pre_hook(partial(self._same_input, part), prepend=True)
            for part in self._parts
            if part.scales
        ]

    def see_input(self, batch: Any) -> None:
        """Before a step: the input that a scaled network is expected to read."""
        waiting = [part for part in self._parts if part.scales and not part.steps]
        if waiting:
            x, _ = self._reading.split(batch)
            self._unread = {id(part): x for part in waiting} if isinstance(x, Tensor) else {}

    def refuse_unread(self, part: Part) -> None:
        """Raises InputError where a step comes and the network was not called, in front of which the scaling is."""
        if id(part) in self._unread and not part.steps:
            path = part.path or "the module"
            raise InputError(
                f"scaling= acts in front of {path}, whose forward training_step does not call: name the network that "
                'reads the input, model="...", or write scaling=none'
            )

    def missing(self, module: LightningModule) -> bool:
        return any(network(module, part.path) is None for part in self._parts)

    def found(self, part: Part, module: LightningModule) -> nn.Module:
        net = network(module, part.path)
        if net is None:
            raise InputError(unknown(module, part.path))
        if part.path is None:
            part.path = next(name for name, child in module.named_children() if child is net)
        return net

    def edit(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """The model slots, once in a module's life, and its scaling."""
        for part in self._parts:
            net = self.found(part, module)
            before = vars(net).get("_knep")
            if before is not None and before["slots"] != part.model_slots:
                raise InputError(
                    f"{part.path or 'the network'} was edited in an earlier fit by another recipe ({before['slots']}): "
                    "make the module anew, or choose the same options"
                )
            if before is None:
                self._materialise(part, net, trainer, stage)
                self._taken_back.append(Undo(net))
                twins = _frozen_copies(module, net) if stage == "fit" else {}
                how: dict[str, Any] = {} if self._forward is None else {"forward": self._forward}
                with named((part.path if len(self._parts) > 1 else None) or "model"):
                    self._scale(part, net, trainer, module, stage)
                    report = part.recipe.apply(net, self._inputs_of_sample(net, trainer, stage), **how)
                _refuse_parting(twins, report)
                if part.scales or any(report.changes.values()):
                    vars(net)["_knep"] = {"slots": part.model_slots, "report": report}
                part.report = report
                said = ", ".join(
                    f"{slot} {len(edits_of(changes))}" for slot, changes in report.changes.items() if edits_of(changes)
                )
                if said and stage == "fit":
                    self._say(trainer, f"edits {part.path or 'the network'}, so many layers or weights each: {said}")
            else:
                part.report = before["report"]
            if stage == "fit" and part.tunes:
                self._tune(part, net, trainer)

    def _materialise(self, part: Part, net: nn.Module, trainer: Trainer, stage: str) -> None:
        """Runs a network with lazy layers once, which take their sizes from what they get."""
        if not _lazy(net):
            return
        sample = self._inputs_of_sample(net, trainer, stage)
        if sample is not None and _lazy(net):
            with torch.random.fork_rng([]), named(part.path or "model"):
                inputs = as_inputs(net, sample, self._forward)
                assert inputs is not None
                probe(net, inputs)
        if _lazy(net):
            raise InputError(
                f"{part.path or 'the network'}.{_lazy(net)} is of a lazy layer, whose size nobody knows yet: give a "
                "batch, knep.callbacks(..., sample=x), or call the network once before"
            )

    def _tune(self, part: Part, net: nn.Module, trainer: Trainer) -> None:
        kind = type(trainer.strategy).__name__
        if "FSDP" in kind or "DeepSpeed" in kind:
            raise InputError(f"finetune= thaws whole weights, which {kind} has in shards: load finetune=none")
        how: dict[str, Any] = {} if self._forward is None else {"forward": self._forward}
        part.tuning = part.recipe.tuning(net, None, self._inputs_of_sample(net, trainer, "fit"), **how)
        assert part.tuning is not None
        part.tuning.shared = trainer.world_size > 1
        part.tuning.refuse_short(trainer.max_epochs)
        self._say(trainer, part.tuning.said())

    def _inputs_of_sample(self, net: nn.Module, trainer: Trainer | None = None, stage: str = "") -> Any:
        """The sample, or of a batch of the loader what the network reads."""
        sample = self._sample
        if sample is None and trainer is not None and stage == "fit" and self._forward is None:
            return self._first_inputs(net, trainer)
        for reading in (self._reading, Reading()):  # a pair of its own, where batches have names
            if self._forward is None and not isinstance(sample, Tensor) and is_batch(sample, reading):
                return sample if inputs_wanted(net) > 1 else reading.split(sample)[0]
        return sample

    def _first_inputs(self, net: nn.Module, trainer: Trainer) -> Tensor | None:
        """Of the first training batch, where the network runs on them: for tricks that look at data, and for leaks."""
        try:
            x = next(self._inputs(trainer), None)
        except InputError:
            return None
        modes = {m: m.training for m in net.modules()}
        try:
            with torch.no_grad(), torch.random.fork_rng([]):
                like = next(net.parameters(), None)
                net.eval()(x if like is None or x is None else x.to(like.device))
        except Exception:  # a stranger's network, which is called with something else
            return None
        finally:
            for m, mode in modes.items():
                m.training = mode
        return x

    def _scale(self, part: Part, net: nn.Module, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Puts the scaling before the network: a submodule of `module`, so that its numbers are saved."""
        if not part.scales:
            return
        if stage == "fit":
            refuse_scaled(part.recipe, next(self._inputs(trainer), None))
        made = part.recipe.scaling(self._inputs(trainer) if stage == "fit" else iter([torch.zeros(1, 1, 1, 1)]))
        if stage != "fit":
            self._scalings.append(made)
        module.add_module(_SCALING if part is self._parts[0] else f"{_SCALING}_{part.path}", made)
        net.register_forward_pre_hook(partial(scale_input, made))

    def _inputs(self, trainer: Trainer) -> Any:
        """Inputs of the first training batches; no random number of the run is used up."""
        trainer.fit_loop.setup_data()
        with torch.random.fork_rng([]):
            for index, batch in enumerate(again(trainer)):
                if index >= _SCALED_ON:
                    break
                x, _ = self._reading.split(batch)
                if not isinstance(x, Tensor):
                    raise InputError(
                        f"scaling= reads tensors, and the input is a {type(x).__name__}: write scaling=none"
                    )
                yield x

    def _same_input(self, part: Part, net: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Once: whether the network reads the batch's input itself, on which the scaling was fitted."""
        x = self._unread.pop(id(part), None)
        if x is None:
            return
        if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].shape[1:] != x.shape[1:]:
            got = tuple(inputs[0].shape) if inputs and isinstance(inputs[0], Tensor) else "none"
            raise InputError(
                f"scaling= was fitted on the batches' input {tuple(x.shape)}, and {part.path or 'the network'} reads "
                f"{got}: write scaling=none"
            )


def _lazy(net: nn.Module) -> str | None:
    """The first parameter without a size."""
    return next((name for name, p in net.named_parameters() if is_lazy(p)), None)


def _frozen_copies(module: LightningModule, net: nn.Module) -> dict[str, str]:
    """Path in `net` of a network that is trained -> the frozen child of the module that is equal to it, a teacher."""
    children = dict(module.named_children())
    frozen = {name: child for name, child in children.items() if _all(child, trained=False)}
    trained = {f"{name}.": child for name, child in children.items() if _all(child)} if net is module else {"": net}
    pairs = ((path, name) for path, one in trained.items() for name, twin in frozen.items() if _equal(one, twin))
    return dict(pairs)


def _all(net: nn.Module, *, trained: bool = True) -> bool:
    return {p.requires_grad for p in net.parameters()} == {trained}


def _equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def _refuse_parting(twins: dict[str, str], report: Report) -> None:
    """Raises InputError for edits of a network of which a copy, made before, would not have them."""
    for path, name in twins.items():
        slots = [
            slot
            for slot in ("norm", "activation", "init")
            if any(change.path.startswith(path) for change in edits_of(report.changes.get(slot, [])))
        ]
        if slots:
            raise InputError(
                f"{name} is a frozen copy of the network that {' and '.join(slots)} edit, and would not be edited: "
                f"make self.{name} in configure_model, which runs behind the edits, or write "
                f"{' '.join(f'{slot}=none' for slot in slots)}"
            )
