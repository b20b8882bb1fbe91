"""Watching a training while it runs, in Lightning or in a loop of one's own."""
