"""Sick subjects of every task, each with a healthy twin, as people make them; fast small nets."""
