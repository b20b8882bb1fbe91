"""The patient: a model with its data and its way of training, as an examination sees it. It is never changed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.config.schema import DataSpec, Node, RunConfig
from knep.data.base import Images
from knep.doctor.subject.batches import Batch, Form, Labelled, NoClasses, gathered, held_back, reshuffles
from knep.doctor.subject.copies import copied, unwrapped
from knep.doctor.subject.rng_isolation import undisturbed
from knep.errors import InputError, named
from knep.recipes import augment as augments
from knep.recipes import clip as clips
from knep.recipes import sampling as samplings
from knep.recipes.regularization import Regularizer
from knep.utils.batch_plan import plan_of

_MOST_BATCHES = 600


@dataclass(frozen=True)
class Patient:
    """A remedy makes another patient of it with `dataclasses.replace`; the parts themselves are never edited.

    model: scaled images (N, C, H, W) to scores (N, num_classes); train, val: raw batches (x, y), in the order in which
    the run sees them; shuffled: whether its order changes from epoch to epoch; images: of the whole training split;
    batches: steps of an epoch of the run; epochs: of the run; make_optimizer: from a copy of the model;
    make_scheduler: f(optimizer, total_steps=, steps_per_epoch=) or None; interval: "step" or "epoch", when it is
    stepped; loss: f(scores, labels), None where it is cross-entropy; form: of the labels that it is given; precision:
    as Lightning names it; stopping, min_delta, monitor: of early stopping, its patience in epochs, None without;
    overrides: the lines that made it, run: what they say; empty and None for a patient that was not made by a config.
    """

    model: nn.Module
    train: Sequence[Batch]
    val: Sequence[Batch]
    num_classes: int
    make_optimizer: Callable[[nn.Module], Optimizer]
    scaling: nn.Module = field(default_factory=nn.Identity)
    augment: Any = field(default_factory=augments.none)
    clip: Callable[[Iterable[Tensor]], Tensor] = clips.none
    make_scheduler: Callable[..., Any] | None = None
    interval: str = "step"
    regularization: Regularizer = field(default_factory=Regularizer)
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    form: Form = field(default_factory=Form)
    accumulate: int = 1
    precision: str = "32-true"
    images: int = 0
    batches: int = 0
    epochs: int = 1
    shuffled: bool = True
    stopping: int | None = None
    min_delta: float = 0.0
    monitor: str = "val/loss"
    seed: int = 0
    overrides: tuple[str, ...] = ()
    run: RunConfig | None = None

    def option(self, group: str) -> Node:
        """What the run's lines chose in a group; nothing for a patient of somebody else's."""
        return (self.run.plain.get(group) if self.run is not None else None) or {}

    @property
    def of_classes(self) -> bool:
        """Whether the outputs are scores of classes."""
        return True

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the real run."""
        return max(1, self.epochs * self.batches // self.accumulate)

    @property
    def device(self) -> torch.device:
        like = next(self.model.parameters(), None)
        return torch.device("cpu") if like is None else like.device

    def criterion(self, scores: Tensor, y: Tensor) -> Tensor:
        """The loss that the run minimises, without its penalty; y: int64 (N,) or, after mixing, (N, K).

        It sees labels as the loader gives them. Raises InputError where a loss of another project fails, or
        cross-entropy on labels that are no int64 (N,).
        """
        plain = partial(F.cross_entropy, label_smoothing=self.regularization.label_smoothing)
        if self.loss is None and self.form == Form():
            return plain(scores, y)
        name, loss = ("cross-entropy", plain) if self.loss is None else ("the loss", self.loss)
        labels = self.form.of(y) if y.ndim == 1 else y
        try:
            value = loss(scores, labels)
        except Exception as error:  # it may raise anything
            text = " ".join(str(error).split())
            got = f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} of {labels.dtype}"
            raise InputError(f"{name} fails on {got}: {type(error).__name__}: {text}") from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name} gives {got}, not a tensor of one number: take its mean")
        return value

    def inputs(self, x: Tensor) -> Tensor:
        """What the model sees of raw images x (N, C, H, W)."""
        return self.scaling(x.to(self.device))

    def stacked(self, split: str = "train", most: int = 2048) -> Batch:
        """The first images (N, C, H, W) of a split and their labels, raw."""
        batches = self.train if split == "train" else self.val
        if not batches:
            raise InputError(f"there are no {split} batches")
        x = torch.cat([b[0] for b in itertools.islice(batches, most)])[:most]
        return x, torch.cat([b[1] for b in itertools.islice(batches, most)])[:most]


