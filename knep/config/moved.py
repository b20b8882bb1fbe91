"""What stored runs and trials have otherwise than today: targets that have moved, and a norm that was named outright.

Stored configs name targets as they were, and `config_hash` reads the name that they had first.
"""

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


# Models with a place for each norm, where `norm=auto` computes what `norm=batch` does, to the bit. `recipe=modern` said
# batch until it said auto: its trials are found again, and resumed. Any other model may keep norms of its own.
_WITH_PLACES = tuple(f"knep.models.{name}.{name}" for name in ("cnn", "inception", "mlp", "resnet"))


def with_outright_norm(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in plain data, with the norm by name that `norm=auto` stands for, where the model says which."""
    norm, model = config.get("norm"), config.get("model")
    known = isinstance(model, Mapping) and model.get("_target_") in _WITH_PLACES
    if not known or not isinstance(norm, Mapping) or norm.get("_target_") != "knep.recipes.norm.auto":
        return dict(config)
    return {**config, "norm": {**norm, "_target_": "knep.recipes.norm.batch"}}


def with_current_names(node: object) -> Any:
    """A config in plain data, each `_target_` by the name that it has now."""
    return _renamed(node, MOVED)


def with_first_names(node: object) -> Any:
    """The same by the names that targets had first, which `config_hash` reads."""
    return _renamed(node, _FIRST)


def _renamed(node: object, names: Mapping[str, str]) -> Any:
    if isinstance(node, Mapping):
        return {
            key: names.get(value, value) if key == "_target_" and isinstance(value, str) else _renamed(value, names)
            for key, value in node.items()
        }
    return [_renamed(value, names) for value in node] if isinstance(node, (list, tuple)) else node
