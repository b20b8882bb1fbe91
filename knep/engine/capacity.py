"""Weighing a model against its data before a step is run."""

# A model with this many parameters per training image can memorise them; see Zhang et al. 2017.
_MANY = 100


def capacity(parameters: int, images: int) -> str:
    """One line that weighs the model against its data, with a warning where it can memorise them."""
    ratio = parameters / images
    line = f"capacity: {parameters:,} parameters for {images:,} training images ({ratio:,.1f} per image)"
    if ratio > _MANY:
        line += "; warning: enough to memorise them, so expect overfitting without augment, dropout or stopping"
    return line
