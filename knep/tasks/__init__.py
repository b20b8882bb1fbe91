"""What is learned: how a batch is split, the loss, and what is counted of it."""
