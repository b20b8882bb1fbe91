"""`optimizer`: the update rule. `f(param_groups, **hp) -> torch.optim.Optimizer`, stepped once per update.

The groups are those of `knep.optim.param_groups.param_groups`: each has its own lr and weight_decay, which win over the
hyper-parameters of the same name. Options that torch or pytorch_optimizer offer as they are have a YAML and no code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_optimizer
from torch.optim import Optimizer

from knep.errors import InputError
from knep.optim.optimizers import SAM, Idle, Muon, NormalizedSGD, Shampoo
from knep.utils.hardware import cpu_bf16
from knep.utils.validation import check

__all__ = ["muon", "none", "normalized_sgd", "sam", "shampoo"]

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
) -> Optimizer:
    """Turns the momentum of each weight matrix into the nearest matrix with equal singular values; the rest is AdamW.

    Jordan et al. 2024 (Muon), by `pytorch_optimizer.Muon`: the momentum is made nearly orthogonal by Newton-Schulz
    steps in bfloat16 (float32 on a CPU that lacks it) and scaled by sqrt(max(1, rows / columns)). Matrices are all
    decayed weights: linear ones, and convolutions as (filters, channels x taps). Norms, biases and embeddings go to
    AdamW, whose rate is adamw_lr times the group's own share of lr, so that layer-wise decay and one schedule hold for
    both arms.

    lr, adamw_lr: in (0, inf); weight_decay: decoupled, in [0, inf); momentum: in [0, 1); ns_steps: in [1, inf);
    adamw_betas: two, in [0, 1). Raises InputError outside, or when there is no matrix.
    """
    check("lr", lr, "(0, inf)")
    check("adamw_lr", adamw_lr, "(0, inf)")
    check("ns_steps", ns_steps, "[1, inf)")
    arms: Groups = []
    for group in param_groups:
        share = group.get("lr", lr) / lr
        matrix = [group.get("decayed", True) and p.ndim > 1 for p in group["params"]]
        arms += _part(group, matrix, "muon", lr=share * lr, use_muon=True)
        arms += _part(group, [not m for m in matrix], "adamw", lr=share * adamw_lr, use_muon=False)
    if not any(arm["use_muon"] for arm in arms):
        raise InputError("muon needs weights of linear layers or convolutions, and the model trains none: use adamw")
    slow = not cpu_bf16() and all(p.device.type == "cpu" for arm in arms for p in arm["params"])
    return (Muon if slow else pytorch_optimizer.Muon)(
        arms,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        adamw_lr=adamw_lr,
        adamw_betas=tuple(adamw_betas),  # type: ignore[arg-type]
        adamw_eps=adamw_eps,
        adamw_wd=weight_decay,
    )


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
