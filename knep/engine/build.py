"""Building one model and fitting it: the part of a run that Lightning does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from knep.config.budget import check_room, layers_counted
from knep.config.instantiate import instantiate
from knep.config.schema import TASK, DataSpec, RunConfig
from knep.data.base import KINDS, Images
from knep.engine.any_module.part import refuse_scaled
from knep.engine.module import Classifier
from knep.engine.starting_weights import load_into, scale_as
from knep.errors import InputError, named
from knep.models.pretrained import read
from knep.nn.recompute import recompute_blocks
from knep.recipes.augment.stages import sizes_of
from knep.recipes.init import builds
from knep.recipes.loss import bound, wants_counts
from knep.recipes.recipe import Recipe
from knep.surgery.record import mode
from knep.tasks.base import Common
from knep.tasks.binary import Binary, Multilabel
from knep.tasks.classification import Classification
from knep.tasks.regression import Regression
from knep.tasks.segmentation import Segmentation
from knep.tasks.tokens import NextToken, Tagging

TASKS: dict[str, type[Common]] = {
    task.name: task for task in (Classification, Binary, Multilabel, Regression, Segmentation, NextToken, Tagging)
}
_WIDTHS = ("num_classes", "num_labels", "num_targets", "vocabulary")
_LEARNS = {"multiclass": "class", "binary": "class", "multilabel": "label", "regression": "number"}
_LEARNS |= {"segmentation": "mask", "tokens": "token", "tagging": "token"}
# What a project's loaders may mean by another dtype or shape.
_CAST = {
    ("class", "number"): ", or give y.long() of shape (N,) where the numbers name classes",
    ("class", "token"): ", or give y[:, 0] where each row has one class in a column",
    ("label", "number"): ", or give y.bool() where they are 0 and 1 for labels",
    ("label", "token"): ", or give y.bool() where they are 0 and 1 for labels",
    ("number", "class"): ", or give y.float() where they are numbers to predict",
    ("number", "token"): ", or give y.float() where they are numbers to predict",
}
_UNLABELLED = 255  # of a mask


def build_module(
    run: RunConfig,
    spec: DataSpec,
    data: Images | None = None,
    initialise: bool = True,
    seed: int = 0,
    kept: Mapping[str, Any] | None = None,
) -> Classifier:
    """The Classifier that a run describes: scaling fitted on `data`, model built, recipe applied, weights loaded.

    spec: of the data, which a checkpoint is rebuilt without; initialise: False leaves out the scaling's statistics and,
    but where it puts something into the model, `init`, for weights that come from a checkpoint. kept: what
    that says of the weights that its run began with, `Loaded.plain`, which need not be there any more.
    """
    recipe = Recipe.from_config(run.plain)
    task = build_task(run, spec, recipe, data)
    if not initialise and not builds(run.slots["init"]["_target_"]):
        recipe.model_slots = {k: v for k, v in recipe.model_slots.items() if k != "init"}
    torch.manual_seed(seed)
    blank = torch.zeros(1, *spec.row, dtype=getattr(torch, spec.dtype))
    images = data.train_images() if data is not None else [blank]
    scaling = nn.Identity() if spec.words else recipe.scaling(images)
    source = read(run.weights, run.model) if run.weights is not None and initialise and kept is None else None
    said = scale_as(source, scaling, recipe, spec) if source is not None else []
    size = run.size(spec)
    with named("model"):
        check_model(run.model, size, members=run.members if data is not None else 1)
        model = instantiate(run.model)(**size)
    raw = data.sample(64) if data is not None else blank
    refuse_scaled(recipe, raw if data is not None else None)
    report = recipe.apply(model, sample=scaling(raw))
    if source is not None:
        loaded, lines = load_into(model, source, run, report, scaling(raw))
        kept, said = loaded.plain(), [*lines, *said]
    tuning = recipe.tuning(model, (kept or {}).get("new"), scaling(raw))
    if tuning is not None and data is not None:
        tuning.refuse_short(run.trainer.max_epochs)
        said.append(tuning.said())
    if data is not None and len(spec.row) == 3:
        _refuse_sizes(model, sizes_of(recipe.augment, spec.row[-1]), scaling, raw)
    if run.checkpointing:
        with named("model"):
            said.append(f"activations of {len(recompute_blocks(model))} blocks are computed again in backward")
    images_last = run.runtime.channels_last and len(spec.row) == 3
    if images_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    module = Classifier(
        model,
        recipe,
        task=task,
        scaling=scaling,
        seed=seed,
        log_every=run.runtime.log_every,
        channels_last=images_last,
        about={**run.facts(spec), **({"weights": dict(kept)} if kept is not None else {})},
        guard=instantiate(run.guard) if run.guard is not None else None,
        tuning=tuning,
        said=said,
    )
    module.report = report
    return module


def _refuse_sizes(model: nn.Module, sizes: list[int], scaling: nn.Module, raw: Tensor) -> None:
    """Raises InputError where the model cannot read training images of the sizes that augment gives them."""
    for side in sizes:
        image = scaling(raw[:1, :, :1, :1].expand(2, -1, side, side))
        try:
            with torch.no_grad(), mode(model, False):
                model(image)
        except (RuntimeError, ValueError, AssertionError) as error:
            text = " ".join(str(error).split())[:120]
            raise InputError(
                f"augment= makes training images of {side} pixels, which this model cannot read ({text}): write "
                "augment=none, or a model of any size such as model=resnet"
            ) from error


def spec_of(run: RunConfig, data: Images) -> DataSpec:
    """What a run's model and loss have to know of prepared data. Raises InputError where the task learns others."""
    spec = DataSpec.of(data)
    check_kind(run, spec)
    if wants_counts(instantiate(run.loss) if run.loss is not None else None):
        counts = class_counts(data.train_targets(), run.task_name, spec.num_classes)
        spec = replace(spec, counts=tuple(counts.tolist()))
    return spec


