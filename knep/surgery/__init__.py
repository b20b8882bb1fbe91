"""Finding and exchanging layers in anybody's `nn.Module`."""
