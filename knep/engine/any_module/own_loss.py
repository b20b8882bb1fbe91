"""The loss that a module computes itself, as far as it can be seen: what its labels could be smoothed in."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

# Nodes of autograd by how their names begin -> the function whose they are; of a loss on classes first.
_CLASSES = {
    "NllLoss": "F.cross_entropy",
    "CrossEntropyLoss": "F.cross_entropy",
    "BinaryCrossEntropyWithLogits": "F.binary_cross_entropy_with_logits",
    "BinaryCrossEntropy": "F.binary_cross_entropy",
}
_NUMBERS = {"MseLoss": "F.mse_loss", "L1Loss": "F.l1_loss", "SmoothL1Loss": "F.smooth_l1_loss", "Huber": "F.huber_loss"}
_NODES = 400  # of a loss's graph that are looked at: it lies before the network's


def loss_functions(loss: Tensor) -> list[str]:
    """The functions of torch.nn.functional that a loss was computed by, those nearest to it first."""
    found: dict[str, None] = {}
    for node in _nodes(loss):
        known = {**_CLASSES, **_NUMBERS}
        found |= {function: None for begin, function in known.items() if node.startswith(f"{begin}Backward")}
        found |= {"F.cross_entropy": None} if node.startswith("NllLoss2D") else {}
    return list(found)


def _nodes(loss: Tensor) -> Iterator[str]:
    todo, seen = [loss.grad_fn], set()
    while todo and len(seen) < _NODES:
        node = todo.pop(0)
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name()
            todo += [before for before, _ in node.next_functions]


def smoothing_line(module: nn.Module, net: nn.Module | None, functions: list[str], epsilon: float) -> str:
    """What to write where label smoothing is asked for and no smoothed loss was taken; functions: `loss_functions`."""
    own = {name: m for name, m in module.named_modules() if name and _is_loss(m)}
    smoothed = [f"{name}.label_smoothing={m.label_smoothing:g}" for name, m in own.items() if _smooths(m)]
    leave = "load the recipe with regularization=none"
    if smoothed:
        return f"{smoothed[0]} smooths already: {leave}, or write knep.smoothed(..., {epsilon:g}) around it"
    classes = [f for f in functions if f in _CLASSES.values()]
    if functions and not classes:
        return f"{functions[0]} is a loss of numbers, and only labels are smoothed: {leave}"
    if classes and hasattr(net, "loss_function"):  # Hugging Face's
        return (
            f"write loss = knep.smoothed({classes[0]}, {epsilon:g})(output.logits, labels) in place of output.loss, or "
            f"{leave}"
        )
    if own:
        return f"write knep.smoothed(self.{next(iter(own))}, {epsilon:g})(output, labels) in training_step, or {leave}"
    what = classes[0] if classes else "your_loss"
    return f"write loss = knep.smoothed({what}, {epsilon:g}) there and take it in training_step, or {leave}"


def _is_loss(module: nn.Module) -> bool:
    return isinstance(module, _Loss) or type(module).__name__.lower().endswith(("loss", "crossentropy"))


def _smooths(module: nn.Module) -> bool:
    value = getattr(module, "label_smoothing", 0.0)
    return isinstance(value, float) and value > 0
