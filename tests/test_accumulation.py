"""A step of several micro-batches is the mean over all their images, in every loop, also where a window is short."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import knep
from knep.config.schema import DataSpec, RunConfig
from knep.data.loaders import order_of
from knep.engine.build import build_module
from knep.engine.fit import fit_member
from knep.engine.loops.accumulation import Window
from knep.ensemble import members_of
from knep.ensemble.loop import fit
from knep.errors import InputError
from tests.exhaustive.members_exact import composed, data_of

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
         "enable_model_summary": False}  # fmt: skip
x, y = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def stepped(*windows):
    """The weights after a step of SGD with clipping at 0.5 and rate 1 on each of these ranges of images."""
    model = net()
    for start, stop in windows:
        model.zero_grad()
        F.cross_entropy(model(x[start:stop]), y[start:stop]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
    return model[1].weight


class Sizes(IterableDataset):
    """Batches of these sizes, without a length."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __iter__(self):
        return iter(zip(x.split(self.sizes), y.split(self.sizes), strict=True))


class Own(L.LightningModule):
    """Another project's module, which knows nothing of windows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def configure_gradient_clipping(self, *_, **__):
        nn.utils.clip_grad_norm_(self.parameters(), 0.5)


# loader, micro-batches of a full window, the windows' images, what else limits the Trainer
LOADERS = {
    "a short last window": (lambda: DataLoader(TensorDataset(x, y), 2), 4, [(0, 8), (8, 12)], {}),
    "a short last batch": (lambda: DataLoader(TensorDataset(x, y), 5), 2, [(0, 10), (10, 12)], {}),
    "one window, unequal batches": (lambda: DataLoader(TensorDataset(x, y), 5), 9, [(0, 12)], {}),
    "no length": (lambda: DataLoader(Sizes(3, 1, 4, 2, 2), None), 3, [(0, 8), (8, 12)], {}),
    "limit": (lambda: DataLoader(TensorDataset(x, y), 2), 4, [(0, 8), (8, 10)], {"limit_train_batches": 5}),
    "steps": (lambda: DataLoader(TensorDataset(x, y), 2), 4, [(0, 8), (8, 12), (0, 8)],
              {"max_epochs": 5, "max_steps": 3}),
}  # fmt: skip


@pytest.mark.parametrize("own", [False, True], ids=["knep's module", "one's own module"])
@pytest.mark.parametrize("name", LOADERS)
def test_any_loader_in_lightnings_loop(name, own, tmp_path):
    make, window, ranges, limits = LOADERS[name]
    lines = ["optimizer=sgd", "optimizer.lr=1", "optimizer.weight_decay=0", "clip=norm", "clip.theta=0.5"]
    recipe = knep.load("none", [*lines, f"accumulate={window}"])
    model = net()
    module = Own(model) if own else knep.LitModule(model, recipe, num_classes=3)
    made = knep.callbacks(recipe, model="model") if own else []
    options = {"max_epochs": 1, **limits, **QUIET, "default_root_dir": tmp_path, "callbacks": made}
    L.Trainer(**options).fit(module, make())
    torch.testing.assert_close(model[1].weight, stepped(*ranges), rtol=0, atol=1e-6)


def recomputed(cfg, data, window):
    """The weights after an epoch of plain SGD with an l2 penalty, window by window, from the whole window at once."""
    module = build_module(RunConfig.of(cfg), DataSpec.of(data), data, seed=cfg["seed"]).double()
    images, labels = data._splits["train"]
    order = order_of(len(images), cfg["seed"], 0)[: len(images) // 10 * 10]
    for part in order.split(10 * window):
        module.zero_grad()
        total = F.cross_entropy(module(images[part].double()), labels[part])
        (total + module.recipe.regularization.penalty(module.step.decayed)).backward()
        with torch.no_grad():
            for p in module.model.parameters():
                p -= 0.1 * p.grad
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


@pytest.mark.parametrize("loop", ["lean", "lightning", "in turn", "in one pass"])
def test_kneps_own_loops(loop, tmp_path):
    lines = ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=0", "regularization=l2", "accumulate=4",
             "trainer.max_epochs=1", f"lean={str(loop == 'lean').lower()}"]  # fmt: skip
    cfg, data = composed("mlp", *lines), data_of("mlp")
    want = recomputed(cfg, data, 4)
    if loop in ("lean", "lightning"):
        modules = [fit_member(RunConfig.of(cfg), data, tmp_path, 0).module]
    else:
        modules = [m.module for m in fit(members_of(RunConfig.of(cfg), 2), data, loop == "in one pass")]
    found = torch.cat([p.detach().flatten() for p in modules[0].model.parameters()])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)


class _Processes:
    """What one of several processes sees of the others, which have so many more images in a window."""

    def __init__(self, others):
        self.others = others

    def broadcast(self, value):
        return value

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        return tensor + self.others


def test_processes_with_unequal_batches_take_the_mean_over_all_images():
    """DDP takes the mean over the processes: its weights and the scale make it that over their images."""
    trainer = SimpleNamespace(
        strategy=_Processes(9), world_size=2, accumulate_grad_batches=2, train_dataloader=DataLoader(TensorDataset(x))
    )
    window = Window(trainer)
    for batch_idx, images in enumerate((4, 1)):
        window.add(images, batch_idx)
    scale = float(window.scale(torch.device("cpu")))
    of_an_image = window.weight(4) / 4 / 2 / 2 * scale  # its share of the batch, of the window, of the processes
    assert of_an_image == pytest.approx(1 / (4 + 1 + 9))


def test_a_schedule_without_a_length_is_refused(tmp_path):
    recipe = knep.load("none", ["scheduler=cosine"])
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(InputError, match="limit_train_batches=N"):
        trainer.fit(knep.LitModule(net(), recipe, num_classes=3), DataLoader(Sizes(6, 6), None))
