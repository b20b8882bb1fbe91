"""Named places in a knep model, which a slot may fill."""

from torch import nn


class Place(nn.Identity):
    """A named place in a knep model where a slot may put a module; until then it passes its input through.

    kind: "norm", "norm_after" (behind the activation), "hidden" (behind an activation of a linear layer),
    "features" (behind a convolution stage, (N, C, H, W)), "head" (before the classifier) or "residual" (the end of a
    residual branch, before the addition).
    features: channels of the signal that passes, for the kinds that need it.
    depth: share of the network's residual blocks passed, in (0, 1], for kind "residual".
    """

    def __init__(self, kind: str, features: int = 0, depth: float = 1.0) -> None:
        super().__init__()
        self.kind = kind
        self.features = features
        self.depth = depth

    def extra_repr(self) -> str:
        return self.kind


class ZeroGain(Place):
    """A norm place at the end of a residual branch: the norm that fills it starts with gain 0, so that the block
    starts as the identity (Goyal et al. 2017, sec. 5.1).
    """
