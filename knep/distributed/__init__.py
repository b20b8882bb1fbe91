"""Processes that train together: how they are started, and how one that dies is noticed."""
