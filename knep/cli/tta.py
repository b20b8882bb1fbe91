"""`knep tta RUN`: the views of an image that are worth averaging, chosen on validation."""

from __future__ import annotations

import argparse
from pathlib import Path

from knep.errors import InputError
from knep.utils.text import shown


def add_to(commands: argparse._SubParsersAction) -> None:
    """The arguments of `knep tta`."""
    parser = commands.add_parser("tta", help="test-time augmentation, views chosen on validation: knep tta RUN")
    parser.add_argument("source", type=Path, metavar="run", help="a run folder or a .ckpt file")
    parser.add_argument(
        "--stages", nargs="+", default=[], metavar="NAME", help="options of augment; by default the run's own"
    )
    parser.add_argument("--draws", type=int, default=4, metavar="N", help="of each stage, 4 by default")
    parser.add_argument("--most", type=int, default=8, metavar="N", help="views at most, 8 by default")
    parser.add_argument("--test", action="store_true", help="read the test split once, with the views chosen")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE.", help="where its model comes from")
    parser.set_defaults(run=command)


def command(args: argparse.Namespace) -> None:
    """Prints the views and what they reach. What can be refused at once is, without torch."""
    from knep.config.catalog import options
    from knep.config.instantiate import allow

    for name in args.allow:
        allow(name)
    if not args.source.exists():
        raise InputError(f"{shown(args.source)} is missing: give a run folder or a .ckpt file")
    for key in ("draws", "most"):
        if getattr(args, key) < 1:
            raise InputError(f"--{key} {getattr(args, key)} must be at least 1")
    unknown = [name for name in args.stages if name == "none" or name not in options("augment")]
    if unknown:
        raise InputError(f"--stages {shown(unknown[0])} is no stage of augment: see knep ls augment")

    from knep.ensemble.test_time import choose  # brings torch

    looks = choose(args.source, args.stages, args.draws, args.most, args.test)
    print(f"views    {', '.join(str(view) for view in looks[0].views)}")
    for split, look in zip(("val", "test")[: len(looks)], looks, strict=True):
        gained = f"acc {look.plain_acc:.4f} -> {look.acc:.4f}   loss {look.plain_loss:.4f} -> {look.loss:.4f}"
        print(f"{split:9}{gained}")
