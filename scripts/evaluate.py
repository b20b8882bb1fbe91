"""Tests a finished run: `python scripts/evaluate.py outputs/<date>/<time>_<name>`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from knep.cli_errors import one_line
from knep.safe import allow
from knep.sealed import read_again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or one .ckpt file")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--mirrored", action="store_true", help="average each image with its mirror, as test_flip does")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE.", help="where its model comes from")
    args = parser.parse_args()
    with one_line():
        for name in args.allow:
            allow(name)
        from knep.evaluate import evaluate, load_members, stored_data

        members = load_members(args.run)
        data = stored_data(members[0])
        batches = data.val_dataloader() if args.split == "val" else data.test_dataloader()
        result = evaluate(
            members,
            batches,
            data.num_classes,
            mirrored=args.mirrored or members[0].about["config"].get("test_flip", False),
        )
        if args.split == "test":
            read_again(args.run)
        low, high = result.interval()
        numbers = {"acc": result.acc, "acc_low": low, "acc_high": high, "loss": result.loss, "images": result.images}
        print(json.dumps({f"{args.split}/{k}": v for k, v in numbers.items()}, indent=2))


if __name__ == "__main__":
    main()
