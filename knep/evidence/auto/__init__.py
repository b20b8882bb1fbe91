"""`recipe=auto`: a recipe looked for on one's own model and data, within a budget, and proved on fresh seeds."""
