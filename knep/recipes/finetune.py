"""`finetune`: which of the loaded weights are trained when, and at what rate. `f(layers, **hp) -> Strategy`.

layers: names of the parameters, the backbone's with their block (`knep.optim.thawing.layers_of`). A strategy is a
function of names and epochs alone; `knep.optim.thawing.Tuning` carries it out, and `knep plan` shows it.

epochs: whole, 0-based from the run's start; head_lr: rate of the head, in (0, inf), None for the optimizer's lr;
freeze_norm: batch norms of what is loaded keep their statistics to the end; without it they do so while they are
frozen; freeze: patterns of names (fnmatch), of a parameter or of a module around it, which are never trained.
Every function raises InputError for values outside its range, and for a pattern that matches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from knep.errors import InputError
from knep.optim.thawing import Layers, Strategy
from knep.utils.validation import check, whole

__all__ = ["full", "gradual", "head", "layerwise", "none"]


def none(layers: Layers) -> Strategy:
    """All weights from the first step, at one rate."""
    return Strategy(_from(layers, {}), head=layers.head)


def full(
    layers: Layers,
    *,
    epochs: int = 0,
    head_lr: float | None = None,
    freeze_norm: bool = False,
    freeze: Sequence[str] = (),
) -> Strategy:
    """All weights, after `epochs` of the head alone, whose first gradients would otherwise shake what is loaded.

    epochs: of the head alone, from 0 on. Kumar et al. 2022 ("LP-FT") show why the head comes first.
    """
    whole("epochs", epochs, 0)
    thaws = _from(layers, dict.fromkeys(layers.blocks, epochs))
    return _made(layers, thaws, freeze, head_lr=head_lr, freeze_norm=freeze_norm)


def head(layers: Layers, *, freeze: Sequence[str] = ()) -> Strategy:
    """The head alone: the rest stays what was loaded, its norms' statistics too (Yosinski et al. 2014)."""
    thaws = _from(layers, dict.fromkeys(layers.blocks))
    return _made(layers, thaws, freeze, freeze_norm=True)


def gradual(
    layers: Layers,
    *,
    epochs: int = 1,
    stages: int = 4,
    head_lr: float | None = None,
    freeze_norm: bool = False,
    freeze: Sequence[str] = (),
) -> Strategy:
    """The head alone, then one more stage from the top every `epochs` (Howard and Ruder 2018, ULMFiT, section 3.3).

    Of n blocks, block b (0 at the input) is in stage s = floor((n - 1 - b) S / n) from the top, and is trained from
    epoch (s + 1) * epochs on.

    epochs: between two stages, from 1 on; stages: S, as many or fewer than there are blocks, from 1 on.
    """
    whole("epochs", epochs, 1)
    whole("stages", stages, 1)
    count = _count(layers)
    parts = min(stages, count)
    thaws = {name: ((count - 1 - block) * parts // count + 1) * epochs for name, block in layers.blocks.items()}
    return _made(layers, _from(layers, thaws), freeze, head_lr=head_lr, freeze_norm=freeze_norm)


def layerwise(
    layers: Layers,
    *,
    layer_decay: float = 0.75,
    epochs: int = 0,
    head_lr: float | None = None,
    freeze_norm: bool = False,
    freeze: Sequence[str] = (),
) -> Strategy:
    """Rates that fall towards the input: block b of n has lr * d ** (n - b), and the head lr itself.

    d = 0.65 to 0.75 is what vision transformers are tuned with (Clark et al. 2020, Bao et al. 2021, timm), 1 / 2.6 what
    ULMFiT takes for a net of three layers (Howard and Ruder 2018, section 3.2).

    layer_decay: d, in (0, 1]; epochs: of the head alone, from 0 on.
    """
    check("layer_decay", layer_decay, "(0, 1]")
    whole("epochs", epochs, 0)
    count = _count(layers)
    factors = {name: layer_decay ** (count - block) for name, block in layers.blocks.items()}
    thaws = _from(layers, dict.fromkeys(layers.blocks, epochs))
    return _made(layers, thaws, freeze, factors, head_lr, freeze_norm)


def _count(layers: Layers) -> int:
    return 1 + max(layers.blocks.values(), default=-1)


def _from(layers: Layers, backbone: Mapping[str, int | None]) -> dict[str, int | None]:
    """Epochs of all parameters: the head's is 0, and so is that of what `backbone` leaves out."""
    return {**dict.fromkeys((*layers.blocks, *layers.head), 0), **backbone}


def _made(
    layers: Layers,
    thaws: dict[str, int | None],
    freeze: Sequence[str],
    factors: Mapping[str, float] | None = None,
    head_lr: float | None = None,
    freeze_norm: bool = False,
) -> Strategy:
    if head_lr is not None:
        check("head_lr", head_lr, "(0, inf)")
    if not isinstance(freeze_norm, bool):
        raise InputError(f"freeze_norm must be true or false, got {freeze_norm}")
    for pattern in _patterns(freeze):
        matched = [name for name in thaws if _matches(name, pattern)]
        if not matched:
            near = get_close_matches(pattern, list(thaws), n=1, cutoff=0.0)
            raise InputError(
                f"freeze=[{pattern}] matches no parameter: write a name or pattern such as {near[0]}, or one of "
                f"{', '.join(_tops(thaws))}"
            )
        thaws |= dict.fromkeys(matched)
    if all(epoch is None for epoch in thaws.values()):
        raise InputError("freeze leaves nothing to train: leave a pattern out, such as that of the head")
    return Strategy(thaws, dict(factors or {}), head_lr, layers.head, freeze_norm)


def _patterns(freeze: Sequence[str]) -> list[str]:
    if isinstance(freeze, str) or not all(isinstance(pattern, str) for pattern in freeze):
        raise InputError(f"freeze is a list of patterns, got {freeze}: write freeze=[layer1*]")
    return list(freeze)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _tops(names: Mapping[str, object]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))[:8]
