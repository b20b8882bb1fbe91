"""`python -m knep.cli`."""

from knep.cli.main import main

main()
