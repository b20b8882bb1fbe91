"""The commands: train, and all that `knep` can be told."""
