"""data.micro: a batch in parts gives the step of the whole batch, or is refused with the reason."""

import pytest
import torch

from knep.config.compose import compose_config
from knep.data.loaders import Batches
from knep.engine.loops import micro_batches
from knep.engine.loops.micro_batches import bytes_per_row
from knep.errors import InputError, RunFailed
from knep.run.run import run

LINES = ["data=digits", "recipe=none", "model=mlp", "model.widths=[16]", "scaling=unit", "data.batch_size=96"]
LINES += ["trainer.max_epochs=2", "threads=1", "progress=false", "optimizer=momentum", "scheduler=cosine"]
LINES += ["trainer.precision=32-true"]  # bfloat16 rounds parts and whole batches apart


def trained(folder, *lines):
    made = compose_config([*LINES, *lines])
    summary = run(made.config, folder, made.choices, made.overrides, figures=False)
    state = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
    return summary, state


def test_parts_give_the_step_of_the_whole_batch(tmp_path):
    whole, weights = trained(tmp_path / "whole")
    parts, same = trained(tmp_path / "parts", "data.micro=32")
    assert parts["steps"] == whole["steps"] == 2 * (1295 // 96)
    for name, t in weights.items():
        assert torch.allclose(t, same[name], atol=1e-5), name
    assert parts["config_hash"] != whole["config_hash"]


def test_parts_are_accumulated_too(tmp_path):
    _, weights = trained(tmp_path / "whole", "data.batch_size=96", "accumulate=2")
    _, same = trained(tmp_path / "parts", "data.batch_size=96", "accumulate=2", "data.micro=48")
    for name, t in weights.items():
        assert torch.allclose(t, same[name], atol=1e-5), name


def test_an_epoch_leaves_out_the_same_rows():
    whole, parts = Batches(300, 128, seed=1, drop_last=True), Batches(300, 32, seed=1, drop_last=True, used=256)
    assert len(whole) == 2
    assert len(parts) == 8
    rows = [torch.cat([torch.from_numpy(index) for index, _ in batches]) for batches in (whole, parts)]
    assert torch.equal(*rows)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["data.micro=32", "norm=batch"], "normalises over the batch"),
        (["data.micro=36"], "write data.micro=32"),
        (["data.micro=0"], "must be auto, or a whole number"),
        (["data.micro=often"], "must be auto, or a whole number"),
        (["data.micro=32", "optimizer=gd"], "takes a step an epoch"),
        (["data.micro=32", "optimizer=sam"], "would see one part of the batch only"),
    ],
)
def test_what_would_not_be_the_whole_batch_is_refused(lines, said, tmp_path):
    with pytest.raises(InputError, match=said):
        trained(tmp_path / "run", *lines)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_auto_takes_what_there_is_room_for(tmp_path, monkeypatch):
    from knep.data.digits import Digits

    data = Digits(batch_size=64, micro="auto")
    data.prepare()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 10))

    class Module(torch.nn.Module):
        model = net

        def forward(self, x):
            return net(x.float())

    module = Module()
    each = bytes_per_row(module, data.sample(4))
    assert 4000 <= each <= 9000  # 1,000 float32 behind the activation, which one or two layers keep
    state = 4 * sum(p.numel() * 4 for p in net.parameters())
    for room, rows in ((64 * 2 * each, 64), (20 * 2 * each, 16), (1.5 * 2 * each, 1)):
        monkeypatch.setattr(micro_batches, "free_memory", lambda device, room=room: (room + state) / 0.8)
        assert micro_batches.rows_that_fit(data, module, torch.device("cpu")) == rows
    monkeypatch.setattr(micro_batches, "free_memory", lambda device: 0)
    with pytest.raises(InputError, match="a row takes about"):
        micro_batches.rows_that_fit(data, module, torch.device("cpu"))


def test_out_of_memory_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    from knep.engine.step import Step

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Step, "loss", full)
    with pytest.raises(RunFailed, match=r"out of memory in step 0, with 96 rows at once: write data\.micro=48"):
        trained(tmp_path / "run")


def test_what_members_would_not_read_is_no_single_pass():
    from knep.ensemble.support import supports

    for line, said in (("data.micro=32", "data.micro"), ("model.checkpointing=true", "model.checkpointing")):
        assert said in supports(compose_config([*LINES, line]).run)
    assert supports(compose_config(LINES).run) is None
