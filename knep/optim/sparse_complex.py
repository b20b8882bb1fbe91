"""Weights whose gradients many rules do not take: sparse ones, of embeddings, and complex ones, which is tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knep.errors import InputError

Kind = Literal["sparse", "complex"]
Clip = Callable[[Iterable[Tensor]], Tensor]
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CURES: dict[Kind, str] = {
    "sparse": "make that embedding with sparse=False",
    "complex": "keep that weight as two real ones, torch.view_as_real",
}


def odd_weights(model: nn.Module) -> dict[Kind, str]:
    """Kind of gradient -> the first trained parameter that has such; empty where all are dense and real."""
    found: dict[Kind, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, _EMBEDDINGS) and module.sparse and module.weight.requires_grad:
            found.setdefault("sparse", f"{path}.weight".removeprefix("."))
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            found.setdefault("complex", name)
    return found


def refuse_step(kind: Kind, weight: str, make: Callable[[nn.Module], Optimizer], option: str) -> None:
    """Raises InputError where an optimizer cannot step such gradients, or leaves a part of the weight as it is.

    make: the optimizer of a model; option: its name, for the line.
    """

    def step(model: nn.Module, backward: Callable[[], Tensor]) -> None:
        optimizer: Any = make(model)
        if hasattr(optimizer, "train"):  # of schedule-free ones, which step in train mode alone
            optimizer.train()
        before = [p.detach().clone() for p in model.parameters()]
        backward()
        optimizer.step(backward)
        for p, was in zip(model.parameters(), before, strict=True):
            if p.is_complex() and not torch.equal(p.real, was.real) and torch.equal(p.imag, was.imag):
                raise ArithmeticError("the imaginary part stays")

    _refuse(kind, weight, step, f"optimizer={option} cannot step", "write optimizer=sgd")


def refuse_clip(kind: Kind, weight: str, clip: Clip, option: str) -> None:
    """Raises InputError where an option of the slot `clip` cannot edit such gradients."""

    def clipped(model: nn.Module, backward: Callable[[], Tensor]) -> None:
        backward()
        clip(list(model.parameters()))

    _refuse(kind, weight, clipped, f"clip={option} cannot edit", "write clip=norm clip.theta=1.0, or clip=none")


def _refuse(
    kind: Kind, weight: str, act: Callable[[nn.Module, Callable[[], Tensor]], None], what: str, other: str
) -> None:
    """`act` is tried on a small model with such a weight, and blamed on it where it works with a plain one."""
    with torch.random.fork_rng([]), torch.enable_grad():
        try:
            act(*_small(kind))
        except Exception as error:  # each library has its own
            try:
                act(*_small(None))
            except Exception:
                return  # it is something else, which will say so
            raise InputError(f"{what} the {kind} gradients of {weight}: {_CURES[kind]}, or {other}") from error


def _small(kind: Kind | None) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model with such a weight, and the closure that computes its gradients."""
    head = nn.Linear(3, 3)
    if kind == "complex":
        first: nn.Module = nn.Linear(3, 3, dtype=torch.complex64)
        x = torch.ones(2, 3, dtype=torch.complex64)
    else:
        first, x = nn.Embedding(4, 3, sparse=kind == "sparse"), torch.tensor([0, 2])
    model = nn.Sequential(first, head)

    def backward() -> Tensor:
        model.zero_grad()
        out = first(x)
        loss = head(out.abs() if out.is_complex() else out).square().sum()
        loss.backward()
        return loss

    return model, backward
