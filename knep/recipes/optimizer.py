"""`optimizer`: the update rule. `f(param_groups, **hp) -> torch.optim.Optimizer`, stepped once per update.

The groups are those of `knep.optim.param_groups.param_groups`: each has its own lr and weight_decay, which win over the
hyper-parameters of the same name. Options that torch or pytorch_optimizer offer as they are have a YAML and no code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_optimizer
from torch.optim import Optimizer

from knep.errors import InputError
from knep.optim.optimizers import (
    SAM,
    AdaMuon,
    AdaMuon32,
    Idle,
    Muon,
    NormalizedSGD,
    NorMuon,
    NvLamb,
    RMSpropTF,
    Shampoo,
)
from knep.utils.hardware import cpu_bf16
from knep.utils.validation import check

__all__ = ["muon", "none", "normalized_sgd", "nvlamb", "rmsprop_tf", "sam", "shampoo"]

Groups = list[dict[str, Any]]


def none(param_groups: Groups, *, lr: float = 1.0, weight_decay: float = 0.0) -> Optimizer:
    """Leaves every weight as it was initialised: the control that any training has to beat."""
    return Idle(param_groups, {"lr": lr, "weight_decay": weight_decay})


def normalized_sgd(param_groups: Groups, *, lr: float, weight_decay: float = 0.0) -> Optimizer:
    """Steps of length lr whatever the gradient's size: w <- w - lr (g / ||g|| + weight_decay w).

    Normalized gradient descent (Hazan, Levy and Shalev-Shwartz 2015, algorithm 1), ||g|| over all parameters together.
    Not Adagrad, which divides each coordinate by its own history. A zero gradient moves nothing.

    lr: length of a step, in (0, inf); weight_decay: decoupled, in [0, inf). Raises InputError outside.
    """
    check("lr", lr, "(0, inf)")
    check("weight_decay", weight_decay, "[0, inf)")
    return NormalizedSGD(param_groups, {"lr": lr, "weight_decay": weight_decay})


def rmsprop_tf(
    param_groups: Groups,
    *,
    lr: float,
    weight_decay: float = 0.0,
    alpha: float = 0.9,
    eps: float = 1e-3,
    momentum: float = 0.9,
) -> Optimizer:
    """RMSProp as TensorFlow 1 has it (Tieleman and Hinton 2012; `knep.optim.optimizers.RMSpropTF`).

    lr: in (0, inf), part of the momentum; weight_decay: added to the gradient, in [0, inf); alpha: decay of the squared
    gradients, which start at 1, in [0, 1); eps: under the root, in (0, inf); momentum: in [0, 1). Raises InputError
    outside.
    """
    check("lr", lr, "(0, inf)")
    check("weight_decay", weight_decay, "[0, inf)")
    check("alpha", alpha, "[0, 1)")
    check("eps", eps, "(0, inf)")
    check("momentum", momentum, "[0, 1)")
    defaults = {"lr": lr, "weight_decay": weight_decay, "alpha": alpha, "eps": eps, "momentum": momentum}
    return RMSpropTF(param_groups, defaults)


def nvlamb(
    param_groups: Groups,
    *,
    lr: float,
    weight_decay: float = 0.02,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-6,
    max_norm: float | None = 1.0,
) -> Optimizer:
    """LAMB as NVIDIA and timm have it: a clipped gradient, Adam's correction, no ratio without decay (You et al. 2020).

    lr: in (0, inf); weight_decay: part of the update that is scaled to the weights, in [0, inf); betas: two, in [0, 1);
    eps: in [0, inf); max_norm: length of the whole gradient, in (0, inf), None for any. Raises InputError outside.
    """
    check("lr", lr, "(0, inf)")
    check("weight_decay", weight_decay, "[0, inf)")
    check("eps", eps, "[0, inf)")
    for beta in betas:
        check("betas", beta, "[0, 1)")
    if max_norm is not None:
        check("max_norm", max_norm, "(0, inf)")
    defaults = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps, "max_norm": max_norm}
    return NvLamb(param_groups, defaults)


# Variant of Muon -> the library's class, and its twin for CPUs without bfloat16.
_MUONS: dict[str, tuple[Any, Any]] = {
    "muon": (pytorch_optimizer.Muon, Muon),
    "normuon": (pytorch_optimizer.NorMuon, NorMuon),
    "adamuon": (AdaMuon, AdaMuon32),
}
# Jordan's are one polynomial for all steps, the others one for each.
_COEFFICIENTS = ("original", "quintic", "polar_express", "polar_express_safer")
_BETA2 = 0.95


def muon(
    param_groups: Groups,
    *,
    lr: float,
    weight_decay: float = 0.01,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adamw_lr: float = 2e-3,
    adamw_betas: Sequence[float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    variant: str = "muon",
    coefficients: str = "original",
    beta2: float | None = None,
) -> Optimizer:
    """Turns the momentum of each weight matrix into the nearest matrix with equal singular values; the rest is AdamW.

    Jordan et al. 2024 (Muon), by `pytorch_optimizer.Muon`: the momentum is made nearly orthogonal by Newton-Schulz
    steps in bfloat16 (float32 on a CPU that lacks it) and scaled by sqrt(max(1, rows / columns)). Matrices are all
    decayed weights: linear ones, and convolutions as (filters, channels x taps), which `torch.optim.Muon` refuses.
    Norms, biases and embeddings go to AdamW, whose rate is adamw_lr times the group's own share of lr, so that
    layer-wise decay and one schedule hold for both arms.

    NorMuon (Li et al. 2025) divides each row of the orthogonal matrix by the root of its mean square over steps;
    AdaMuon (Si, Zhang and Shen 2025) makes the momentum's signs orthogonal, and divides each element so. Both then give
    the matrix back the length that it had as an orthogonal one, so that Muon's rates carry over; their papers take 0.2
    sqrt(rows columns) instead. Coefficients of polar_express (Amsel et al. 2025) are the best polynomial for each step,
    of a safety of 1 % (_safer: 2 %) against rounding, and bring singular values nearer to 1 than Jordan's.

    lr, adamw_lr: in (0, inf); weight_decay: decoupled, in [0, inf); momentum: in [0, 1); ns_steps: in [1, inf);
    adamw_betas: two, in [0, 1); variant: muon, normuon or adamuon; coefficients: original, quintic, polar_express or
    polar_express_safer; beta2: of a variant's second moment, in [0, 1), None is 0.95.
    Raises InputError outside, when there is no matrix, or for a beta2 of plain Muon, which has none.
    """
    check("lr", lr, "(0, inf)")
    check("adamw_lr", adamw_lr, "(0, inf)")
    check("ns_steps", ns_steps, "[1, inf)")
    check("momentum", momentum, "[0, 1)")
    check("weight_decay", weight_decay, "[0, inf)")
    check("adamw_eps", adamw_eps, "[0, inf)")
    for beta in adamw_betas:
        check("adamw_betas", beta, "[0, 1)")
    _check_variant(variant, coefficients, beta2)
    second = _BETA2 if beta2 is None else beta2
    own: dict[str, Any] = {"ns_steps": ns_steps, "ns_coeffs": coefficients, "use_muon": True}
    own |= {"nesterov": nesterov} | ({"betas": (momentum, second)} if variant == "adamuon" else {"momentum": momentum})
    own |= {"beta2": second} if variant == "normuon" else {}
    own |= {"use_adjusted_lr": False} if variant == "adamuon" else {}
    adamw: dict[str, Any] = {"betas": tuple(adamw_betas), "eps": adamw_eps, "use_muon": False}
    arms: Groups = []
    for group in param_groups:
        share = group.get("lr", lr) / lr
        matrix = [group.get("decayed", True) and p.ndim > 1 for p in group["params"]]
        arms += _part(group, matrix, "muon", lr=share * lr, **own)
        arms += _part(group, [not m for m in matrix], "adamw", lr=share * adamw_lr, **adamw)
    if not any(arm["use_muon"] for arm in arms):
        raise InputError("muon needs weights of linear layers or convolutions, and the model trains none: use adamw")
    slow = not cpu_bf16() and all(p.device.type == "cpu" for arm in arms for p in arm["params"])
    more: dict[str, Any] = {"foreach": None} if variant == "adamuon" else {}
    return _MUONS[variant][slow](
        arms, lr=lr, weight_decay=weight_decay, adamw_lr=adamw_lr, adamw_wd=weight_decay, **more
    )


def _check_variant(variant: str, coefficients: str, beta2: float | None) -> None:
    if variant not in _MUONS:
        raise InputError(f"variant must be one of {', '.join(_MUONS)}, got {variant}")
    if coefficients not in _COEFFICIENTS:
        raise InputError(f"coefficients must be one of {', '.join(_COEFFICIENTS)}, got {coefficients}")
    if beta2 is not None:
        check("beta2", beta2, "[0, 1)")
        if variant == "muon":
            raise InputError("beta2 is of a second moment, which muon has not: write variant=normuon, or leave it out")


def _part(group: dict[str, Any], chosen: list[bool], arm: str, **values: Any) -> Groups:
    """The chosen parameters of a group as a group of its own, named "decay.muon" and so on; none for no parameters."""
    lists = {
        key: [item for item, yes in zip(group[key], chosen, strict=True) if yes]
        for key in ("params", "param_names")
        if key in group
    }
    if "unreached" in group:
        lists["unreached"] = [name for name in group["unreached"] if name in lists["param_names"]]
    return [{**group, **lists, **values, "name": f"{group.get('name', 'group')}.{arm}"}] if lists["params"] else []


def sam(
    param_groups: Groups,
    *,
    base: Callable[..., Optimizer],
    lr: float,
    weight_decay: float = 5e-4,
    rho: float = 0.05,
    adaptive: bool = False,
) -> Optimizer:
    """Steps by the gradient at the worst point within rho, w + rho g / ||g|| (Foret et al. 2021, algorithm 1).

    Costs two forward and backward passes a step, which it takes from the closure. Adaptive scales the ball by |w|
    (ASAM, Kwon et al. 2021). Batch statistics are updated, and dropout is drawn, in both passes.

    base: the optimizer that takes the step, called as base(param_groups, lr=..., weight_decay=...);
    rho: radius in weight space, in (0, inf). Raises InputError outside it.
    """
    check("lr", lr, "(0, inf)")
    check("rho", rho, "(0, inf)")
    return SAM(param_groups, base_optimizer=base, rho=rho, adaptive=adaptive, lr=lr, weight_decay=weight_decay)  # type: ignore[arg-type]


def shampoo(
    param_groups: Groups,
    *,
    lr: float,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    beta2: float = 0.99,
    eps: float = 1e-6,
    every: int = 10,
    max_dim: int = 512,
    graft: bool = True,
) -> Optimizer:
    """Whitens the gradient along each axis of each weight tensor (Gupta, Koren and Singer 2018; `optim.optimizers`).

    lr: in (0, inf), that of SGD with momentum when grafted; weight_decay: decoupled, in [0, inf); momentum: in [0, 1);
    beta2: decay of the second moments, in [0, 1], 1 sums them as in the paper; eps: share of the largest eigenvalue
    added before the root, in [0, inf); every: steps between roots, in [1, inf); max_dim: longest axis that is whitened,
    in [1, inf); graft: give the update the gradient's length. Raises InputError outside.
    """
    check("lr", lr, "(0, inf)")
    check("weight_decay", weight_decay, "[0, inf)")
    check("momentum", momentum, "[0, 1)")
    check("beta2", beta2, "[0, 1]")
    check("eps", eps, "[0, inf)")
    check("every", every, "[1, inf)")
    check("max_dim", max_dim, "[1, inf)")
    defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "beta2": beta2}
    return Shampoo(param_groups, {**defaults, "eps": eps, "every": every, "max_dim": max_dim, "graft": graft})