def prepared(run: RunConfig, sampling: Any) -> Images:
    from knep.config.instantiate import instantiate
    from knep.data.base import refuse_loaders

    with named("data"):
        data = instantiate(run.data)
        refuse_loaders(data)
        data.sampling = sampling
        data.prepare()
    return data


def refuse_other_tasks(run: RunConfig) -> None:
    """Raises InputError for a run that is not about one class of several, before anything of it is read."""
    if run.task_name != "multiclass":
        raise InputError(
            f"task={run.task_name}: the doctor examines one class of several for each input: write task=multiclass, or "
            "train without it, knep train with the same lines"
        )
    node = run.loss or {}
    loss = str(node.get("_target_", "auto")).rpartition(".")[2]
    if loss not in ("auto", "cross_entropy") or node.get("class_weight") is not None:
        said = f"loss.class_weight={node['class_weight']}" if node.get("class_weight") is not None else f"loss={loss}"
        raise InputError(f"{said}: the doctor examines runs on plain cross-entropy: write loss=auto")


def from_config(run: RunConfig, overrides: Sequence[str] = (), data: Images | None = None) -> Patient:
    """The patient that a composed config of knep describes, on its own data or others (see `user_loaders`).

    Raises InputError as training does, and as `refuse_other_tasks`.
    """
    refuse_other_tasks(run)
    from knep.config.instantiate import instantiate
    from knep.engine.build import build_module
    from knep.engine.precision import lost_in_bf16, precision, wrong_in_bf16

    strategy = str(run.finetune["_target_"]).rpartition(".")[2]
    if strategy != "none":
        raise InputError(
            f"finetune={strategy} freezes layers, which the doctor takes for dead ones: write finetune=none"
        )
    sampling = instantiate(run.sampling) if run.sampling is not None else None
    if data is None:
        data = prepared(run, sampling)
    elif getattr(sampling, "func", sampling) not in (None, samplings.none):
        raise InputError(
            "sampling draws rows of knep's own data, and --data gives loaders of yours: write sampling=none"
        )
    spec = DataSpec.of(data)
    module = build_module(run, spec, data, seed=run.seed)
    recipe = module.recipe
    data.seed = run.seed
    loader = data.train_dataloader()
    batches = data.train_batches
    accumulate = batches if recipe.accumulate == "epoch" else plan_of(recipe.accumulate)[0]
    wrong = wrong_in_bf16(module.model, module.scaling(data.sample(2)))
    digits = lost_in_bf16(run.task_name, spec)
    return Patient(
        model=module.model,
        train=gathered(loader, most=_MOST_BATCHES).batches,
        val=gathered(data.val_dataloader(), most=8, padded=True).batches,
        num_classes=data.num_classes,
        make_optimizer=recipe.optimizer,
        form=getattr(data, "form", Form()),
        scaling=module.scaling,
        augment=module.augment,
        clip=recipe.clip,
        make_scheduler=recipe.scheduler,
        interval=recipe.schedule_at["interval"],
        regularization=recipe.regularization,
        accumulate=accumulate,
        precision=str(precision(run.trainer.precision, run.trainer.accelerator, wrong, digits)),
        images=data.sizes["train"],
        batches=batches,
        shuffled=getattr(data, "shuffled", True),
        epochs=run.trainer.max_epochs or 1,
        stopping=run.slots["stopping"].get("patience"),
        min_delta=run.slots["stopping"].get("min_delta") or 0.0,
        monitor=run.slots["stopping"].get("monitor", "val/loss"),
        seed=run.seed,
        overrides=tuple(overrides),
        run=run,
    )


