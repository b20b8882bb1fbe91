"""Checks that need no training, for any task, batch and loss: each names one mistake from a probe that shows it."""
