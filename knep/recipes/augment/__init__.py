"""`augment`: label-preserving noise on training batches. `nn.Module(x, y, num_classes) -> (x, y)`, on the device.

x: raw pixels (N, C, H, W), uint8 or float in 0..255, before scaling, so that what is filled in is black; y: int64 (N,).
Mixing options return probabilities (N, num_classes) for y. In eval mode all are the identity. Randomness comes from
torch's generator of x's device.

A target that is an image itself, (N, H, W) or (N, C, H, W) of x's own H and W, is moved and mirrored with x; `mixup`
acts on any (N, ...) that is not of tokens, and on float targets as on x. What does not fit is refused with InputError.

`augment=[flip,erase]` builds `stages.Stages`; which stages may stand together is said in `knep.config.stages`.
"""

from knep.recipes.augment.base import none
from knep.recipes.augment.color import ColorJitter
from knep.recipes.augment.crop import RandomResizedCrop
from knep.recipes.augment.erase import Erase
from knep.recipes.augment.geometry import Flip, Shift, ShiftFlip
from knep.recipes.augment.mixing import Cutmix, Mixup, MixupCutmix
from knep.recipes.augment.policies import AugMix, AutoAugment, RandAugment, ThreeAugment, Trivial
from knep.recipes.augment.repeats import Repeats
from knep.recipes.augment.resize import ProgressiveResize

__all__ = [
    "AugMix",
    "AutoAugment",
    "ColorJitter",
    "Cutmix",
    "Erase",
    "Flip",
    "Mixup",
    "MixupCutmix",
    "ProgressiveResize",
    "RandAugment",
    "RandomResizedCrop",
    "Repeats",
    "Shift",
    "ShiftFlip",
    "ThreeAugment",
    "Trivial",
    "none",
]
