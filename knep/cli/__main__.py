"""`python -m knep.cli`."""

import sys

if not getattr(sys.flags, "safe_path", False):
    sys.path[:1] = []  # `python -m` would look for modules in the current folder first

from knep.cli.main import main

main()
