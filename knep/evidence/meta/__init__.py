"""What is said of many cells of the ledger at once: corrected verdicts, pooled effects, seeds x images."""
