"""Weights of residual branches and of transformer blocks, drawn by what they are for."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from knep.errors import InputError
from knep.surgery.branches.transformer import Block, block_weights, parts_of, role_of
from knep.surgery.edit import Change
from knep.surgery.residual import Branch
from knep.surgery.weights import Fans, Weight, assign, covered, fans, fill, rms

Draw = Callable[[Tensor, Fans], object]


def draw_blocks(
    model: nn.Module, blocks: list[Block], name: str, draw: Draw, factor: Callable[[Block], float]
) -> list[Change]:
    """Every covered weight by `draw`; of values, outputs and what follows in a block, times the block's factor.

    Queries and keys are drawn without it, the three matrices of a packed weight one by one.
    """
    changes = {c.path: c for c in fill(model, name, lambda layer, weight: draw(weight, fans(layer, weight)))}
    for weight, block in block_weights(model, blocks):
        value, role = weight.value.clone(), role_of(weight)
        transposed = type(weight.layer).__name__ == "Conv1D"
        _refuse_unequal(weight, role, transposed)
        for part_role, part in parts_of(value, role, transposed):
            drawn = torch.empty(part.shape, dtype=part.dtype, device=part.device)
            with torch.no_grad():
                draw(drawn, Fans(part.shape[1], part.shape[0]) if part.dim() == 2 else fans(weight.layer, part))
                part.copy_(drawn * (1.0 if part_role in ("query", "key") else factor(block)))
        assign(weight, value)
        was = changes[weight.name].before
        changes[weight.name] = Change(weight.name, was, f"{name}, {role or 'branch'}, rms {rms(value)}")
    return list(changes.values())


def _refuse_unequal(weight: Weight, role: str, transposed: bool) -> None:
    rows, columns = weight.value.shape[:2] if not transposed else reversed(weight.value.shape[:2])
    if role == "packed" and rows != 3 * columns:
        raise InputError(
            f"init cannot tell query, key and value apart in {weight.name}, {rows} x {columns} is no three squares: "
            "use init=glorot_uniform"
        )


def draw_embeddings(model: nn.Module, factor: float) -> list[Change]:
    """Every trained embedding from N(0, factor^2 / d), rows of padding 0; d: its width."""
    changes = []
    for path, table in model.named_modules():
        if not isinstance(table, (nn.Embedding, nn.EmbeddingBag)) or not table.weight.requires_grad:
            continue
        before = rms(table.weight.detach())
        with torch.no_grad():
            table.weight.normal_(0, factor * table.weight.shape[1] ** -0.5)
            if table.padding_idx is not None:
                table.weight[table.padding_idx] = 0
        after = f"N(0, {factor:.4g} / sqrt(d)), rms {rms(table.weight.detach())}"
        changes.append(Change(f"{path}.weight", f"rms {before}", after))
    return changes


def branch_weights(model: nn.Module, branches: list[Branch], order: Mapping[nn.Module, int]) -> list[list[Weight]]:
    """The weights of each branch that an init draws, in the order of their calls."""
    known: dict[nn.Module, Weight] = {w.layer: w for w in covered(model)}
    found = []
    for branch in branches:
        layers = {m for layer in branch.layers for m in layer.modules() if m in known}
        found.append([known[m] for m in sorted(layers, key=lambda m: order.get(m, 0))])
    return found
