"""The doctor: says why a network does not learn, prescribes overrides, and proves the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning.pytorch import Callback
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from knep.doctor.findings import Finding, Report
    from knep.doctor.live.watch import Watch


def examine(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    loss: Callable[..., Tensor] | None = None,
    task: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    num_classes: int | None = None,
    epochs: int | None = None,
    clip: Callable[[Iterable[Tensor]], Tensor] | None = None,
    seed: int = 0,
) -> Report:
    """Why `model` does not learn from the batches of `train` with `optimizer`; nothing is changed.

    train, val: batches as the loop gets them: (x, y), (x, y, weight), dicts, or anything with `forward`; val: None
    holds back every tenth batch; optimizer: over the model's parameters, or what makes one of a model; loss: f(output,
    target), which sees what the loader gave, None for the task's own; task: multiclass, binary, multilabel,
    regression, segmentation, tokens, tagging or other, None to tell it by output and target; forward: f(model, batch)
    -> output; epochs: of the run, 10 where nobody says; num_classes, clip: of classes for inputs one by one.
    Raises InputError for what fails on its own data.
    """
    from knep.doctor.examine_any import examine_any
    from knep.doctor.subject.gather import subject_of

    subject = subject_of(
        model, train, val, optimizer=optimizer, loss=loss, task=task, forward=forward, epochs=epochs, seed=seed
    )
    return examine_any(subject, num_classes=num_classes, clip=clip)


def callback(*, on_finding: str = "warn", every: int = 200) -> Callback:
    """For `Trainer(callbacks=knep.doctor.callback())`, beside any LightningModule: what is wrong, and since which step.

    on_finding: warn says it, once for each disease; stop ends the fit; cure changes what can be changed while it goes
    on (rate, momentum, decay, clipping); every: optimizer steps between looks, the first ones are closer. What cannot
    be watched is said in one line; no number of the training changes but by a cure. Its `findings` are plain data.
    """
    from knep.doctor.live.any_module import ModuleDoctor

    return ModuleDoctor(on_finding=on_finding, every=every)


def watch(
    model: nn.Module, optimizer: Optimizer, *, every: int = 10, on_finding: str | Callable[[Finding], None] = "warn"
) -> Watch:
    """Watches a loop of one's own: `with watch(model, optimizer) as d: ... optimizer.step(); d.step(loss)`.

    every: steps from one look to the next; the first looks are closer, and those of a long run up to ten times as far.
    on_finding: "warn" warns once for each disease, with the step at which it began; "none" keeps findings for
    `d.report()`; or a function that is given each Finding. The model, its gradients and the numbers of the training
    stay as they are. Raises InputError for what cannot be watched.
    """
    # Imported here, so that `import knep` costs nothing.
    from knep.doctor.live.watch import Watch

    return Watch(model, optimizer, every=every, on_finding=on_finding)
