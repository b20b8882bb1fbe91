"""Several stages, one after another: what `augment=[flip,erase]` builds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from knep.config.stages import as_option, refuse_stages
from knep.errors import InputError

__all__ = ["Stages"]


def sizes_of(augment: nn.Module, whole: int) -> list[int]:
    """Sides other than `whole` that an augmentation gives training images; none where it does not say."""
    said: Any = getattr(augment, "sizes", None)
    return [] if said is None else said(whole)


class Stages(nn.Module):
    """Each stage acts on what the one before it leaves; in eval mode all are the identity.

    stages: by the names of their options; order: of these names, by default as they are given. Raises InputError for an
    order that no augmentation has, or that leaves a stage out.
    """

    def __init__(self, *, order: Sequence[str] = (), **stages: nn.Module) -> None:
        super().__init__()
        names = list(order) or list(stages)
        refuse_stages(names)
        if set(names) != set(stages):
            raise InputError(f"order={as_option(names)} names other stages than {as_option(stages)}: name each once")
        self.stages = nn.ModuleDict({name: stages[name] for name in names})
        self._epoch = 0

    @property
    def mixes(self) -> bool:
        """Whether one of them mixes images."""
        return any(getattr(stage, "mixes", False) for stage in self.stages.values())

    @property
    def repeats(self) -> bool:
        """Whether one of them exchanges rows of the batch."""
        return any(getattr(stage, "repeats", False) for stage in self.stages.values())

    def sizes(self, whole: int) -> list[int]:
        """Sides other than `whole` that training images of this side are given by one stage or another."""
        return sorted({side for stage in self.stages.values() for side in sizes_of(stage, whole)})

    @property
    def epoch(self) -> int:
        """Set by whoever trains, before each epoch, for all stages."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        for stage in self.stages.values():
            stage.epoch = epoch  # type: ignore[assignment]

    def forward(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        for stage in self.stages.values():
            x, y = stage(x, y, num_classes)
        return x, y
