"""Runs that have ended: reads their curves from the files they left, and says what those can tell."""
