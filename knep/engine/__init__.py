"""Training a model by a recipe: the module, its loops, its callbacks and checkpoints."""
