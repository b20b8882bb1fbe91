"""The LightningModule for who has a network, loaders and Lightning's own Trainer, and for any task."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from knep.config.conflicts import FITS
from knep.engine.any_module.best import Best
from knep.engine.any_module.callbacks import hush_tips
from knep.engine.any_module.foreign import refuse_doubles
from knep.engine.any_module.monitors import Monitors
from knep.engine.any_module.part import refuse_scaled
from knep.engine.build import TASKS, class_counts
from knep.engine.loops.accumulation import accumulate
from knep.engine.module import Classifier
from knep.errors import InputError
from knep.guard.policy import Guard
from knep.recipes import scheduler
from knep.recipes.loss import bound, wants_counts
from knep.recipes.scaling import none as raw_pixels
from knep.tasks.base import Batch, Keys, Loss, Split, Task
from knep.tasks.classification import Classification
from knep.tasks.metrics import Asked
from knep.tasks.regression import Regression

if TYPE_CHECKING:
    from knep.recipes.recipe import Recipe

_WITHOUT_WIDTH = {"binary": 1, "regression": 1}


class LitModule(Classifier):
    """Trains a network of yours by a recipe, in Lightning's own Trainer:

        module = knep.LitModule(net, knep.load("modern"), "regression", images=train_loader)
        L.Trainer(max_epochs=10).fit(module, train_loader, val_loader)

    The recipe's edits of the network (norm, activation, dropout, init) are made here, in place; its augmentation,
    scaling, clipping, optimizer and schedule act in the module, its averaging and stopping by callbacks that the module
    brings with it. Batches are (x, y), (x, y, weight of each row), or dicts; see `batch`.

    task: "multiclass", "binary", "multilabel", "regression", "segmentation", "tokens" or "tagging", or an object such
    as `knep.tasks.segmentation.Segmentation(21, ignore_index=0)`.
    num_classes: classes, labels, different tokens or tags, or numbers to predict in a row, as many as the model gives;
    binary and regression take 1 without it.
    sample: a batch of inputs, for edits that look at the data; without it the first of `images`.
    images: training batches as the loader gives them, or x alone, on which the recipe's scaling, the mean and deviation
    of a regression's targets and the counts of classes are fitted; without them batches must come scaled.
    apply: False leaves the network as it is. loss: of `knep.recipes.loss`, in place of the recipe's; metrics: of
    torchmetrics by name, beside the task's own; batch: two keys of a dict, or a function from a batch to (x, y).
    seed, log_every, guard: as for `knep.engine.module.Classifier`.
    Raises InputError for a task that is none, or that needs num_classes; NoEffectError as `recipe.apply` does.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        task: Task | str = "multiclass",
        *,
        num_classes: int | None = None,
        sample: Tensor | None = None,
        images: Iterable[Any] | None = None,
        apply: bool = True,
        loss: Loss | None = None,
        metrics: Asked = (),
        batch: Keys = None,
        seed: int = 0,
        log_every: int = 10,
        guard: Guard | None = None,
    ) -> None:
        made: Any = task
        wanted = recipe.loss if loss is None else loss
        if isinstance(task, str):
            width = _width(task, num_classes)
            counts = None
            if wants_counts(wanted) and images is not None:
                counts = class_counts((y for _, y in _pairs(images, batch)), task, width)
            given = {"loss": bound(wanted, counts), "metrics": metrics, "batch": batch}
            smoothing = recipe.regularization.label_smoothing
            given |= {"smoothing": smoothing} if task != "regression" else {}
            if smoothing and task == "regression":
                raise InputError("label_smoothing is for classes: load the recipe with regularization=none")
            name = getattr(getattr(wanted, "func", wanted), "__name__", "")
            if name in FITS and task not in FITS[name]:
                raise InputError(f"loss={name} cannot read the targets of task={task}: write loss=auto")
            made = TASKS[task](**given) if task == "binary" else TASKS[task](width, **given)  # type: ignore[call-arg]
        elif num_classes is not None or loss is not None or metrics or batch is not None:
            raise InputError("num_classes, loss, metrics and batch are the task object's: give them where it is made")
        scaling = self._scaling(recipe, images, getattr(made, "keys", None))
        if isinstance(made, Regression) and not made.fitted:
            if images is None:
                warnings.warn(
                    "the targets are learned in their own unit, which slows training where it is far from 1: give "
                    "images=<training batches> to standardise them",
                    stacklevel=2,
                )
            else:
                made.fit(y for _, y in _pairs(images, made.keys))
        if apply:
            if sample is None and images is not None:
                sample = next(iter(_inputs(images, getattr(made, "keys", None))))
            with torch.no_grad():
                recipe.apply(model, sample=sample if sample is None or scaling is None else scaling(sample))
        tuning = recipe.tuning(model, None, sample if sample is None or scaling is None else scaling(sample))
        how: dict[str, Any] = {"scaling": scaling, "seed": seed, "log_every": log_every, "guard": guard}
        super().__init__(model, recipe, task=made, tuning=tuning, **how)

    @staticmethod
    def _scaling(recipe: Recipe, images: Iterable[Any] | None, keys: Keys) -> nn.Module | None:
        if images is None:
            if getattr(recipe.make_scaling, "func", None) is not raw_pixels:
                warnings.warn(
                    "the recipe's scaling is left to your loader: give images=<raw training batches> to fit it here",
                    stacklevel=3,
                )
            return None
        first = next(iter(_inputs(images, keys)), None)
        if first is None:
            raise InputError("images has no batch: give the training loader, or a list of batches")
        refuse_scaled(recipe, first)
        return recipe.scaling(_inputs(images, keys))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """A batch of any kind as (x, target), for every loop."""
        return Split(*self.task.split(batch))

    def configure_callbacks(self) -> list[Callback]:
        """The recipe's averaging and stopping; of each fit its own."""
        hush_tips()
        recipe = self.recipe
        if recipe.members > 1:
            raise InputError(
                f"averaging=ensemble trains {recipe.members} models, and a module is one: load the recipe with "
                "averaging=none and fit a module per seed"
            )
        parts = [recipe.averaging, recipe.stopping]
        found: list[Callback] = [p for p in copy.deepcopy(parts) if type(p) is not Callback]
        monitor = recipe.watched.get("stopping")
        if monitor is not None:
            found.append(Best(monitor, getattr(recipe.stopping, "mode", "min")))
        return [Monitors(recipe.watched, found), *found]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            accumulate(self.trainer, self.recipe.accumulate)
            schedule = getattr(self.recipe.make_scheduler, "func", self.recipe.make_scheduler)
            refuse_doubles(self.trainer, self.recipe.averaging, schedule is not scheduler.none)
            if self.tuning is not None:
                self.tuning.refuse_short(self.trainer.max_epochs)
            if self.trainer.gradient_clip_val and self.step.clips:
                raise InputError(
                    f"Trainer(gradient_clip_val={self.trainer.gradient_clip_val}) and the recipe's clip would both "
                    "clip: leave one out, gradient_clip_val or, with clip=none, the recipe's"
                )


