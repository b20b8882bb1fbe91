"""Classes of images, with probabilities: `python scripts/predict.py outputs/<date>/<time>_<name> IMAGE...`."""

from __future__ import annotations

import argparse
from pathlib import Path

from knep.cli_errors import one_line
from knep.safe import allow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or one .ckpt file")
    parser.add_argument("images", type=Path, nargs="+", help="PNG, JPEG, WebP or GIF files")
    parser.add_argument("--top", type=int, default=3, help="classes to print for each image")
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE.", help="where its model comes from")
    args = parser.parse_args()
    with one_line():
        for name in args.allow:
            allow(name)
        from knep.predict import predict
        from knep.text import shown

        for path, ranked in predict(args.run, args.images, args.top):
            print(f"{shown(path)}  " + "  ".join(f"{shown(name)} {p:.1%}" for name, p in ranked))


if __name__ == "__main__":
    main()
