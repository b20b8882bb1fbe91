"""What is examined: model, loss, optimizer and batches, without a trace left on them."""
