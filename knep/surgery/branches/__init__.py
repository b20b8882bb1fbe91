"""What an init puts into residual branches: scales, shifts, and the weights of transformer blocks by their role."""
