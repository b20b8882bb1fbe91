"""Targets that have moved: stored configs name them as they were, `config_hash` reads the name they had first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# As checkpoints, run folders and stored trials of earlier versions have it -> where it is defined now.
MOVED = {
    "knep.data.folder.ImageFolder": "knep.data.image_folder.ImageFolder",
    "knep.data.idx.FashionMnist": "knep.data.mnist.FashionMnist",
    "knep.data.idx.Mnist": "knep.data.mnist.Mnist",
    "knep.doctor.callback.Doctor": "knep.doctor.live.callback.Doctor",
    "knep.models.imported.imported": "knep.models.user_model.imported",
    "knep.models.zoo.torchvision": "knep.models.torchvision.torchvision",
    "knep.regularizer.Regularizer": "knep.recipes.regularization.Regularizer",
}
_FIRST = {now: first for first, now in MOVED.items()}


def with_current_names(node: Any) -> Any:
    """A config in plain data, each `_target_` by the name that it has now."""
    return _renamed(node, MOVED)


def with_first_names(node: Any) -> Any:
    """The same by the names that targets had first, which `config_hash` reads."""
    return _renamed(node, _FIRST)


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    if isinstance(node, Mapping):
        return {
            key: names.get(value, value) if key == "_target_" and isinstance(value, str) else _renamed(value, names)
            for key, value in node.items()
        }
    return [_renamed(value, names) for value in node] if isinstance(node, (list, tuple)) else node
