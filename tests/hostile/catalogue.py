"""All attacks, by name."""

from .arrays import ATTACKS as ARRAYS
from .checkpoints import ATTACKS as CHECKPOINTS
from .configs import ATTACKS as CONFIGS
from .folders import ATTACKS as FOLDERS
from .pictures import ATTACKS as PICTURES

ATTACKS = CHECKPOINTS | CONFIGS | FOLDERS | ARRAYS | PICTURES
