"""Evidence: which trick helps, by how much, at what cost; every number from runs that can be repeated."""
