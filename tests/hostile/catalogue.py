"""All attacks, by name."""

from .arrays import ATTACKS as ARRAYS
from .checkpoints import ATTACKS as CHECKPOINTS
from .configs import ATTACKS as CONFIGS
from .pictures import ATTACKS as PICTURES

ATTACKS = CHECKPOINTS | CONFIGS | ARRAYS | PICTURES
