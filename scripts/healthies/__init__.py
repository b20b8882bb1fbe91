"""Networks that are thought to be sound."""
