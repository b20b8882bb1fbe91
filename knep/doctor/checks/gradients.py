"""Passes that are not finite though their inputs are, losses without a graph, and weights that no step changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knep.doctor.checks.probe import functions
from knep.doctor.findings import Finding, diseases, finding, named, share
from knep.doctor.model.gradient_flow import owner
from knep.doctor.subject.any_batch import WEIGHTS, tensors
from knep.doctor.subject.any_task import Subject, scores
from knep.doctor.subject.rng_isolation import undisturbed

_BATCHES = 12
_MEND = {
    "Sqrt": "add a small number inside the root, (u + 1e-8).sqrt()",
    "LinalgVectorNorm": "add a small number inside the norm, or use the squared norm",
    "Norm": "add a small number inside the norm, or use the squared norm",
    "Softmax": "let no row of the mask be empty, or set its answer to 0 behind the softmax",
    "LogSoftmax": "let no row of the mask be empty",
    "Log": "clamp what the logarithm takes, u.clamp(min=1e-8).log()",
    "Div": "add a small number to the divisor; torch.where does not keep its gradient out",
    "Pow": "add a small number to the base",
    "Acos": "clamp what it takes to within 1 - 1e-6",
    "Asin": "clamp what it takes to within 1 - 1e-6",
    "Exp": "clamp what the exponential takes",
    "Atan2": "add a small number to its second argument",
    "CdistForward": "add a small number to the squared distance and take the root of that",
    "Std": "add a small number to the variance and take its root",
}


_NAMED = {
    "sqrt",
    "log",
    "log2",
    "log1p",
    "div",
    "__truediv__",
    "true_divide",
    "softmax",
    "log_softmax",
    "norm",
    "pow",
    "exp",
    "acos",
    "asin",
    "mean",
    "std",
    "var",
    "normalize",
    "scaled_dot_product_attention",
    "matmul",
    "cross_entropy",
    "nll_loss",
    "linear",
    "multi_head_attention_forward",
    "__matmul__",
    "bmm",
    "logsumexp",
    "cosine_similarity",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "mse_loss",
    "sum",
    "mul",
    "sub",
    "add",
    "kl_div",
}


def without_weight(subject: Subject) -> list[Finding]:
    """detached_loss where all rows are weighed by 0: by the batches' weights, or so that loss and slope are 0."""
    read = type(subject.parts(subject.train[0])[1]) is tuple  # the loss reads them itself
    named = [] if read else [_weights_of(batch) for batch in subject.train]
    if named and all(t is not None and t.numel() and not bool(t.count_nonzero()) for t in named):
        text = f"the weights of the rows are 0 in all of {len(named)} batches: no row counts"
        return [finding("detached_loss", text, 0.95, mend="give the rows weights above 0")]
    model = subject.copy(training=True)
    for batch in subject.train[:_BATCHES]:
        _, loss = subject.passed(model, batch)
        if float(loss.detach()) != 0 or not loss.requires_grad:
            return []
        loss.backward()
    if any(p.grad is not None and bool(p.grad.count_nonzero()) for p in model.parameters()):
        return []
    text = f"the loss of {len(subject.train[:_BATCHES])} batches is exactly 0, and so is its gradient: no row counts"
    mend = "look at what multiplies the loss: weights of rows or classes, or a mask that leaves nothing"
    return [finding("detached_loss", text, 0.95, mend=mend)]


def _weights_of(batch: Any) -> Tensor | None:
    """The weights of a batch's rows: by their name, or the third part of a tuple where it has a number for each."""
    if isinstance(batch, Mapping):
        found = next((batch[k] for k in WEIGHTS if k in batch), None)
        return found if isinstance(found, Tensor) else None
    third = batch[2] if isinstance(batch, (tuple, list)) and len(batch) == 3 else None
    if not isinstance(third, Tensor) or not third.is_floating_point() or not isinstance(batch[1], Tensor):
        return None
    return third if third.ndim and third.numel() == len(third) == len(batch[1]) else None


def not_finite(subject: Subject) -> list[Finding]:
    """nan_gradient and nan_loss, with the operation that makes it and the layers that it reaches."""
    model = subject.copy(training=True)
    with undisturbed(subject.seed):
        for number, batch in enumerate(subject.train[:_BATCHES]):
            found = examined_pass(subject, model, batch, f"batch {number}")
            if found:
                return found
    return []


def examined_pass(subject: Subject, model: nn.Module, batch: Any, when: str) -> list[Finding]:
    """The same of one forward and backward pass, which leaves no gradient behind."""
    inputs, target = subject.parts(batch)
    numbers = [t for t in (*tensors(inputs), *tensors(target)) if t.is_floating_point()]
    if not all(bool(t.isfinite().all()) for t in numbers):
        return []  # a disease of the data
    model.zero_grad()
    output, loss = subject.passed(model, batch)
    if not bool(loss.isfinite()):
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            return []
        return [_nan_loss(subject, model, batch, output, when)]
    if not loss.requires_grad:
        return []
    culprit, handles = _watched(loss)
    loss.backward()
    for handle in handles:
        handle.remove()
    lost = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    model.zero_grad()
    if not lost:
        return []
    layers = list(dict.fromkeys(owner(n) or "model" for n in lost))
    name = _kind(culprit[0]) if culprit else ""
    by = f": {name} passes back a gradient that is not finite" if name else ""
    text = f"at {when} loss ({float(loss.detach()):.3g}), inputs and weights are finite, and the gradient of "
    text += f"{named(layers)} is not{by}"
    mend = _MEND.get(name, "keep the named operation away from where its slope is infinite")
    return [finding("nan_gradient", text, 0.99, layers=layers, mend=mend)]


