"""A black box repeats its step to the bit, says where it went wrong, stays small, and runs nothing of a stranger's."""

import json

import pytest
import torch
from torch import nn

from knep.cli.train import main
from knep.errors import InputError
from knep.io import checkpoint
from knep.observe.layer_table import watched
from knep.run.replay import replay
from tests.exhaustive import guard_matrix as matrix

# A learning rate at which the very first step of the optimizer overflows.
RUN = ["recipe=none", "trainer=cpu", "trainer.max_epochs=1", "model=cnn", "data.limit=150", "data.batch_size=15"]
RUN += ["optimizer=momentum", "optimizer.lr=3e38", "dropout=standard", "augment=shift", "progress=false", "threads=1"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that the guard stopped, and what was said."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(SystemExit) as said:
        main([*RUN, f"hydra.run.dir={folder}"])
    return folder, said.value


def test_the_command_repeats_the_step_and_shows_the_layers(stopped, capsys):
    folder, _ = stopped
    main([f"replay={folder}/blackbox.pt"])
    out = capsys.readouterr().out
    assert "the same step, to the bit" in out
    assert "first bad: " in out
    assert "first bad: nothing" not in out
    assert "stages.0.0.conv" in out
    assert "classifier" in out


def test_a_run_that_the_guard_stopped_has_not_read_the_test_split(stopped):
    folder, stop = stopped
    assert stop.code == 1
    assert (folder / "blackbox.pt").is_file()
    assert not (folder / "checkpoints" / "final.ckpt").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["reason"].startswith("step 0: the optimizer's step made weights that are not finite")
    assert not any(key.startswith("test/") for key in summary)


def test_a_box_holds_the_images_that_its_indices_name(stopped):
    from knep.config.compose import compose_config
    from knep.config.instantiate import instantiate

    folder, _ = stopped
    box = checkpoint.read(folder / "blackbox.pt")
    data = instantiate(compose_config(RUN).config["data"])
    data.prepare()
    x, y = data._splits["train"]
    assert torch.equal(x[box["indices"]], box["batch"][0])
    assert torch.equal(y[box["indices"]], box["batch"][1])


def test_another_batch_is_not_the_same_step(stopped, tmp_path):
    folder, _ = stopped
    box = checkpoint.read(folder / "blackbox.pt")
    assert replay(folder / "blackbox.pt").same
    box["batch"][0][0, 0, 3, 3] += 1
    checkpoint.write(box, tmp_path / "other.pt")
    assert not replay(tmp_path / "other.pt").same


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda box: box["knep"]["config"]["model"].update(_target_="os.system"), "os.system is not allowed"),
        (lambda box: box["knep"]["config"]["model"].update(_target_="builtins.eval"), "builtins.eval is not allowed"),
        (lambda box: box["knep"].pop("config"), "does not say its config"),
        (lambda box: box.pop("rng"), "has no rng"),
        (lambda box: box.update(batch=[1, 2]), "batch[0] is a int, not a tensor"),
        (lambda box: box.update(kind="anything"), "kind is 'anything', not one of"),
        (lambda box: box.update(threads=10**9), "threads is 1000000000, not within"),
        (lambda box: box.update(precision="rm -rf"), "its precision is unknown"),
        (lambda box: box.update(batch=[torch.zeros(2, 9), torch.zeros(2)]), "does not fit its model"),
        (lambda box: box["state_dict"].popitem(), "holds another model"),
        (lambda box: box.update(box=2), "is no black box"),
        (lambda box: box.update(step=box["batch_idx"] + 3), "behind only"),
        (lambda box: box.update(batches="many"), "no number of batches"),
    ],
)
def test_the_box_of_a_stranger_is_refused_in_one_line(change, said, stopped, tmp_path):
    box = checkpoint.read(stopped[0] / "blackbox.pt")
    change(box)
    checkpoint.write(box, tmp_path / "evil.pt")
    with pytest.raises(InputError) as refused:
        replay(tmp_path / "evil.pt")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_box_is_refused_by_the_command(tmp_path, capsys):
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    for line in ([f"replay={tmp_path}/none.pt"], [f"replay={tmp_path}/cut.pt"], ["replay=x.pt", "seed=1"]):
        with pytest.raises(SystemExit) as stop:
            main(line)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("options", [["optimizer=adamw"], ["optimizer=sgd"], ["optimizer=adamw", "averaging=ema"]])
def test_a_box_is_smaller_than_two_checkpoints(options, tmp_path):
    case = matrix.Case("layer", "nan", "stop", "32-true", "plain", 9)
    matrix.VARIANTS["plain"], kept = options, matrix.VARIANTS["plain"]
    try:
        assert "replayed" in matrix.try_case(case, tmp_path / "run")
    finally:
        matrix.VARIANTS["plain"] = kept
    sizes = [(tmp_path / "run" / name).stat().st_size for name in ("blackbox.pt", "checkpoints/last.ckpt")]
    assert sizes[0] < 2 * sizes[1]


class Breaks(nn.Module):
    def __init__(self, forward=1.0, backward=1.0):
        super().__init__()
        self.factors = forward, backward

    def forward(self, x):
        y = x * self.factors[0]
        if y.requires_grad:
            y.register_hook(lambda g: g * self.factors[1])
        return y


@pytest.mark.parametrize(
    ("broken", "place"),
    [
        (Breaks(), None),
        (Breaks(forward=float("nan")), "the output of 1 (Breaks)"),
        (Breaks(backward=float("inf")), "the gradient of the output of 1 (Breaks)"),
    ],
)
def test_the_first_bad_layer_is_named(broken, place):
    model = nn.Sequential(nn.Linear(4, 4), broken, nn.Linear(4, 2))
    with watched(model) as table:
        model(torch.randn(3, 4)).sum().backward()
    assert [row.path for row in table.rows] == ["0", "1", "2", "model"]
    assert table.place() == place


def test_a_step_of_a_short_window_is_repeated_with_its_scale(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        main([*RUN, "accumulate=20", f"hydra.run.dir={folder}"])  # of which an epoch has 10
    assert checkpoint.read(folder / "blackbox.pt")["scale"] == 2.0
    assert replay(folder / "blackbox.pt").same
