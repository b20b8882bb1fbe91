"""Plain `nn.Module` image classifiers with places where the slots act."""
