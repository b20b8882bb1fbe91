"""What is trained in the bench: models, batches and the data they all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knep.config.compose import Composed, compose_config
from knep.config.instantiate import instantiate

_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it


@dataclass(frozen=True)
class Case:
    """A model with its batch (images). steps: measured in each run, warm: before them, unmeasured."""

    name: str
    batch: int
    model: tuple[str, ...]
    steps: int
    warm: int


CASES = {
    case.name: case
    for case in (
        Case("mlp_64", 64, ("model=mlp", "model.widths=[256,256]"), steps=400, warm=50),
        Case("cnn_64", 64, ("model=cnn",), steps=60, warm=10),
        Case("cnn_512", 512, ("model=cnn",), steps=12, warm=3),
        Case("resnet20_128", 128, ("model=resnet", "norm=batch"), steps=12, warm=3),
        Case("resnet18_128", 128, ("model=resnet", "model.depth=18", "norm=batch"), steps=4, warm=2),
        Case("inception_128", 128, ("model=inception", "norm=batch"), steps=8, warm=2),
    )
}


def composed(case: Case, extra: Sequence[str] = ()) -> Composed:
    """A case: Adam at 1e-3, pixels in [0, 1], no other trick."""
    lines = ["recipe=none", "scaling=unit", "optimizer=adam", "optimizer.lr=1e-3", "trainer=cpu", *source()]
    return compose_config([*lines, f"data.batch_size={case.batch}", *case.model, *extra])


def compose(case: Case, extra: Sequence[str] = ()) -> dict[str, Any]:
    """The config of a case."""
    return composed(case, extra).config


def source() -> list[str]:
    """Fashion-MNIST where the system has it, otherwise made-up images of the same shape."""
    if _FOLDER.is_dir():
        return ["data=fashion_mnist"]
    return ["data=synthetic", "data.image_size=28", "data.images=60000"]


def read(config: dict[str, Any]) -> Any:
    """The prepared data of a config."""
    data = instantiate(config["data"])
    data.prepare()
    return data
