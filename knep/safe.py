"""Instantiating config nodes, from allow-listed targets only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knep.errors import InputError

# Prefixes whose callables build tricks, models and data and run nothing that a config could bring along.
_ALLOWED = [
    "knep.data.",
    "knep.models.",
    "knep.recipes.",
    "knep.regularizer.",
    "lightning.pytorch.Trainer",
    "pytorch_optimizer.",
    "torch.nn.",
    "torch.optim.",
]


def allow(prefix: str) -> None:
    """Lets configs instantiate targets under `prefix`, for example "mypkg."."""
    _ALLOWED.append(prefix)


def check_targets(node: Any, path: str = "") -> None:
    """Raises InputError naming the first `_target_` in `node` that is not allowed."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if target is not None and not any(str(target).startswith(prefix) for prefix in _ALLOWED):
            raise InputError(
                f"{path or 'config'}._target_={target!s} is not on the list of allowed targets: "
                f'if you trust it, call knep.safe.allow("{str(target).rpartition(".")[0]}.") first'
            )
        for key, value in node.items():
            check_targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            check_targets(value, f"{path}[{i}]")


def instantiate(node: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """`hydra.utils.instantiate` for a plain resolved node; the error of a constructor is raised as it was."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    check_targets(node)
    try:
        return hydra_instantiate(dict(node), *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, TypeError)):
            raise cause from None
        raise InputError(" ".join(str(error).split())) from error
