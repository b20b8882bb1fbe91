"""The fast paths end where the ordinary ones end: same weights, same counters, same checkpoints, same log."""

import csv
import subprocess
import sys

import pytest
import torch

from knep.cli.train import main
from knep.config.schema import RunConfig

QUICK = ["trainer=cpu", "trainer.max_epochs=2", "data.limit=200", "data.batch_size=50", "progress=false", "threads=1"]

# What the loop handles itself: clipping, schedules by step and epoch, averaging, accumulation, a closure called twice.
RUNS = {
    "clip_and_cycle": ["clip=norm", "clip.theta=0.1", "scheduler=one_cycle", "averaging=ema"],
    "plateau": ["scheduler=plateau", "averaging=none"],
    "accumulation": ["accumulate=3", "scheduler=cosine"],
    "whole_epoch": ["optimizer=gd", "scheduler=none"],
    "twice": ["optimizer=sam", "clip=value", "regularization=max_norm"],
    "thrifty": ["trainer.max_steps=5", "log_every=2", "augment=mixup"],
}


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def same(a, b):
    """Equality of nested plain data with tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", RUNS)
def test_the_lean_loop_does_what_lightnings_loop_does(name, tmp_path):
    a, b = tmp_path / "lean", tmp_path / "lightning"
    for folder, lean in ((a, "true"), (b, "false")):
        main([*QUICK, *RUNS[name], f"lean={lean}", f"hydra.run.dir={folder}"])
    ours, theirs = last(a), last(b)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch"):
        assert same(ours[key], theirs[key]), key
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()


def test_hooks_of_callbacks_run_in_lightnings_order_and_may_log(tmp_path):
    from lightning.pytorch import Callback

    from knep.config.compose import compose_config
    from knep.config.instantiate import instantiate
    from knep.engine.fit import fit_member

    names = ["on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"]
    names += ["on_before_optimizer_step", "on_train_batch_end"]

    class Diary(Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append(round(float(trainer.callback_metrics["mine"]), 6))

    def hook(name):
        def call(self, trainer, pl_module, *args):
            self.seen.append((name, trainer.global_step))
            if name == "on_train_batch_end":
                pl_module.log("mine", float(args[2]), on_step=True, on_epoch=True, batch_size=1)

        return call

    for name in names:
        setattr(Diary, name, hook(name))
    diaries = []
    for lean in ("true", "false"):
        config = compose_config([*QUICK, "accumulate=2", f"lean={lean}"]).config
        data = instantiate(config["data"])
        data.prepare()
        diaries.append(Diary())
        fit_member(RunConfig.of(config), data, tmp_path / lean, seed=0, callbacks=[diaries[-1]])
    assert diaries[0].seen == diaries[1].seen
    assert {n for n, _ in (s for s in diaries[0].seen if isinstance(s, tuple))} == set(names)


def test_every_step_that_should_be_logged_is_logged_once(tmp_path):
    main([*QUICK, "log_every=2", "scheduler=one_cycle", f"hydra.run.dir={tmp_path}/run"])
    rows = [r for r in csv.DictReader((tmp_path / "run" / "metrics.csv").open()) if r["lr"]]
    assert [int(r["step"]) for r in rows] == list(range(0, 8, 2))
    assert len({r["lr"] for r in rows}) == len(rows)


def test_a_compiled_model_writes_an_ordinary_checkpoint(tmp_path):
    small = ["model=mlp", "model.widths=[8]", "trainer.max_epochs=1", "recipe=none", "optimizer.lr=0.01"]
    weights = {}
    for how in ("true", "false"):
        main([*QUICK, *small, "trainer.precision=32-true", f"compile={how}", f"hydra.run.dir={tmp_path}/{how}"])
        final = torch.load(tmp_path / how / "checkpoints" / "final.ckpt", weights_only=True)
        weights[how] = final["state_dict"]
    assert weights["true"].keys() == weights["false"].keys()
    assert all(torch.allclose(weights["true"][k], weights["false"][k], atol=1e-5) for k in weights["true"])


def test_an_unknown_way_to_compile_is_refused(capsys):
    with pytest.raises(SystemExit):
        main([*QUICK, "compile=fast"])
    assert "compile=fast is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "unwanted"),
    [
        (["knep.cli", "--help"], {"torch", "hydra", "omegaconf", "lightning"}),
        (["knep.cli.train", "--cfg", "job"], {"torch", "lightning", "sklearn", "matplotlib", "rich", "torchvision"}),
    ],
)
def test_a_command_imports_only_what_it_needs(command, unwanted):
    code = (
        "import runpy, sys\n"
        f"sys.argv = {command!r}\n"
        "try:\n    runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print('loaded:', *sorted({m.split('.')[0] for m in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("loaded: ")[2].split())
    assert not loaded & unwanted
