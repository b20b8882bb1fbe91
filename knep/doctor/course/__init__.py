"""A short training of any task, beside baselines and beside the same training under a remedy."""
