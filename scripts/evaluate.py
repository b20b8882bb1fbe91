"""Tests a finished run: the same as `knep evaluate RUN`."""

import sys

from knep.cli.main import main as knep


def main() -> None:
    knep(["evaluate", *sys.argv[1:]])


if __name__ == "__main__":
    main()
