"""The clinic's cases: what makes a run sick, the networks and data it is done to, and their healthy twins."""