def check_kind(run: RunConfig, spec: DataSpec) -> None:
    """Raises InputError, with the task to write, where targets are of another kind than the task learns."""
    name, kind = run.task_name, _LEARNS.get(run.task_name)
    if kind is not None and kind != spec.target:
        other = next(task for task, wanted in _LEARNS.items() if wanted == spec.target)
        cure = _CAST.get((kind, spec.target), "")
        if (kind, spec.target) == ("class", "number") and spec.num_classes > 1:
            cure = ", or give y.argmax(1) where each row has a 1 for its class"
        raise InputError(
            f"task={name} learns {KINDS[kind]}, and the data have {KINDS[spec.target]}: write task={other}{cure}"
        )
    if name == "binary" and spec.num_classes != 2:
        raise InputError(
            f"task=binary tells two classes apart, and the data have {spec.num_classes}: write task=multiclass"
        )


def build_task(run: RunConfig, spec: DataSpec, recipe: Recipe, data: Images | None = None) -> Common:
    """The task of a run, with its loss; a regression's mean and deviation are fitted on `data`, where there is some."""
    counts = None if spec.counts is None else torch.tensor(spec.counts, dtype=torch.float64)
    with named("task"):
        builder = instantiate(run.task or TASK)
        takes = signature(builder).parameters
        offered: dict[str, Any] = dict.fromkeys(_WIDTHS, spec.num_classes)
        offered |= {"loss": bound(recipe.loss, counts), "metrics": run.metrics}
        offered["smoothing"] = recipe.regularization.label_smoothing
        task = builder(**{key: value for key, value in offered.items() if key in takes})
        if isinstance(task, Regression) and data is not None and not task.fitted:
            task.fit(data.train_targets())
    return task


def class_counts(targets: Iterable[Tensor], task: str, classes: int) -> Tensor:
    """How often each class is there, float64 (K,); of labels and of yes and no (2, K) or (2,), without and with.

    targets: of the training split, in batches; negative ones are left out, and 255 of masks.
    """
    labels = task in ("binary", "multilabel")
    counts = torch.zeros(2, classes if task == "multilabel" else 1) if labels else torch.zeros(classes)
    counts = counts.double()
    for batch in targets:
        y = batch.detach().cpu()
        if labels:
            y = y.reshape(len(y), -1).double()
            counts[1] += y.sum(0)
            counts[0] += len(y) - y.sum(0)
        else:
            known = y[(y >= 0) & ((y != _UNLABELLED) if task == "segmentation" else (y == y))]
            counts += torch.bincount(known.flatten().long(), minlength=classes)[:classes]
    return counts.squeeze(1) if task == "binary" else counts


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Runs with `count` CPU threads; None leaves torch's choice."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


_LARGEST = 10**7  # width or number of layers


def check_model(node: Mapping[str, Any], shape: Mapping[str, int], most: int | None = None, members: int = 1) -> None:
    """Counts the parameters of one of knep's own models without memory for them, on torch's meta device.

    shape: in_channels, num_classes and image_size; most: how many there may be, None for what the machine can train;
    members: models of this kind that are trained at once.
    Raises InputError for a model that is too large. Models of other projects are as large as their builders make them.
    """
    target = str(node["_target_"])
    if not target.startswith("knep.models.") or "imported" in target:
        return
    for key, value in node.items():
        if isinstance(value, int) and value > _LARGEST:
            raise InputError(f"model.{key}={value} is no size of a layer: write at most {_LARGEST:,}")
    try:
        with torch.device("meta"), layers_counted("the model"):
            count = sum(p.numel() for p in instantiate(node)(**shape).parameters())
    except RuntimeError as error:  # a size that overflows
        raise InputError(f"a layer is too large ({str(error).splitlines()[0][:80]}): write smaller numbers") from error
    except TypeError as error:  # a keyword that it lacks, or a value of another kind
        raise InputError(f"{target} cannot be built ({str(error)[:120]}): change the values of model") from error
    if most is not None and count > most:
        raise InputError(f"its config builds {count:,} parameters, and it holds {most:,}")
    check_room(8 * count * members, "the model's weights and gradients need", "write smaller widths")
