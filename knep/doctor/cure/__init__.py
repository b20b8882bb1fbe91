"""Overrides that may help a sick training, tried in pairs until one is proved."""
