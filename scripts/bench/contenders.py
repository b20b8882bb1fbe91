"""Who trains the same network on the same data: knep, a hand-written loop, the usual Lightning set-up, timm's parts."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms

from knep.config.schema import DataSpec, RunConfig
from knep.engine.build import build_module
from knep.engine.fit import fit_member
from knep.engine.precision import precision
from knep.run.run import hush
from knep.utils.memory import keep_freed_memory
from scripts.bench.cases import Case, compose, read
from scripts.bench.watch import StopWatch, Timing, screen

Contender = Callable[[Case, Any], Timing]
_Batch = tuple[Tensor, Tensor]


def knep(case: Case, data: Any, lines: Sequence[str] = ()) -> Timing:
    """`Trainer.fit` as train.py calls it, with logs, checkpoints and the progress bar; lines: further overrides."""
    hush()
    config = compose(case, [f"trainer.max_steps={case.warm + case.steps}", *lines])
    watch = StopWatch(case.warm, case.steps)
    with tempfile.TemporaryDirectory() as folder, screen():
        fit_member(RunConfig.of(config), data, Path(folder), seed=0, callbacks=[watch])
    return _done(watch)


def hand(case: Case, data: Any) -> Timing:
    """A plain loop with knep's levers: batches by index, mixed precision, channels_last, fused Adam, sums on device,
    freed memory kept.
    """
    config = compose(case)
    if config["trainer"]["accelerator"] == "cpu":
        keep_freed_memory()
    module = build_module(RunConfig.of(config), DataSpec.of(data), data)
    net, scaling, optimizer = module.model.train(), module.scaling, module.recipe.optimizer(module.model)
    mixed = precision(config["trainer"]["precision"], "cpu") == "bf16-mixed"
    loss_sum, correct = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    watch = StopWatch(case.warm, case.steps)
    searched = os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # Lightning sets it; a script would not have it
    for _, (x, y) in zip(range(case.warm + case.steps), data.train_dataloader(), strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = net(scaling(x).to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            loss_sum += loss * len(x)
            correct += (logits.argmax(1) == y).sum()
        watch.tick()
    if searched is not None:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = searched
    return _done(watch)


def timm(case: Case, data: Any) -> Timing:
    """timm's optimizer factory, meters and accuracy in the loop of its training script, on knep's batches."""
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportMissingImports]
    from timm.utils import AverageMeter, accuracy  # pyright: ignore[reportMissingImports]

    config = compose(case)
    module = build_module(RunConfig.of(config), DataSpec.of(data), data)
    net = module.model.train()
    optimizer = create_optimizer_v2(net, opt="adam", lr=1e-3, weight_decay=0.0)
    losses, top1 = AverageMeter(), AverageMeter()
    watch = StopWatch(case.warm, case.steps)
    for _, (x, y) in zip(range(case.warm + case.steps), data.train_dataloader(), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(module.scaling(x).to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(x))
        top1.update(accuracy(logits.detach(), y)[0].item(), len(x))
        watch.tick()
    return _done(watch)


def fastai(case: Case, data: Any) -> Timing:
    """fastai's Learner with its Adam, accuracy and progress bar, in float32, on tensors of the same images."""
    from fastai.callback.core import (  # pyright: ignore[reportMissingImports]
        Callback,
        CancelFitException,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from fastai.data.all import DataLoader as FastaiLoader  # pyright: ignore[reportMissingImports]
    from fastai.data.all import DataLoaders  # pyright: ignore[reportMissingImports]
    from fastai.learner import Learner  # pyright: ignore[reportMissingImports]
    from fastai.metrics import accuracy  # pyright: ignore[reportMissingImports]
    from torch.utils.data import TensorDataset

    watch = StopWatch(case.warm, case.steps)

    class Stop(Callback):
        def after_batch(self) -> None:
            watch.tick()
            if watch.timing is not None:
                raise CancelFitException

    x, y = data._splits["train"]
    loader = FastaiLoader(TensorDataset(x.float() / 255, y), bs=case.batch, shuffle=True, drop_last=True)
    config = compose(case, ["channels_last=false"])
    net = build_module(RunConfig.of(config), DataSpec.of(data), data).model
    dls = DataLoaders(loader, loader, device=torch.device("cpu"))
    with screen():
        Learner(dls, net, loss_func=F.cross_entropy, metrics=accuracy, cbs=[Stop()]).fit(1, 1e-3)
    return _done(watch)


class _Pictures(Dataset[tuple[Any, int]]):
    """A data set as torchvision's: a PIL image each, transformed one by one."""

    def __init__(self, x_NCHW: Tensor, y_N: Tensor) -> None:
        self._x, self._y = x_NCHW.squeeze(1).numpy(), y_N.tolist()
        self._transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.0,), (1.0,))])

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._x[index])), self._y[index]


class Usual(L.LightningModule):
    """The module of the tutorials: loss and torchmetrics logged at each step, Adam."""

    def __init__(self, net: nn.Module, anneal: bool = False) -> None:
        super().__init__()
        self.net, self.anneal = net, anneal
        self.train_acc, self.test_acc = MulticlassAccuracy(10, average="micro"), MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: _Batch, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", self.train_acc, prog_bar=True)
        return loss

    def test_step(self, batch: _Batch, batch_idx: int) -> None:
        x, y = batch
        self.test_acc(self.net(x), y)
        self.log("test/acc", self.test_acc)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        if not self.anneal:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def usual_fit(case: Case, data: Any, seed: int = 0, anneal: bool = False, **limits: Any) -> tuple[Any, Usual]:
    """The usual set-up, fitted: fp32, NCHW, DataLoader with PIL transforms. Returns the trainer and the module."""
    hush()
    config = compose(case, ["channels_last=false", f"seed={seed}"])
    module = Usual(build_module(RunConfig.of(config), DataSpec.of(data), data, seed=seed).model, anneal)
    loader = DataLoader(_Pictures(*data._splits["train"]), case.batch, shuffle=True, drop_last=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **limits)
        trainer.fit(module, loader)
    return trainer, module


def usual(case: Case, data: Any) -> Timing:
    """What tutorials and templates of Lightning write, with logger, checkpoints and progress bar at their defaults."""
    watch = StopWatch(case.warm, case.steps)
    with screen():
        usual_fit(case, data, max_steps=case.warm + case.steps, callbacks=[watch])
    return _done(watch)


def usual_accuracy(case: Case, data: Any, seed: int, epochs: int) -> float:
    """Test accuracy of the usual set-up after `epochs`, the rate annealed by a cosine."""
    with screen():
        L.seed_everything(seed, verbose=False)
        trainer, module = usual_fit(case, data, seed, anneal=True, max_epochs=epochs)
        found = trainer.test(module, DataLoader(_Pictures(*data._splits["test"]), 500), verbose=False)
    return float(found[0]["test/acc"])


def _done(watch: StopWatch) -> Timing:
    if watch.timing is None:
        raise RuntimeError("the run ended before the steps that were to be measured: ask for fewer with --steps")
    return watch.timing


def contenders(peers: bool) -> dict[str, Contender]:
    """By name, in the order in which they take turns."""
    found: dict[str, Contender] = {"knep": knep, "hand": hand, "usual": usual}
    for name, run in (("timm", timm), ("fastai", fastai)):
        if peers and importlib.util.find_spec(name):
            found[name] = run
    return found


def prepared(case: Case) -> Any:
    """The data of a case, read once for all contenders."""
    return read(compose(case))