def _watched(loss: Tensor) -> tuple[list[str], list[Any]]:
    """Names of nodes that turn a finite gradient into one that is not, in the order of the backward pass."""
    culprits: list[str] = []

    def on(node: Any) -> Callable[[Any, Any], None]:
        def look(made: Any, given: Any) -> None:
            if _finite(given) and not _finite(made):
                culprits.append(node.name())

        return look

    handles, stack, seen = [], [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or "AccumulateGrad" in node.name():
            continue
        seen.add(node)
        handles.append(node.register_hook(on(node)))
        stack += [n for n, _ in node.next_functions]
    return culprits, handles


def _finite(values: Any) -> bool:
    return all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor))


def _kind(node: str) -> str:
    return node.removesuffix("0").removesuffix("1").removesuffix("Backward").lstrip("_")


def _nan_loss(subject: Subject, model: nn.Module, batch: Any, output: Any, when: str) -> Finding:
    with torch.no_grad(), functions(_NAMED) as calls:
        loss = subject.value(subject.answer(model, batch), subject.parts(batch)[1])
    first = next((n for n, args, _, r in calls if not _nan(args) and _nan(r)), "")
    where = "" if not first else f"; {first.strip('_')} gives the first NaN or infinity"
    inside = bool(scores(output).isfinite().all())
    text = f"at {when} inputs and weights are finite and the loss is {float(loss):.3g}, "
    text += f"{'while the output is finite' if inside else 'as is the output of the model'}{where}"
    mend = _MEND.get(first.strip("_").title().replace("_", ""), "")
    if first in ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward"):
        mend = _MEND["Softmax"]
    if first in ("cross_entropy", "nll_loss"):
        mend = "a batch without one label that counts has no mean: sum, and divide by at least 1"
    return finding("nan_loss", text, 0.99, mend=mend or diseases()["nan_loss"].mend)


def _nan(values: Any) -> bool:
    """NaN, or infinity that is no mask's; a result of -inf alone is a mask."""
    return any(bool((t.isnan() | (t == torch.inf)).any()) for t in tensors(values) if t.is_floating_point())


def detached(subject: Subject) -> list[Finding]:
    """detached_loss, or cut_off where it is the model that the graph does not reach."""
    model = subject.copy(training=True)
    with undisturbed(subject.seed), torch.enable_grad():
        output, loss = subject.passed(model, subject.some(subject.train[0], 32))
    if loss.requires_grad:
        return []
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        text = "requires_grad is False for all parameters"
        return [finding("frozen_parameters", text, 0.95, layers=[])]
    if scores(output).requires_grad:
        text = "the output has a graph and the loss has none: within the loss something leaves it, as item, detach, "
        text += "argmax, numpy or torch.tensor do"
        return [finding("detached_loss", text, 0.99)]
    text = "the loss depends on no parameter, as behind detach, no_grad or numpy in the forward pass"
    return [finding("cut_off", text, 0.98)]


def ownership(subject: Subject) -> list[Finding]:
    """foreign_optimizer: an optimizer that was given, and has parameters that are not the model's."""
    if subject.optimizer is None:
        return []
    has = [p for g in subject.optimizer.param_groups for p in g["params"]]
    foreign = [p for p in has if id(p) not in subject.given and p.requires_grad]
    if not foreign:
        return []
    own = sum(id(p) in subject.given for p in has)
    text = f"{len(foreign)} of the optimizer's {len(has)} parameters are not the model's, "
    text += f"of whose {len(subject.given)} it has {own}: steps change another model, or layers that were replaced"
    return [finding("foreign_optimizer", text, 0.99 if not own else 0.93)]


def left_out(subject: Subject) -> list[Finding]:
    """cut_off: layers that no gradient reaches, or that the optimizer does not have; for tasks without an examination
    of their own."""
    model = subject.copy(training=True)
    with undisturbed(subject.seed):
        _, loss = subject.passed(model, subject.some(subject.train[0], 64))
    if not loss.requires_grad:
        return []
    loss.backward()
    known = dict(model.named_parameters())
    lost = [n for n, p in known.items() if p.requires_grad and p.grad is None]
    found = _told(known, lost, "no gradient reaches", ": the forward pass does not use them, or the graph ends behind")
    optimizer = subject.make_optimizer(subject.copy() if subject.optimizer is None else model)
    if subject.optimizer is not None:
        has = {id(p) for g in optimizer.param_groups for p in g["params"]}
        missing = [n for n, p in known.items() if p.requires_grad and id(p) not in has]
        found += _told(known, missing, "the optimizer does not have", "")
    return found


def _told(known: Mapping[str, Tensor], names: list[str], what: str, more: str) -> list[Finding]:
    if not names:
        return []
    part = sum(known[n].numel() for n in names) / max(1, sum(p.numel() for p in known.values()))
    layers = list(dict.fromkeys(owner(n) or n for n in names))
    text = f"{what} {named(layers)}, {share(part)} of the weights{more}"
    return [finding("cut_off", text, 0.95 if part > 0.01 else 0.6, layers=layers)]
