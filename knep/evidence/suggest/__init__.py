"""What to try on a problem that nobody has measured: the ledger's effects, carried over by features that cost a step."""
