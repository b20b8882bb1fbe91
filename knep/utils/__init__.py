"""Validation, random numbers, hardware, memory and text."""