def of(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    num_classes: int | None = None,
    epochs: int = 10,
    clip: Callable[[Iterable[Tensor]], Tensor] = clips.none,
    seed: int = 0,
) -> Patient:
    """A patient of somebody else's project.

    train, val: batches (x, y) as the loop gets them; val: None holds back every tenth training batch; optimizer: over
    the model's parameters, or what makes one of a model; loss: f(scores, y), None for cross-entropy.
    Raises InputError for batches that are no (x, y), none at all, or a model that fails on them.
    """
    model = unwrapped(model)
    own = copied(model)
    with undisturbed(seed, train, val):
        seen, held, form = _read(own, train, val)
        shuffled = reshuffles(train, seen) if seen else False
    if not seen:
        raise InputError("the training loader gives no batch: check its data set and drop_last")
    kept, held = (seen, held) if val is not None else held_back(seen)
    if num_classes is None:
        from knep.surgery.check_forward import probe

        scores = probe(own, kept[0][0])
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"the model gives {got}, not scores (N, K): the doctor examines classifiers of images")
        num_classes = scores.shape[1]
    if num_classes == 1:
        raise InputError("the model gives one score: let it give one for each of two classes, with cross_entropy; a "
                         "regression is not examined")  # fmt: skip
    if next(own.parameters(), None) is None:
        raise InputError("the model has no parameters: there is nothing to train")
    batches = _length(train) or len(kept)
    return Patient(
        model=own,
        train=kept,
        val=held,
        num_classes=num_classes,
        make_optimizer=maker(model, optimizer),
        loss=None if _plain(loss) else loss,
        form=form,
        clip=clip,
        images=sum(len(y) for _, y in kept),
        batches=batches,
        epochs=epochs,
        shuffled=shuffled,
        seed=seed,
    )


def _read(model: nn.Module, train: Iterable[Any], val: Iterable[Any] | None) -> tuple[list[Batch], list[Batch], Form]:
    """Training and validation batches, none of the latter for None, and the form of their labels."""
    try:
        seen = gathered(train, most=_MOST_BATCHES)
        held = gathered(val, most=64) if val is not None else Labelled([], seen.form)
    except NoClasses as error:
        raise InputError(f"{error}{_beside(model, error)}") from error
    if held.batches and held.form != seen.form:
        raise InputError(f"training and validation give labels in two forms: {seen.form} and {held.form}")
    return seen.batches, held.batches, seen.form


def _beside(model: nn.Module, labels: NoClasses) -> str:
    """The shape of the scores beside labels that name no class, and whether the two would be spread to a table."""
    from knep.surgery.check_forward import probe

    try:
        scores = probe(model, labels.x)
    except InputError:
        return ""
    if not isinstance(scores, Tensor):
        return ""
    n = len(labels.x)
    said = f"; the model gives {(n, *scores.shape[1:])}"
    columns = {scores.ndim, labels.y.ndim} == {1, 2} and 1 in (*scores.shape[1:], *labels.y.shape[1:])
    return f"{said}, which with {tuple(labels.y.shape)} is broadcast to a table of {n} x {n}" if columns else said


def _plain(loss: Any) -> bool:
    """Whether it is the mean cross-entropy of scores and labels, and nothing else."""
    if not isinstance(loss, nn.CrossEntropyLoss):
        return False
    return not loss.label_smoothing and loss.weight is None and loss.reduction == "mean" and loss.ignore_index == -100


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None


def maker(model: nn.Module, optimizer: Any) -> Callable[[nn.Module], Optimizer]:
    """From a copy of `model`, an optimizer like the given one over the copy's parameters, without its state."""
    if not isinstance(optimizer, Optimizer):
        return optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        {k: v for k, v in g.items() if k != "params"} | {"names": [names[id(p)] for p in g["params"] if id(p) in names]}
        for g in optimizer.param_groups
    ]
    kind: Any = type(optimizer)
    defaults, known = dict(optimizer.defaults), set(names.values())

    def make(copied: nn.Module) -> Optimizer:
        own = dict(copied.named_parameters())
        made = [
            {k: v for k, v in g.items() if k != "names"} | {"params": [own[n] for n in g["names"] if n in own]}
            for g in groups
        ]
        # Surgery adds parameters and gives others new names.
        made[0]["params"] += [p for name, p in own.items() if name not in known]
        try:
            return kind(made, lr=defaults["lr"]) if "lr" in defaults else kind(made)
        except TypeError:
            like = copy.deepcopy(optimizer)
            like.state.clear()
            for group, new in zip(like.param_groups, made, strict=True):
                group["params"] = new["params"]
            return like

    return make
