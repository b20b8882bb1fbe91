"""`python -m knep.cli`."""

import sys

if not getattr(sys.flags, "safe_path", False):
    sys.path[:1] = []  # `python -m` would look for modules in the current folder first

if __name__ == "__main__":  # and not in a trial's process, which imports what the command's file has
    from knep.cli.main import main

    main()
