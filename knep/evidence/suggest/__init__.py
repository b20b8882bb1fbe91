"""What to try on a problem that nobody has measured: the ledger's effects, carried over by cheap features."""
