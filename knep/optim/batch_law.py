"""How a rate grows with the batch, by the kind of the update rule.

Linear where an update is proportional to the gradient (Goyal et al. 2017, sec. 2.1); by the square root where it is
scaled by the gradient's own size (Malladi et al. 2022, thm. 5.5; You et al. 2020, sec. 4 for LAMB).
"""

from collections.abc import Mapping
from typing import Any

from knep.errors import InputError
from knep.utils.batch_plan import plan_of
from knep.utils.validation import whole

_LINEAR = ("torch.optim.SGD", "knep.recipes.optimizer.sam", "knep.recipes.optimizer.shampoo")


def law(target: str) -> str:
    """ "linear" or "sqrt", of the rule that `_target_` names; shampoo has the gradient's length."""
    return "linear" if target in _LINEAR else "sqrt"


def exponent(target: str) -> float:
    """Of the batch, in what a rate is multiplied by."""
    return 1.0 if law(target) == "linear" else 0.5


def factor(target: str, batch: int, per: int) -> float:
    """What a rate for batches of `per` rows is multiplied by for batches of `batch` rows."""
    return (batch / per) ** exponent(target)


def is_rate(key: str, value: object) -> bool:
    """Whether a value of an optimizer's node is a learning rate: `lr`, or a second one such as Muon's `adamw_lr`."""
    named = key == "lr" or key.endswith("_lr")
    return named and isinstance(value, (int, float)) and not isinstance(value, bool)


def scaled(node: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's node without `lr_per`, its rates scaled where that is a number; config: with data and accumulate.

    Raises InputError where nobody knows the batch, or a step takes a whole epoch.
    """
    kept = {key: value for key, value in node.items() if key != "lr_per"}
    per = node.get("lr_per")
    if per is None:
        return kept
    whole("optimizer.lr_per", per, 1)
    size, accumulate = (config.get("data") or {}).get("batch_size"), node.get("accumulate", config.get("accumulate", 1))
    if isinstance(accumulate, Mapping):  # the rate of the first batches, which then follows theirs
        accumulate = plan_of(accumulate)[0]
    if not isinstance(size, int) or not isinstance(accumulate, int):
        raise InputError(
            f"optimizer.lr_per={per} scales the rate with data.batch_size x accumulate, which this recipe does not "
            "know: leave it out, and write optimizer.lr=... for your own batch"
        )
    times = factor(str(node["_target_"]), size * accumulate, per)
    return {key: value * times if is_rate(key, value) else value for key, value in kept.items()}
