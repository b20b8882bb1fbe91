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

Loss = Tensor | float | None
Closure = Callable[[], Loss] | None


def _evaluate(closure: Closure) -> Loss:
    """The loss of the closure, which computes the gradients, or None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Idle(Optimizer):
    """Takes no step: w <- w."""

    def step(self, closure: Closure = None) -> Loss:  # type: ignore[override]
        return _evaluate(closure)


class NormalizedSGD(Optimizer):
    """w <- w - lr (g / ||g|| + weight_decay w), with ||g|| over all groups together; no part of g where g is 0."""

    def step(self, closure: Closure = None) -> Loss:  # type: ignore[override]
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


class RMSpropTF(Optimizer):
    """s <- a s + (1 - a) g^2 from s = 1; v <- momentum v + lr g / sqrt(s + eps); w <- w - v, with decay w in g.

    TensorFlow 1's RMSProp, which efficient nets were published with: the start at 1, eps under the root and the rate
    inside the momentum are what torch's own has otherwise.
    """

    def step(self, closure: Closure = None) -> Loss:  # type: ignore[override]
        loss = _evaluate(closure)
        with torch.no_grad():
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                for p in params:
                    if not self.state[p]:
                        self.state[p] = {"square": torch.ones_like(p), "momentum": torch.zeros_like(p)}
                if params:
                    self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        squares, momenta = ([self.state[p][key] for p in params] for key in ("square", "momentum"))
        grads = torch._foreach_add(gradients(params), params, alpha=group["weight_decay"])
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, grads, grads, value=1 - group["alpha"])
        roots = torch._foreach_sqrt(torch._foreach_add(squares, group["eps"]))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, torch._foreach_div(grads, roots), alpha=group["lr"])
        torch._foreach_sub_(params, momenta)


class NvLamb(Optimizer):
    """u = m^ / (sqrt(s^) + eps) + decay w, with Adam's corrected moments of g; w <- w - lr (||w|| / ||u||) u.

    You et al. 2020, algorithm 2, as NVIDIA's FusedLAMB and timm have it: all gradients together are first shortened to
    max_norm (None: not), and what does not decay, norms and biases, takes Adam's step, with a ratio of 1; so does a
    tensor of which w or u is 0.
    """

    def step(self, closure: Closure = None) -> Loss:  # type: ignore[override]
        loss = _evaluate(closure)
        with torch.no_grad():
            norm = global_norm([g for group in self.param_groups for g in gradients(group["params"])])
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                limit = group["max_norm"]
                scale = torch.ones_like(norm) if limit is None else (limit / norm).clamp(max=1.0)
                for p in group["params"]:
                    if p.grad is not None:
                        self._update(p, p.grad * scale.to(p.grad.dtype), group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), t = self.state[p], group["betas"], group["step"]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (state["square"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        update = state["mean"] / (1 - beta1**t) / root
        ratio: Tensor | float = 1.0
        if group["weight_decay"]:
            update.add_(p, alpha=group["weight_decay"])
            weight, length = p.norm(), update.norm()
            ratio = torch.where((weight > 0) & (length > 0), weight / length, 1.0)
        p.sub_(update * ratio, alpha=group["lr"])


class SAM(pytorch_optimizer.SAM):
    """Sharpness-aware minimization whose step does both passes, as closures of Lightning expect.

    The library's own step wants gradients to be there already; here the closure (clear gradients, loss, backward) is
    called at w and again at w + e, with e = rho g / ||g||, and the base optimizer steps from w with the second
    gradient. Returns the loss at w. Raises InputError without a closure.
    """

    def step(self, closure: Closure = None) -> Loss:  # type: ignore[override]
        if closure is None:
            raise InputError("sam needs step(closure): it computes the loss and its gradient twice")
        loss = _evaluate(closure)
        super().step(closure)  # type: ignore[arg-type]
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

    def step(self, closure: Closure = None) -> Loss:  # type: ignore[override]
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


class _InFloat32:
    """Newton-Schulz products of a Muon in float32, for CPUs that have none in bfloat16: there they take fifty times as
    long.
    """

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

        given: dict[str, Any] = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
        return [zero_power_via_newton_schulz_5(update.reshape(len(update), -1), **given) for update in updates]


class Muon(_InFloat32, pytorch_optimizer.Muon):
    """The library's Muon with its products in float32."""


class NorMuon(_InFloat32, pytorch_optimizer.NorMuon):
    """The library's NorMuon with its products in float32."""


class AdaMuon(pytorch_optimizer.AdaMuon):
    """The library's AdaMuon with what the paper has beside: the look-ahead of the momentum, and its signs.

    Si, Zhang and Shen 2025, algorithm 1: it is sign(M) that is made orthogonal. The library orthogonalizes M.
    """

    _ahead: list[Tensor]

    def _step_muon_foreach(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        state_dict: dict[str, list[Tensor]],
        bias_correction2: float | Tensor,
    ) -> None:
        self._ahead = grads if group["nesterov"] else []
        super()._step_muon_foreach(group, params, grads, state_dict, bias_correction2)
        self._ahead = []

    def _orthogonalize(self, group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        if self._ahead:
            updates = list(torch._foreach_lerp(self._ahead, updates, group["betas"][0]))
        signs = list(torch._foreach_sign(updates))
        return [update.to(sign.dtype) for update, sign in zip(self._orthogonal(group, signs), signs, strict=True)]

    def _orthogonal(self, group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        return super()._orthogonalize(group, updates)


class AdaMuon32(AdaMuon):
    """`AdaMuon` with its products in float32."""

    def _orthogonal(self, group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        return _InFloat32._orthogonalize(group, updates)
