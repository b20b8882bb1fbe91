"""All attacks, by name."""

from .checkpoints import ATTACKS as CHECKPOINTS
from .configs import ATTACKS as CONFIGS

ATTACKS = CHECKPOINTS | CONFIGS
