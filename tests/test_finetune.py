"""Weights to start from, and a run that tunes them: loaders, matching, freezing in both loops, resume, refusals."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import knep
from knep.cli import main
from knep.config.compose import compose_config
from knep.engine.load import load_module
from knep.errors import InputError
from knep.models import pretrained
from knep.models.resnet import resnet
from knep.models.torchvision import torchvision
from knep.optim.thawing import layers_of
from knep.run.run import run
from tests.exhaustive.resume_matrix import Strike, fit

ROOT = Path(__file__).parents[1]
SMALL = ["recipe=none", "data=digits", "data.limit=256", "data.batch_size=32", "model=cnn", "model.widths=[8,16]"]
SMALL += ["norm=batch", "scaling=standardize", "optimizer=adamw", "optimizer.lr=3e-3", "trainer=cpu"]
SMALL += ["progress=false", "threads=1"]


def trained(folder, *lines):
    made = compose_config([*SMALL, *lines])
    folder.mkdir(exist_ok=True)
    return run(made.config, folder, made.choices, made.overrides, figures=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    trained(folder, "trainer.max_epochs=2")
    return folder


def weights(folder, name="final"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def changed(before, after):
    """The layers of which a weight or statistic is another, by the first two words of their names."""
    return {
        ".".join(k.split(".")[1:3])
        for k in before
        if not k.startswith("scaling")
        and not k.endswith("num_batches_tracked")
        and not torch.equal(before[k], after[k])
    }


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(
    ("strategy", "epochs", "moved"),
    [
        ("head", 2, {"classifier.weight", "classifier.bias"}),
        ("gradual", 3, {"classifier.weight", "classifier.bias", "stages.1", "stages.0"}),
        ("full", 1, {"classifier.weight", "classifier.bias", "stages.1", "stages.0"}),
    ],
)
def test_what_is_frozen_stays_to_the_bit_statistics_included_in_both_loops(
    source, tmp_path, lean, strategy, epochs, moved
):
    folder = tmp_path / "tuned"
    start = [f"model.weights={source}", f"finetune={strategy}", f"lean={lean}".lower()]
    summary = trained(folder, *start, f"trainer.max_epochs={epochs}")
    assert changed(weights(source), weights(folder)) == moved
    assert summary["weights"]["loaded"] == 8
    assert len(summary["weights"]["sha256"]) == 64
    if strategy == "gradual":
        stages = tmp_path / "two"
        trained(stages, *start, "trainer.max_epochs=3", "trainer.max_steps=10")  # 8 steps an epoch
        assert changed(weights(source), weights(stages)) == moved - {"stages.0"}


def test_both_loops_come_to_the_same_numbers(source, tmp_path):
    found = []
    for lean in ("true", "false"):
        trained(tmp_path / lean, f"model.weights={source}", "finetune=gradual", "trainer.max_epochs=4", f"lean={lean}")
        found.append(weights(tmp_path / lean))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@pytest.mark.parametrize("more", [[], ["averaging=ema"], ["optimizer=muon"], ["finetune.head_lr=0.01"]])
def test_a_run_that_is_resumed_goes_on_as_it_would_have_without_its_source(source, tmp_path, more):
    lines = ["finetune=gradual", "finetune.freeze_norm=true", *more]
    copy = tmp_path / "source.ckpt"
    copy.write_bytes((source / "checkpoints" / "final.ckpt").read_bytes())
    lines = [*SMALL, *lines, f"model.weights={copy}", "trainer.max_epochs=4"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert fit(lines, whole) == 0
    assert fit(lines, parted, [Strike(11, signal.SIGTERM)]) == signal.SIGTERM  # 8 batches an epoch
    copy.unlink()
    assert fit(lines, parted, resume=True) == 0
    ours, theirs = weights(whole), weights(parted)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert load_module(parted / "checkpoints" / "final.ckpt").tuning is not None


def test_with_two_processes_layers_thaw_and_what_is_frozen_stays(source, tmp_path):
    lines = [f"model.weights={source}", "finetune=gradual", "finetune.freeze_norm=true", "trainer=ddp_sim"]
    lines += ["trainer.precision=32-true", "trainer.max_epochs=3", "trainer.max_steps=10"]  # 8 steps an epoch
    command = [sys.executable, ROOT / "train.py", *SMALL, *lines, f"hydra.run.dir={tmp_path / 'run'}"]
    lines = [line for line in command if line != "trainer=cpu"]
    done = subprocess.run(lines, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert changed(weights(source), weights(tmp_path / "run")) == {"classifier.weight", "classifier.bias", "stages.1"}


def test_averaging_that_estimates_statistics_anew_leaves_those_that_are_kept(source, tmp_path):
    lines = ["finetune=full", "finetune.freeze_norm=true", "averaging=swa", "averaging.start=0.3"]
    trained(tmp_path / "run", f"model.weights={source}", *lines, "trainer.max_epochs=3")
    before, after = weights(source), weights(tmp_path / "run")
    means = [k for k in before if "running_" in k]
    assert means
    assert all(torch.equal(before[k], after[k]) for k in means)
    assert changed(before, after) >= {"stages.0", "stages.1"}


def test_members_are_tuned_one_after_another(source, tmp_path, capsys):
    summary = trained(
        tmp_path / "run", f"model.weights={source}", "finetune=head", "trainer.max_epochs=1", "trainer.members=2"
    )
    assert summary["members"] == 2
    assert "finetune freezes and thaws the layers of a single run" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds 2 models: name one"):
        pretrained.read(str(tmp_path / "run"), {})


# Sources


def filled(source, model, sample):
    return pretrained.fill(model, source, layers_of(model, sample=sample).head)


def test_a_file_of_torchvision_is_read_by_name_and_its_scale_taken(tmp_path, monkeypatch, capsys):
    """What torch.hub has fetched: a state_dict of the net with its 1,000 classes and three channels."""
    from torchvision.models import ResNet18_Weights, resnet18

    torch.manual_seed(1)
    published = resnet18().state_dict()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    place.parent.mkdir()
    torch.save(published, place)
    node = {"_target_": "knep.models.torchvision.torchvision", "name": "resnet18"}
    for word in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        found = pretrained.read(word, node)
        assert found.weights.keys() == published.keys()
    shift, scale = found.scaling
    torch.testing.assert_close(shift, 255 * torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(1 / scale, 255 * torch.tensor([0.229, 0.224, 0.225]))
    model = torchvision(1, 7, 32, name="resnet18")
    loaded = filled(found, model, torch.zeros(2, 1, 32, 32))
    assert loaded.new == ("fc.weight", "fc.bias")
    torch.testing.assert_close(model.conv1.weight, published["conv1.weight"].sum(1, keepdim=True))
    torch.testing.assert_close(model.layer4[1].bn2.weight, published["layer4.1.bn2.weight"])
    assert any("sum of the three" in line for line in loaded.said)
    x = torch.randn(2, 1, 32, 32)
    color = torchvision(3, 7, 32, name="resnet18")
    filled(found, color, torch.zeros(2, 3, 32, 32))
    torch.testing.assert_close(model.conv1(x), color.conv1(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    lines = ["recipe=none", "data=digits", "data.limit=64", "model=torchvision", "model.weights=DEFAULT", "trainer=cpu"]
    lines += ["scaling=standardize", "finetune=layerwise", "trainer.max_epochs=1"]
    main.main(["plan", *lines])
    out = capsys.readouterr().out
    assert "by (x - 114.5) / 57.6" in out  # the mean of the channels' shifts and scales
    assert "fc.weight" in out


def test_what_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refused(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(InputError, match="did you mean DEFAULT"):
        pretrained.read("DEFALT", {"_target_": "knep.models.torchvision.torchvision", "name": "resnet18"})
    node = {"_target_": "knep.models.torchvision.torchvision", "name": "resnet18"}
    with pytest.raises(InputError, match=r"cannot be fetched .*write model.weights=FILE") as error:
        pretrained.read("DEFAULT", node)
    assert "\n" not in str(error.value)
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", refused)
    with pytest.raises(InputError, match=r"cannot be fetched .*write model.weights=FILE"):
        pretrained.read("DEFAULT", {"_target_": "knep.models.timm.timm", "name": "resnet18"})


def test_a_file_of_timm_is_read_whole_and_safe(tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(1)
    net = timm.create_model("test_resnet", num_classes=10)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    other = timm.create_model("test_resnet", num_classes=3)
    loaded = filled(pretrained.read(str(tmp_path / "model.safetensors"), {}), other, torch.zeros(2, 3, 32, 32))
    assert set(loaded.new) == {"fc.weight", "fc.bias"}
    torch.testing.assert_close(dict(other.named_buffers())["bn1.running_mean"], net.bn1.running_mean)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
        lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}, "args": "x"},
        lambda s: {"model_ema": s},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "pytorch-lightning_version": "2.6"},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_and_nested_files_are_seen_through(tmp_path, wrap, legacy):
    torch.manual_seed(1)
    net, other = (resnet(3, 10, 16, width=0.25) for _ in range(2))
    path = tmp_path / "net.pth"
    torch.save(wrap(dict(net.state_dict())), path, _use_new_zipfile_serialization=not legacy)
    loaded = filled(pretrained.read(str(path), {}), other, torch.zeros(2, 3, 16, 16))
    assert loaded.new == ()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_a_pickled_net_and_a_foreign_one_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(InputError, match="is not a checkpoint"):
        pretrained.read(str(tmp_path / "whole.pt"), {})
    (tmp_path / "evil.pth").write_bytes(pretrained._LEGACY + b".\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    with pytest.raises(InputError, match="is damaged, or no plain weights"):
        pretrained.read(str(tmp_path / "evil.pth"), {})
    torch.save({f"a.{k}": v for k, v in resnet(3, 10, 16).state_dict().items()}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"fits 0 of \d+ .*the model has stem.*and the source a.stem"):
        filled(pretrained.read(str(tmp_path / "other.pt"), {}), resnet(3, 10, 16), torch.zeros(2, 3, 16, 16))
    state = resnet(3, 10, 16).state_dict()
    state["stem.conv.weight"][0] = float("nan")
    torch.save(dict(state), tmp_path / "nan.pt")
    with pytest.raises(InputError, match=r"stem.conv.weight is not finite"):
        filled(pretrained.read(str(tmp_path / "nan.pt"), {}), resnet(3, 10, 16), torch.zeros(2, 3, 16, 16))


REFUSED = {
    "finetune=gradual": "write model.weights=outputs/<run> or a file, or finetune=none",
    "model.weights=SOURCE init=he_normal": "init=he_normal would draw anew .*write init=none",
    "model.weights=SOURCE finetune=layerwise layer_decay=0.5": "write layer_decay=1",
    "model.weights=SOURCE finetune=head trainer=fsdp": "write trainer=ddp",
    "model.weights=SOURCE finetune=head callbacks=doctor": "write callbacks=none",
    "model.weights=SOURCE finetune=gradual trainer.max_epochs=2": "write trainer.max_epochs=3 or more",
    "model.weights=SOURCE finetune=full finetune.freeze=[layer9*]": "matches no parameter",
    "model.weights=SOURCE norm=group": "norm=group contradicts .*: write norm=batch",
    "model.weights=SOURCE norm=none": "norm=none contradicts .*: write norm=batch",
    "model.weights=SOURCE model=mlp norm=none": "fits 0 of 4 parameters",
    "model.weights=outputs/nowhere": "is missing: give a run folder, or a file",
    "model.weights=DEFAULT": "nobody publishes weights of this model",
    "finetune=gradul": "did you mean gradual",
    "model.weights=SOURCE finetune=gradual finetune.layer_decay=0.5": "write finetune=layerwise",
}


@pytest.mark.parametrize("lines", REFUSED)
def test_what_cannot_act_is_refused_in_one_line_before_the_first_step(lines, source, tmp_path):
    with pytest.raises(InputError, match=REFUSED[lines]) as error:
        trained(tmp_path / "run", "trainer.max_epochs=1", *lines.replace("SOURCE", str(source)).split())
    assert "\n" not in str(error.value)


def test_other_scales_and_activations_are_said(source, tmp_path, capsys):
    lines = [f"model.weights={source}", "trainer.max_epochs=1", "scaling=unit", "activation=gelu"]
    trained(tmp_path / "run", *lines)
    out = capsys.readouterr().out
    assert "inputs: scaled by (x - 0) / 255, and" in out
    assert "write scaling=standardize" in out
    assert "activation=gelu here, none where the weights were trained" in out
    assert "SHA-256" in out
    trained(tmp_path / "other", f"model.weights={source}", "trainer.max_epochs=1")
    assert torch.equal(weights(tmp_path / "other")["scaling.shift"], weights(source)["scaling.shift"])


def test_the_plan_shows_what_is_loaded_new_and_when_it_thaws(source, capsys):
    lines = [*SMALL, f"model.weights={source}", "finetune=gradual", "finetune.freeze=[stages.0*]"]
    main.main(["plan", *lines, "trainer.max_epochs=4"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith(("stages", "cl"))]
    found = {row[0]: (row[2], " ".join(row[-3:])) for row in rows if "norm" not in row[0]}
    assert found["classifier.weight"] == ("loaded", "from epoch 1")
    assert found["stages.1.0.conv.weight"] == ("loaded", "from epoch 2")
    assert found["stages.0.0.conv.weight"][1].endswith("never")


# Modules of others


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def validation_step(self, batch, _):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def fitted(callbacks, epochs, module=None, **more):
    module = Net() if module is None else module
    torch.manual_seed(0)
    rows = TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, 16), DataLoader(rows, 16))
    return module


@pytest.mark.parametrize(("epochs", "moved"), [(1, {"3"}), (3, {"0", "1", "3"})])
def test_a_lightning_module_of_ones_own_is_thawed_by_epochs(epochs, moved):
    found = knep.callbacks("none", ["optimizer=adamw", "finetune=gradual"])
    if epochs == 1:
        with pytest.raises(InputError, match=r"trainer.max_epochs=3 or more"):
            fitted(found, epochs)
        found = knep.callbacks("none", ["optimizer=adamw", "finetune=head"])
    before, after = Net().net.state_dict(), fitted(found, epochs).net.state_dict()
    names = [k for k in before if "num_batches" not in k]
    assert {k.split(".")[0] for k in names if not torch.equal(before[k], after[k])} == moved
    assert "head 3.weight, 3.bias" in found.effects()["finetune"]


def test_a_module_with_its_own_optimizer_is_frozen_and_gets_no_rates_of_its_own():
    found = knep.callbacks("none", ["optimizer=none", "finetune=head"])
    before, after = Net().net.state_dict(), fitted(found, 2, Net()).net.state_dict()
    names = [k for k in before if "num_batches" not in k]
    assert {k.split(".")[0] for k in names if not torch.equal(before[k], after[k])} == {"3"}
    with pytest.raises(InputError, match="optimizer=none leaves the optimizer to Net"):
        fitted(knep.callbacks("none", ["optimizer=none", "finetune=layerwise"]), 2, Net())


def test_a_lit_module_is_tuned_too():
    net = Net().net
    before = {k: v.clone() for k, v in net.state_dict().items()}
    module = knep.LitModule(net, knep.load("none", ["optimizer=adamw", "finetune=head"]), num_classes=3)
    fitted([], 2, module)
    names = [k for k in before if "num_batches" not in k]
    assert {k.split(".")[0] for k in names if not torch.equal(before[k], net.state_dict()[k])} == {"3"}


def test_its_document_s_lines_compose_and_its_loop_runs():
    """docs/finetune.md: "finetune.md"."""
    text = (ROOT / "docs" / "finetune.md").read_text()
    lines = [line.removeprefix("knep train ").split() for line in text.splitlines() if line.startswith("knep train ")]
    assert len(lines) == 3
    for words in lines:
        made = compose_config([*words, "init=none", "stopping=none"])
        assert made.choices["finetune"] != "none"
        assert made.run.weights
    loop = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("    ...\n", "    seen.append(epoch)\n")
    seen = []
    exec(loop, {"knep": knep, "model": Net().net, "x": torch.randn(4, 4), "epochs": 3, "seen": seen})
    assert seen == [0, 1, 2]
