"""What is wrong with a network at its first steps: signals, gradients, norms, outputs."""