def _width(task: str, num_classes: int | None) -> int:
    if task not in TASKS:
        raise InputError(f"there is no task {task}: write one of {', '.join(TASKS)}")
    width = _WITHOUT_WIDTH.get(task) if num_classes is None else num_classes
    if width is None:
        raise InputError(f'task="{task}" needs num_classes, how many numbers the model gives: write num_classes=10')
    if isinstance(width, bool) or not isinstance(width, int) or width < 1 or (task == "binary" and width != 1):
        least = "1, the one score of yes" if task == "binary" else "a whole number, at least 1"
        raise InputError(f"num_classes={num_classes} must be {least}, for task={task}")
    return width


def _pairs(images: Iterable[Any], keys: Keys) -> Iterator[tuple[Tensor, Tensor]]:
    """x and y of batches; raises InputError where there are inputs alone."""
    reader: Callable[[Any], Any] = Classification(1, batch=keys).split
    for batch in images:
        if isinstance(batch, Tensor):
            raise InputError("images has inputs alone, and the task looks at targets: give batches (x, y)")
        x, y = reader(batch)
        yield x, getattr(y, "target", y)


def _inputs(images: Iterable[Any], keys: Keys) -> Iterator[Tensor]:
    for batch in images:
        if isinstance(batch, Tensor):
            yield batch
        elif isinstance(batch, (tuple, list)) and len(batch) == 1:
            yield batch[0]
        else:
            yield Classification(1, batch=keys).split(batch)[0]
