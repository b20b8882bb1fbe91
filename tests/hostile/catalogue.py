"""All attacks, by name."""

from .checkpoints import ATTACKS as CHECKPOINTS

ATTACKS = CHECKPOINTS
