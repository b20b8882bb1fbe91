"""The doctor: says why a network does not learn, prescribes overrides, and proves the cure."""
