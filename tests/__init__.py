"""Tests of knep, and what they share."""
