"""`recipe=auto`: a recipe that is looked for on one's own model and data, within a budget, and proved on fresh seeds."""
