"""knep: training tricks as recipes, for any `nn.Module`, each one Hydra override and backed by a measured number."""

__version__ = "0.1.0"
