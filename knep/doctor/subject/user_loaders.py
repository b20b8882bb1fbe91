"""Somebody else's loaders, as the data of a config: what builds a model and a recipe asks of a data set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from knep.doctor.subject.batches import Batch, Labelled, gathered, held_back, reshuffles
from knep.doctor.subject.rng_isolation import undisturbed
from knep.errors import InputError
from knep.models.user_model import accepted, build, find
from knep.surgery.check_forward import probe

_MOST = 600  # batches


def gives_images(path: str) -> bool:
    """Whether loaders of another project begin with (images (N, C, H, W), a class for each); of those that fail too,
    for `Loaders` to say why."""
    with undisturbed(0):
        try:
            made = find(path, key="--data")()
            batch = next(iter(made[0] if isinstance(made, tuple) and len(made) == 2 else made))
        except Exception:  # a builder of another project may raise anything
            return True
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(isinstance(t, Tensor) for t in batch[:2]):
        return False
    x, y = batch[:2]
    return x.ndim == 4 and (y.ndim == 1 or (y.ndim == 2 and not y.is_floating_point()))


class Loaders:
    """Training and validation batches (x, y) that a function of another project gives.

    path: "package.module:name" of what returns (train, val) loaders, or one, of which every tenth batch is then held
    back; model: path of what builds the net, whose outputs are the classes where its builder does not ask for their
    number, so that labels beyond them are seen. Raises InputError for anything else, for no batch at all, or batches
    that are no images with labels.
    """

    def __init__(self, path: str, model: str | None = None) -> None:
        with undisturbed(0):
            self._read(path, model)

    def _read(self, path: str, model: str | None) -> None:
        builder = find(path, key="--data")
        try:
            made = builder()
        except Exception as error:  # a builder of another project may raise anything
            text = " ".join(str(error).split())
            raise InputError(f"--data: {path}() failed: {type(error).__name__}: {text}") from error
        train, val = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not hasattr(train, "__iter__"):
            raise InputError(f"--data: {path}() gave a {type(train).__name__}: return (train_loader, val_loader)")
        read = gathered(train, most=_MOST)
        seen, self.form = read.batches, read.form
        if not seen:
            raise InputError(f"--data: the training loader of {path} gives no batch: check its data set and drop_last")
        held = gathered(val, most=64) if val is not None else Labelled([], self.form)
        if held.batches and held.form != self.form:
            raise InputError(f"--data: {path} gives labels in two forms: {self.form} and {held.form}")
        self._train, self._val = (seen, held.batches) if val is not None else held_back(seen)
        self.shuffled = reshuffles(train, seen)
        labels = torch.cat([y for _, y in seen])
        x = seen[0][0]
        if x.ndim != 4:
            raise InputError(
                f"--data: {path} gives inputs {tuple(x.shape)}, not images (N, C, H, W): examine others "
                "in Python, knep.doctor.examine(model, train, val, optimizer=optimizer)"
            )
        self.channels, (height, width) = x.shape[1], x.shape[2:]
        if height != width and model is None:
            raise InputError(
                f"--data: {path} gives images of {height} x {width}, and knep's models take square ones: give your own "
                "with --model package.module:name"
            )
        # Other than squares are for nets of one's own, which ask for no size.
        self.image_size: int = height if height == width else (height, width)  # pyright: ignore[reportAttributeAccessIssue]
        self.shape = None if height == width else (self.channels, height, width)
        known = max(2, int(labels.max()) + 1, self.form.columns or 0)
        self.num_classes = self._outputs(model, x, known) or known
        self.class_names = [str(k) for k in range(self.num_classes)]
        self.sizes = {"train": sum(len(y) for _, y in self._train), "val": sum(len(y) for _, y in self._val)}
        self.train_batches = len(self._train)
        self.seed = 0

    def _outputs(self, model: str | None, x: Tensor, known: int) -> int | None:
        """Scores of the net for an image, None where it takes the number from the labels or gives something else."""
        offered = {"num_classes": known, "in_channels": self.channels, "image_size": self.image_size}
        if model is None or "num_classes" in accepted(find(model), offered):
            return None
        with torch.random.fork_rng(devices=[]):
            scores = probe(build(model, offered), x.float())
        return scores.shape[1] if isinstance(scores, Tensor) and scores.ndim == 2 else None

    def train_dataloader(self) -> list[Batch]:
        return self._train

    def val_dataloader(self) -> list[Batch]:
        return self._val

    def train_targets(self) -> Iterator[Tensor]:
        """The targets of the same batches: for counts of classes."""
        return (y for _, y in self._train)

    def train_images(self) -> Iterator[Tensor]:
        """The training images in batches, as the loader gives them: for statistics."""
        return (x for x, _ in self._train)

    def sample(self, count: int) -> Tensor:
        """The first training images (count, C, H, W)."""
        return torch.cat([x for x, _ in self._train[:count]])[:count]
