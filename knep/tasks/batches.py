"""How a batch of anybody's is read: where input and target lie, and the same batch with others in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from knep.errors import InputError

Batch = Any  # as the loader of a stranger gives it
_INPUTS = ("x", "image", "images", "img", "input", "inputs", "pixel_values", "input_ids", "data", "features")
_TARGETS = ("y", "label", "labels", "target", "targets", "mask", "masks", "class")


class Reading:
    """Finds input and target in a batch: a tensor, a tuple or list (x, y, ...), or a mapping.

    keys: the two keys or positions, where they are none of the usual; or a function batch -> (x, target).
    """

    def __init__(self, keys: Sequence[str | int] | Callable[[Batch], tuple[Any, Any]] | None = None) -> None:
        if keys is not None and not callable(keys) and (isinstance(keys, str) or len(keys) != 2):
            raise InputError(f"batch={keys!r} must be the two keys of input and target, or a function of a batch")
        self._keys = keys

    def split(self, batch: Batch) -> tuple[Any, Any]:
        """Input and target; None for a target that the batch has not. Raises InputError where they are not found."""
        if callable(self._keys):
            return self._keys(batch)
        first, second = self._places(batch)
        first, second = _place(batch, first), _place(batch, second)
        return (batch if first is None else batch[first]), (None if second is None else batch[second])

    def joined(self, batch: Batch, x: Any, target: Any) -> Batch:
        """The same batch with this input and target in their places."""
        if callable(self._keys):
            raise InputError("batch=<a function> cannot put an augmented input back: give the two keys instead")
        first, second = self._places(batch)
        if first is None:
            return x
        first, second = _place(batch, first), _place(batch, second)
        new = {first: x} if second is None else {first: x, second: target}
        if isinstance(batch, Mapping):
            changed = dict(batch) | new
            return changed if type(batch) is dict else _alike(batch, changed)
        items = [new.get(place, item) for place, item in enumerate(batch)]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)

    def _places(self, batch: Batch) -> tuple[Any, Any]:
        if self._keys is not None and not callable(self._keys):
            for key in self._keys:
                if not _has(batch, key):
                    raise InputError(f"batch={list(self._keys)}: a batch has no {key!r}, it has {_said(batch)}")
            return self._keys[0], self._keys[1]
        if isinstance(batch, Tensor):
            return None, None
        if isinstance(batch, Mapping):
            x = next((key for key in _INPUTS if key in batch), None)
            if x is not None:
                return x, next((key for key in _TARGETS if key in batch), None)
        elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
            return 0, 1 if len(batch) > 1 else None
        raise InputError(
            f"the input is not found in a batch of {_said(batch)}: {_naming(batch)}load the recipe with scaling=none "
            "and augment=none"
        )


def _place(batch: Batch, key: str | int | None) -> Any:
    """Where a key lies: of a namedtuple's field its position."""
    named = isinstance(key, str) and isinstance(batch, tuple) and hasattr(batch, "_fields")
    return batch._fields.index(key) if named else key  # type: ignore[attr-defined]


def _has(batch: Batch, key: str | int) -> bool:
    if isinstance(batch, Mapping):
        return key in batch
    if isinstance(key, str):
        return key in getattr(batch, "_fields", ())
    return isinstance(key, int) and isinstance(batch, (tuple, list)) and -len(batch) <= key < len(batch)


def _alike(batch: Mapping[str, Any], changed: dict[str, Any]) -> Mapping[str, Any]:
    """A mapping of the kind of `batch`, such as Hugging Face's BatchEncoding."""
    new = type(batch)()
    new.update(changed)  # type: ignore[attr-defined]
    return new


def _naming(batch: Batch) -> str:
    """How the input could be named, in the middle of a line; "" where no part of the batch is a tensor."""
    if isinstance(batch, Mapping) and batch and all(isinstance(v, (tuple, list, Mapping)) for v in batch.values()):
        return f'name the batch to read, batch=lambda b: b["{next(iter(batch))}"], for scaling, or '
    if isinstance(batch, Mapping):
        return 'name it, batch=("key", "key of target"), or '
    if isinstance(batch, (tuple, list)):
        place = next((i for i, part in enumerate(batch) if isinstance(part, Tensor)), None)
        wanted = any(isinstance(part, Tensor) and part.is_floating_point() for part in batch)
        return "" if place is None or not wanted else f"name input and target, batch=({place}, ...), or "
    return "name it, batch=lambda batch: (batch.x, batch.y), for scaling, or " if hasattr(batch, "x") else ""


def _said(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return f"the keys {', '.join(map(str, batch)) or 'none'}"
    if not isinstance(batch, (tuple, list)):
        return type(batch).__name__
    if hasattr(batch, "_fields"):
        return f"the fields {', '.join(batch._fields)}"  # type: ignore[attr-defined]
    first = f", the first of which is a {type(batch[0]).__name__} and no tensor" if batch else ""
    return f"{len(batch)} parts{first}"
