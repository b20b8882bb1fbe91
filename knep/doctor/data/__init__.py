"""What is wrong with inputs, labels and splits, before anything is trained."""
