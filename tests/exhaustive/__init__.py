"""Tests that take minutes to hours: `pytest -m exhaustive` runs them whole, the suite beside takes slices of them."""
