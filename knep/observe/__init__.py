"""What a forward and backward pass shows: statistics of layers and of updates."""
