"""The ways in: the commands and readers that open files, each a function of its arguments."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from knep.config.schema import RunConfig

_USED = (
    "matplotlib.backends.backend_agg",
    "torch.utils.tensorboard",
    "knep.cli.main",
    "knep.data.cache",
    "knep.data.cifar",
    "knep.data.image_folder",
    "knep.data.mnist",
    "knep.data.svhn",
    "knep.export.export",
    "knep.engine.fit",
    "knep.run.predict",
    "knep.run.report",
    "knep.cli.train",
)
QUICK = ("trainer=cpu", "trainer.max_epochs=1", "progress=false", "threads=1", "hydra.run.dir=run")


def warm() -> None:
    """Imports what the doors use, so that a child's memory and time are its own."""
    import PIL.Image

    from knep.config.catalog import options
    from knep.config.compose import compose_config
    from knep.engine.sanity_check import rehearse

    for name in _USED:
        importlib.import_module(name)
    PIL.Image.init()
    for data in options("data"):
        config = compose_config(["recipe=none", f"data={data}"]).config
    rehearse(RunConfig.of(config | {"data": {"_target_": "knep.data.digits.Digits"}}))


def train(arguments: Sequence[str]) -> None:
    from knep.cli.train import main

    main([*QUICK, *arguments])


def resume(arguments: Sequence[str]) -> None:
    from knep.cli.train import main

    main([f"ckpt={arguments[0]}", *arguments[1:]])


def command(arguments: Sequence[str]) -> None:
    """`knep ...`: evaluate, predict, export, cp, import-unsafe."""
    from knep.cli.main import main

    main(arguments)


def read(arguments: Sequence[str]) -> None:
    """A data set by its target with its arguments, all of it read."""
    from knep.cli.errors import one_line
    from knep.config.compose import compose_config
    from knep.config.instantiate import instantiate

    kind, *values = arguments
    node: dict[str, Any] = compose_config(["recipe=none", f"data={kind}", *values]).config["data"]
    with one_line():
        data = instantiate(node)
        data.prepare()
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            for _ in loader:
                pass


DOORS = {"train": train, "resume": resume, "command": command, "read": read}
