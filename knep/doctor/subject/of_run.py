"""Subjects of any task that knep's own lines describe: their run on its data, or loaders of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from knep.config.schema import RunConfig
from knep.doctor.subject.any_task import Subject, kept
from knep.doctor.subject.rng_isolation import undisturbed
from knep.errors import InputError
from knep.recipes.recipe import Recipe

_MOST = 600  # batches
_LEFT_OUT = ("augment", "clip", "scheduler", "regularization", "finetune")


def plain_classes(run: RunConfig) -> bool:
    """Whether a run is about one class of several with plain cross-entropy, whose examination is another."""
    node = run.loss or {}
    loss = str(node.get("_target_", "auto")).rpartition(".")[2]
    return run.task_name == "multiclass" and loss in ("auto", "cross_entropy") and node.get("class_weight") is None


class _Scaled(nn.Module):
    """A model behind its scaling."""

    def __init__(self, scaling: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.scaling, self.model = scaling, model

    def forward(self, x: Tensor) -> Any:
        return self.model(self.scaling(x))


def of_run(run: RunConfig) -> tuple[Subject, list[str]]:
    """(a run of any task on its own data, notes on what of it the examination leaves out).

    Raises InputError as training does.
    """
    from knep.config.instantiate import instantiate
    from knep.doctor.subject.setup import prepared
    from knep.engine.build import build_module, spec_of

    sampling = instantiate(run.sampling) if run.sampling is not None else None
    data = prepared(run, sampling)
    module = build_module(run, spec_of(run, data), data, seed=run.seed)
    data.seed = run.seed
    task, recipe = module.task, module.recipe
    train, whole = kept(data.train_dataloader(), _MOST)
    held, _ = kept(data.val_dataloader(), 64)
    model = _Scaled(module.scaling, module.model)
    subject = Subject(
        model=model,
        train=[tuple(task.split(batch)) for batch in train],
        val=[tuple(task.split(batch)) for batch in held],
        make_optimizer=lambda m: recipe.optimizer(m.model),  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        loss=lambda output, target: task.loss(output, target),
        run_forward=lambda m, batch: m(batch[0]),
        read=task.answers if run.task_name == "regression" else None,
        asked=run.task_name,
        epochs=run.trainer.max_epochs or 1,
        guessed_length=False,
        steps=len(train),
        whole=whole,
        seed=run.seed,
    )
    return subject, [_left_out(run)] if _left_out(run) else []


def _left_out(run: RunConfig) -> str:
    """What of the run's slots a trial of this examination does without."""
    slots = [s for s in _LEFT_OUT if s in run.slots]
    on = [s for s in slots if not str(run.slots[s].get("_target_", "none")).endswith(".none")]
    return f"the trial leaves out {', '.join(on)}" if on else ""


def of_loaders(run: RunConfig, model: str | None, data: str, loss: str | None, lines: Sequence[str]) -> Subject:
    """A net and loaders of one's own, of batches of any form, with the optimizer that the lines name.

    Raises InputError for paths that lead nowhere, and loaders that fail.
    """
    from knep.doctor.subject.gather import subject_of
    from knep.models.user_model import build, find

    if model is None:
        raise InputError(f"--data {data} with --loss or another task than classes of images needs a net: --model PATH")
    recipe = Recipe.from_config(run.plain)
    with undisturbed(run.seed):
        made = called(find(data, key="--data"), data, "--data")
        net = build(model, {}, key="--model")
    train, val = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not hasattr(train, "__iter__"):
        raise InputError(f"--data: {data}() gave a {type(train).__name__}: return (train_loader, val_loader)")
    typed = {line.partition("=")[0]: line.partition("=")[2] for line in lines}
    return subject_of(
        net,
        train,
        val,
        optimizer=lambda m: recipe.optimizer(m),
        loss=own_loss(loss) if loss else None,
        task=typed.get("task"),
        epochs=int(run.trainer.max_epochs or 1) if "trainer.max_epochs" in typed else None,
        seed=run.seed,
    )


def own_loss(path: str) -> Any:
    """A loss by its path: f(output, target), or a class or function without arguments that makes one."""
    import inspect

    from knep.models.user_model import find

    found = find(path, key="--loss")
    needed = [p for p in inspect.signature(found).parameters.values() if p.kind in (0, 1) and p.default is p.empty]
    return called(found, path, "--loss") if isinstance(found, type) or not needed else found


def called(builder: Any, path: str, key: str) -> Any:
    try:
        return builder()
    except Exception as error:  # a builder of another project may raise anything
        text = " ".join(str(error).split())
        raise InputError(f"{key}: {path}() failed: {type(error).__name__}: {text}") from error
