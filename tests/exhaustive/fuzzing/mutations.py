"""Other values for one field of plain data with tensors in it: every type, shape, count and path that may be there."""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]
SECRET = "../outside/secret"


@dataclass(frozen=True)
class Mutation:
    """field: dotted; how: in words; legal: whether the value could be that of another run, so that none can tell."""

    field: str
    how: str
    legal: bool


def fields(node: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of every value of a tree, its containers among them."""
    held = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in held:
        yield (*path, key)
        yield from fields(value, (*path, key))


def get(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Path, value: Any) -> Any:
    """The tree with another value at a path; tuples on the way are made anew."""
    if not path:
        return value
    key, *rest = path
    below = put(tree[key], tuple(rest), value)
    if isinstance(tree, tuple):
        return (*tree[:key], below, *tree[key + 1 :])
    tree[key] = below
    return tree


def mutate(tree: Any, draw: random.Random, within: Sequence[Path] | None = None) -> Mutation:
    """Changes one field of `tree` in place, and says how; within: the paths that may be taken."""
    path = draw.choice(within or list(fields(tree)))
    value, parent = get(tree, path), get(tree, path[:-1])
    field = ".".join(map(str, path))
    if draw.random() < 0.2 and isinstance(parent, (dict, list)):
        how = draw.choice(_PLACES)
        return Mutation(field, how(parent, path[-1], draw), False)
    made, how, legal = _other(value, draw, tree)
    put(tree, path, made)
    return Mutation(field, how, legal)


def _remove(parent: Any, key: Any, draw: random.Random) -> str:
    del parent[key]
    return "removed"


def _add(parent: Any, key: Any, draw: random.Random) -> str:
    if isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    else:
        parent[draw.choice(("more", 7, None, "step", "__class__", "a\nb"))] = _strange(draw)
    return "one more beside it"


def _rename(parent: Any, key: Any, draw: random.Random) -> str:
    if isinstance(parent, list):
        parent.reverse()
        return "in reverse"
    parent[draw.choice((f"{key}x", f" {key}", 0, None, (1, 2)))] = parent.pop(key)
    return "under another name"


def _swap(parent: Any, key: Any, draw: random.Random) -> str:
    other = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = parent[other], parent[key]
    return f"exchanged with {other}"


_PLACES: tuple[Callable[[Any, Any, random.Random], str], ...] = (_remove, _remove, _add, _rename, _swap)


def _deep(depth: int) -> list[Any]:
    node: list[Any] = []
    for _ in range(depth):
        node = [node]
    return node


def _strange(draw: random.Random) -> Any:
    """A value that belongs nowhere."""
    shared = torch.zeros(4)
    numbers = (0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.5, 1e308, math.nan, math.inf, -math.inf)
    words = (None, True, False, "", "x", SECRET, "/etc/passwd", "a\0b", "a\nb", "${oc.env:HOME}", b"\xff")
    trees = ([], {}, (), _deep(40), {"a": {"b": [1]}}, [None], {1: 2}, {None: 1}, OrderedDict(a=1), {1, 2})
    tensors = (torch.zeros(3), torch.zeros(()), torch.zeros(0), torch.ones(2, dtype=torch.int64), [shared, shared])
    odd = (torch.zeros(1).expand(5), torch.zeros(2, dtype=torch.complex64), torch.tensor(math.nan), torch.float64)
    return draw.choice((*numbers, *words, *trees, *tensors, *odd))


def _other(value: Any, draw: random.Random, tree: Any) -> tuple[Any, str, bool]:
    """Another value for `value`, in words, and whether a run could have had it."""
    if draw.random() < 0.35:
        made = _strange(draw)
        return made, f"{_told(value)} -> {_told(made)}", isinstance(value, float) and _finite(made)
    if isinstance(value, Tensor):
        return _tensor(value, draw, tree)
    if isinstance(value, bool):
        return not value, f"{value} -> {not value}", False
    if isinstance(value, int):
        made = draw.choice(
            (value + 1, value - 1, -value - 1, value * 2 + 3, value + 10**6, 2**62, float(value), str(value))
        )
        return made, f"{value} -> {_told(made)}", False
    if isinstance(value, float):
        made = draw.choice(
            (
                value * 1.5 + 0.1,
                -value - 0.1,
                value / 3,
                math.nan,
                math.inf,
                1e300,
                int(value) if math.isfinite(value) else 0,
            )
        )
        return made, f"{value} -> {_told(made)}", _finite(made)
    if isinstance(value, str):
        made = draw.choice(
            (f"../{value}", f"/tmp/{value}", f"{value}\n", f"{value}\0", value.upper(), value[::-1], SECRET)
        )
        return made, f"{value!r:.60} -> {made!r:.60}", False
    if isinstance(value, (list, tuple)):
        made = draw.choice((list(value)[:-1], [*value, *value], dict(enumerate(value)), value[0] if value else None))
        return made, f"a list of {len(value)} -> {_told(made)}", False
    if isinstance(value, dict):
        twice = {**value, **{f"{k}_": v for k, v in value.items()}}
        made = draw.choice(({}, list(value.items()), dict.fromkeys(value), twice))
        return made, f"a dict of {len(value)} -> {_told(made)}", False
    made = _strange(draw)
    return made, f"{_told(value)} -> {_told(made)}", False


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _tensor(t: Tensor, draw: random.Random, tree: Any) -> tuple[Any, str, bool]:
    others = [v for path in fields(tree) if isinstance(v := get(tree, path), Tensor) and v.shape == t.shape]
    numbers = t.clone().double() if t.is_floating_point() else t.clone()
    ways: dict[str, tuple[Callable[[], Any], bool]] = {
        "flat": (lambda: t.flatten(), t.dim() == 1),
        "one number short": (lambda: t.flatten()[1:], False),
        "one dimension more": (lambda: t[None], False),
        "turned": (
            lambda: t.transpose(0, -1) if t.dim() > 1 else t.repeat(2),
            t.dim() > 1 and t.transpose(0, -1).shape == t.shape,
        ),
        "laid out otherwise": (lambda: t.mT.contiguous().mT if t.dim() > 1 else t.clone(), True),
        "one number expanded": (lambda: t.flatten()[:1].sum().expand(t.shape), t.is_floating_point()),
        "part of a larger one": (lambda: torch.cat([t.flatten(), t.flatten()])[: t.numel()].view(t.shape), True),
        "in the memory of another": (lambda: draw.choice(others), True),
        "of float64": (lambda: t.double(), t.is_floating_point()),
        "of float16": (lambda: t.half(), t.is_floating_point()),
        "of int64": (lambda: t.nan_to_num().long() if t.is_floating_point() else t.float(), False),
        "of bool": (lambda: t.bool(), False),
        "of complex64": (lambda: t.to(torch.complex64), False),
        "all NaN": (lambda: torch.full_like(t, math.nan) if t.is_floating_point() else t + 1, False),
        "one infinite": (lambda: _with_one(t, math.inf), False),
        "negative": (lambda: -numbers.to(t.dtype) - 1, t.is_floating_point()),
        "other numbers": (lambda: (numbers * 1.5 + 0.01).to(t.dtype), t.is_floating_point()),
        "with a gradient": (lambda: t.clone().requires_grad_(t.is_floating_point()), True),
        "its list": (lambda: t.tolist(), False),
    }
    how = draw.choice(list(ways))
    make, legal = ways[how]
    return make(), f"{_told(t)} -> {how}", legal


def _with_one(t: Tensor, value: float) -> Tensor:
    made = t.clone(memory_format=torch.contiguous_format)
    if made.numel() and made.is_floating_point():
        made.view(-1)[0] = value
        return made
    return made - 1


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.40}" if not isinstance(value, int) or abs(value) < 2**64 else "a huge int"
