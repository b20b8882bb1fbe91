"""Optimizers that neither torch nor pytorch_optimizer has in the form that the `optimizer` slot needs.

Their state is plain data (tensors, numbers), so that `torch.load(..., weights_only=True)` reads it. Ranges of
hyper-parameters are checked by the functions of `knep.recipes.optimizer` that build them.
"""

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor
from torch.optim import Optimizer

from knep.errors import InputError
from knep.optim.gradients import global_norm, gradients

Closure = Callable[[], Any] | None


def _evaluate(closure: Closure) -> Any:
    """The loss of the closure, which computes the gradients, or None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Idle(Optimizer):
    """Takes no step: w <- w."""

    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        return _evaluate(closure)


class NormalizedSGD(Optimizer):
    """w <- w - lr (g / ||g|| + weight_decay w), with ||g|| over all groups together; no part of g where g is 0."""

    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = _evaluate(closure)
        with torch.no_grad():
            self._update()
        return loss

    def _update(self) -> None:
        norm = global_norm([g for group in self.param_groups for g in gradients(group["params"])])
        scale = torch.where(norm > 0, 1 / norm, 0.0)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, torch._foreach_mul(gradients(params), scale), alpha=-group["lr"])


class SAM(pytorch_optimizer.SAM):
    """Sharpness-aware minimization whose step does both passes, as closures of Lightning expect.

    The library's own step wants gradients to be there already; here the closure (clear gradients, loss, backward) is
    called at w and again at w + e, with e = rho g / ||g||, and the base optimizer steps from w with the second
    gradient. Returns the loss at w. Raises InputError without a closure.
    """

    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        if closure is None:
            raise InputError("sam needs step(closure): it computes the loss and its gradient twice")
        loss = _evaluate(closure)
        super().step(closure)
        return loss


class Shampoo(Optimizer):
    """Preconditions each gradient tensor by one matrix per axis, the inverse root of that axis's second moments.

    Gupta, Koren and Singer 2018, algorithm 2: for a gradient G of order k (axes longer than 1; convolution taps count
    as one axis), H_i <- beta2 H_i + (1 - beta2) G_i G_i^T with G_i unfolded along axis i (a plain sum for beta2 = 1),
    and U = G x_1 H_1^(-1/2k) ... x_k H_k^(-1/2k). Axes longer than max_dim are left as they are and do not count.
    With graft, U is scaled to the length of G (Anil et al. 2020, sec. 4), so that learning rates of SGD with momentum
    carry over. Then m <- momentum m + U; w <- w - lr (m + weight_decay w).

    Roots are computed each `every` steps, with eps times the largest eigenvalue added; before the first, U = G.
    """

    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = _evaluate(closure)
        with torch.no_grad():
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for p in group["params"]:
                    if p.grad is not None:
                        self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        folded = grad.flatten(2) if grad.ndim > 2 else grad
        axes = [i for i, size in enumerate(folded.shape) if 1 < size <= group["max_dim"]]
        if not state:
            state["momentum"] = torch.zeros_like(p)
            state["moments"] = [folded.new_zeros(folded.shape[i], folded.shape[i]) for i in axes]
            state["roots"] = [torch.eye(folded.shape[i], dtype=p.dtype, device=p.device) for i in axes]
        beta2, update = group["beta2"], folded
        for k, axis in enumerate(axes):
            unfolded = folded.movedim(axis, 0).reshape(folded.shape[axis], -1)
            state["moments"][k].addmm_(unfolded, unfolded.T, beta=beta2, alpha=1 - beta2 if beta2 < 1 else 1)
            if group["step"] % group["every"] == 0:
                state["roots"][k] = _inverse_root(state["moments"][k], 2 * len(axes), group["eps"])
            update = torch.tensordot(state["roots"][k], update.movedim(axis, 0), dims=1).movedim(0, axis)
        update = update.reshape(p.shape)
        if group["graft"]:
            update = update * (grad.norm() / update.norm().clamp(min=torch.finfo(p.dtype).tiny))
        state["momentum"].mul_(group["momentum"]).add_(update)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(state["momentum"], alpha=-group["lr"])


def _inverse_root(moment: Tensor, order: int, eps: float) -> Tensor:
    """(H + eps lambda_max I) ** (-1 / order) of a positive semidefinite (n, n) matrix.

    What is not finite counts as 0: the decomposition would raise, while the gradient itself still shows it in w.
    """
    values, vectors = torch.linalg.eigh(torch.nan_to_num(moment, nan=0.0, posinf=0.0, neginf=0.0))
    ridge = eps * values[-1] + torch.finfo(values.dtype).tiny
    return (vectors * (values.clamp(min=0) + ridge).pow(-1 / order)) @ vectors.T


class Muon(pytorch_optimizer.Muon):
    """The library's Muon with its products in float32, for CPUs that have none in bfloat16: there they take fifty times
    as long.
    """

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

        given: dict[str, Any] = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
        return [zero_power_via_newton_schulz_5(update.reshape(len(update), -1), **given) for update in updates]
