"""Classes of images: the same as `knep predict RUN FOLDER|IMAGE...`."""

import sys

from knep.cli.main import main as knep


def main() -> None:
    knep(["predict", *sys.argv[1:]])


if __name__ == "__main__":
    main()
