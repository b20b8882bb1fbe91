"""Exported files: plain names, the run's own logits, readable without knep, and refused where that does not hold."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from knep.cli.main import main as knep
from knep.cli.train import main
from knep.config import instantiate
from knep.config.compose import compose_config
from knep.config.schema import DataSpec, RunConfig
from knep.engine.build import build_module
from knep.engine.load import load_members
from knep.errors import InputError
from knep.export import export as exporting
from knep.export.export import export
from knep.export.plain_model import Portable, check_images, portable

DOCS = Path(__file__).parent.parent / "docs" / "export.md"
QUICK = ["trainer=cpu", "trainer.max_epochs=1", "data.limit=100", "data.batch_size=50", "progress=false", "threads=1"]


def saved(folder, overrides, channels=1, size=8):
    """A run folder whose model has weights and statistics of its own, as training would have left them."""
    config = compose_config(["recipe=none", "scaling=symmetric", *overrides]).config
    about = {"config": config, "num_classes": 10, "channels": channels, "image_size": size}
    about["class_names"] = [f"class {k}" for k in range(10)]
    module = build_module(RunConfig.of(config), DataSpec.stored(about), initialise=False).train()
    with torch.no_grad():
        module(torch.randint(0, 256, (16, channels, size, size)).float())
        for parameter in module.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": module.state_dict(), "knep": about}, folder / "checkpoints" / "final.ckpt")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("small") / "run", ["model=mlp", "model.widths=[16]", "norm=layer"])


TORCHVISION = ["model=torchvision", "model.name=resnet18"]
# Row -> (overrides, channels, pixels, the functions of the steps).
MODELS = {
    "mlp": (["model=mlp"], 1, 8, ["knep.models.mlp.mlp"]),
    "mlp, weight norm": (["model=mlp", "norm=weight", "dropout=standard"], 1, 8, ["knep.models.mlp.mlp"]),
    "cnn, spectral norm": (["model=cnn", "norm=spectral"], 3, 8, ["knep.models.cnn.cnn"]),
    "cnn, weight standardization": (
        ["model=cnn", "norm=weight_standardization"],
        3,
        8,
        ["knep.models.cnn.cnn", "knep.recipes.norm.group"],
    ),
    "cnn, batch norm, tanh": (
        ["model=cnn", "norm=batch", "norm.position=after_activation", "activation=tanh", "channels_last=true"],
        1,
        8,
        ["knep.models.cnn.cnn", "knep.recipes.norm.batch", "knep.recipes.activation.tanh"],
    ),
    "resnet, group norm, depth": (
        ["model=resnet", "norm=group", "dropout=stochastic_depth"],
        1,
        8,
        ["knep.models.resnet.resnet", "knep.recipes.norm.group"],
    ),
    "resnet, depth, factors": (
        ["model=resnet", "dropout=stochastic_depth", "init=layer_scale"],
        1,
        8,
        ["knep.models.resnet.resnet", "knep.recipes.init.layer_scale"],
    ),
    "resnet, fixup": (
        ["model=resnet", "init=fixup"],
        1,
        8,
        ["knep.models.resnet.resnet", "knep.recipes.init.fixup"],
    ),
    "inception": (
        ["model=inception", "model.width=0.5", "norm=rms", "dropout=dropblock"],
        3,
        8,
        ["knep.models.inception.inception", "knep.recipes.norm.rms"],
    ),
    "torchvision": (TORCHVISION, 3, 32, ["torchvision.models.resnet18"]),
    "torchvision, grey": (TORCHVISION, 1, 32, ["torchvision.models.resnet18", "torch.nn.Conv2d"]),
    "torchvision, dropout": ([*TORCHVISION, "dropout=standard"], 3, 32, ["torchvision.models.resnet18"]),
    "torchvision, depth": ([*TORCHVISION, "dropout=stochastic_depth"], 3, 32, ["torchvision.models.resnet18"]),
    "torchvision, spectral norm": ([*TORCHVISION, "norm=spectral"], 3, 32, ["torchvision.models.resnet18"]),
    "torchvision, own dropout": (
        ["model=torchvision", "model.name=mobilenet_v3_small", "dropout=standard"],
        3,
        32,
        ["torchvision.models.mobilenet_v3_small"],
    ),
    "torchvision, group norm": (
        ["model=torchvision", "model.name=shufflenet_v2_x0_5", "norm=group"],
        3,
        32,
        ["torchvision.models.shufflenet_v2_x0_5", "knep.recipes.norm.group"],
    ),
    "torchvision, one head": (["model=torchvision", "model.name=googlenet"], 3, 32, ["torchvision.models.googlenet"]),
}


def rebuilt(about):
    """The model that the JSON's steps say, by a reader who knows nothing else."""
    model = nn.Module()
    for step in about["architecture"]["steps"]:
        name = next(step[key] for key in ("call", "put", "edit") if key in step)
        make = instantiate._locate(name)
        if "call" in step:
            model = make(**step["arguments"])
        elif "put" in step:
            model.set_submodule(step["at"], make(**step["arguments"]))
        else:
            make(model, sample=torch.zeros(step["sample"]), **step["arguments"])
    return model.eval()


@pytest.mark.parametrize("row", MODELS)
def test_the_weights_belong_to_the_model_that_the_steps_build(row, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    overrides, channels, size, names = MODELS[row]
    run = saved(tmp_path / "run", overrides, channels, size)
    written = export(run, tmp_path / "model.safetensors")
    assert written == [tmp_path / "model.safetensors", tmp_path / "model.safetensors.json"]
    about = json.loads(written[1].read_text())
    with safe_open(written[0], "pt") as inside:
        assert json.loads(inside.metadata()["knep"]) == about
    steps = about["architecture"]["steps"]
    assert [step.get("call") or step.get("put") or step["edit"] for step in steps] == names
    state = load_file(written[0])
    assert not [name for name in state if re.search(r"_orig_mod|(^|\.)module\.|parametrizations|^model\.", name)]
    model = rebuilt(about)
    model.load_state_dict(state)
    pixels = check_images({"num_classes": 10, "class_names": [], "channels": channels, "image_size": size})
    with torch.no_grad():
        torch.testing.assert_close(model((pixels - 127.5) / 127.5), load_members(run)[0](pixels), rtol=1e-4, atol=1e-4)
    assert about["input"]["scaling"]["mean"] == [127.5] * channels
    assert about["input"]["scaling"]["std"] == pytest.approx([127.5] * channels)
    assert about["input"]["shape"] == ["N", channels, size, size]
    assert about["classes"][3] == "class 3"


ALONE = """
import sys, torch, torchvision
from safetensors.torch import load_file
model = torchvision.models.resnet18(num_classes=10)
model.load_state_dict(load_file(sys.argv[1]), strict=True)
assert not {"knep", "lightning", "hydra"} & set(sys.modules)
torch.save(model.eval()(torch.ones(2, 3, 32, 32)), sys.argv[2])
"""


def test_a_process_without_knep_loads_the_weights(tmp_path):
    run = saved(tmp_path / "run", [*TORCHVISION, "dropout=standard", "averaging=ema"], 3, 32)
    export(run, tmp_path / "model.safetensors")
    paths = [str(tmp_path / name) for name in ("model.safetensors", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", ALONE, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        logits = load_members(run)[0].model(torch.ones(2, 3, 32, 32))
    torch.testing.assert_close(torch.load(paths[1]), logits, rtol=1e-4, atol=1e-4)


GRAPHS = {
    "mlp": (["model=mlp", "norm=weight"], 1, 8),
    "cnn": (["model=cnn", "norm=batch", "dropout=spatial", "scaling=none"], 3, 8),
    "resnet": (["model=resnet", "norm=group", "dropout=stochastic_depth"], 1, 8),
}


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("row", GRAPHS)
def test_a_graph_takes_pixels_and_any_number_of_images(row, kind, tmp_path):
    overrides, channels, size = GRAPHS[row]
    run = saved(tmp_path / "run", overrides, channels, size)
    graph, beside = export(run, tmp_path / f"model.{kind}")
    pixels = torch.randint(0, 256, (7, channels, size, size)).float()
    with torch.no_grad():
        wanted = load_members(run)[0](pixels)
    inside, got = answers(graph, pixels)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    about = json.loads(beside.read_text())
    assert json.loads(inside) == about
    assert about["input"]["reads"] == "pixels"


def answers(graph, pixels):
    """What a graph says of itself, and its logits."""
    if graph.suffix == ".pt2":
        extra = {"knep.json": ""}
        program = torch.export.load(graph, extra_files=extra)
        return extra["knep.json"], program.module()(pixels)
    from onnxruntime import InferenceSession

    session = InferenceSession(graph)
    assert session.get_inputs()[0].shape == ["N", *pixels.shape[1:]]
    logits = session.run(["logits"], {"pixels": pixels.numpy()})[0]
    return session.get_modelmeta().custom_metadata_map["knep"], torch.from_numpy(logits)


def test_an_ensemble_gives_a_file_per_member(small, tmp_path):
    for i in range(11):
        saved(tmp_path / "run" / f"member_{i}", ["model=mlp", "model.widths=[4]"])
    written = export(tmp_path / "run", tmp_path / "model.safetensors")
    assert [p.name for p in written[-2:]] == ["model_10.safetensors", "model_10.safetensors.json"]
    about = json.loads(written[-1].read_text())["ensemble"]
    assert (about["member"], about["members"]) == (10, 11)
    assert len({p.read_bytes() for p in written if p.suffix == ".safetensors"}) == 11
    only = (tmp_path / "run" / "member_10" / "checkpoints" / "final.ckpt").read_bytes()
    (tmp_path / "ten.ckpt").write_bytes(only)
    alone = export(tmp_path / "ten.ckpt", tmp_path / "ten.safetensors")
    from safetensors.torch import load_file

    a, b = load_file(alone[0]), load_file(tmp_path / "model_10.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["safetensors", "onnx", "pt2"])
def test_a_file_that_answers_otherwise_is_not_written(kind, small, tmp_path, monkeypatch):
    def slightly_wrong(module):
        found = portable(module)
        wrong = found.logits * (1 + 1e-3)
        return Portable(found.model, found.scaling, found.about, found.pixels, wrong)

    monkeypatch.setattr(exporting, "portable", slightly_wrong)
    with pytest.raises(InputError, match="not kept"):
        export(small, tmp_path / f"model.{kind}")
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced_is_refused_for_graphs(small, tmp_path, monkeypatch):
    class Stubborn(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] + (1 if float(x.sum()) > 0 else 0)

    def stubborn(module):
        found = portable(module)
        return Portable(Stubborn(), found.scaling, found.about, found.pixels, found.logits)

    monkeypatch.setattr(exporting, "portable", stubborn)
    for kind in ("onnx", "pt2"):
        with pytest.raises(InputError, match=rf"--format {kind} cannot trace the model.*use --format safetensors"):
            export(small, tmp_path / f"model.{kind}")
    assert not list(tmp_path.iterdir())


def test_a_scaling_that_is_no_mean_and_deviation(small, tmp_path, monkeypatch):
    def squared(module):
        found = portable(module)
        scaling = {"kind": "squared", "mean": None, "std": None}
        about = found.about | {"input": found.about["input"] | {"scaling": scaling}}
        return Portable(found.model, found.scaling, about, found.pixels, found.logits)

    monkeypatch.setattr(exporting, "portable", squared)
    with pytest.raises(InputError, match=r"scaling=squared is no mean and deviation.*onnx or pt2"):
        export(small, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_compiled_and_parametrized_modules_come_out_plain(small):
    module = load_members(small)[0]
    names = list(portable(module).model.state_dict())
    nn.utils.parametrizations.weight_norm(module.model.classifier)
    module.model = torch.compile(module.model, backend="eager")
    pixels = torch.ones(2, 1, 8, 8)
    before = module(pixels)
    found = portable(module)
    assert list(found.model.state_dict()) == names
    assert torch.equal(module(pixels), before)
    torch.testing.assert_close(found.model(found.scaling(pixels)), before)
    assert "_orig_mod.classifier.parametrizations.weight.original0" in " ".join(module.state_dict())


def test_a_diverged_model_is_refused(tmp_path):
    run = saved(tmp_path / "run", ["model=mlp"])
    path = run / "checkpoints" / "final.ckpt"
    state = torch.load(path)
    state["state_dict"]["model.classifier.bias"].fill_(float("nan"))
    torch.save(state, path)
    with pytest.raises(InputError, match="not finite"):
        export(run, tmp_path / "model.safetensors")


REFUSED = {
    "no such run": (["nowhere", "model.onnx"], "nowhere is missing"),
    "foreign folder": (["empty", "model.onnx"], "final.ckpt is missing"),
    "unfinished": (["unfinished", "model.pt2"], "best.ckpt"),
    "truncated": (["truncated", "model.pt2"], "truncated or damaged"),
    "no ending": (["run", "model"], "safetensors or onnx or pt2"),
    "unknown ending": (["run", "model.bin"], "safetensors or onnx or pt2"),
    "other ending": (["run", "model.bin", "--format", "pt2"], "write model.pt2"),
    "no folder": (["run", "no/model.pt2"], "no is no folder"),
    "exists": (["run", "there.pt2"], "there.pt2 exists already"),
    "its JSON exists": (["run", "half.onnx"], "half.onnx.json exists already"),
    "no package": (["run", "model.pt2", "--allow", "my pkg"], "cannot be allowed"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_bad_input_gets_one_line(row, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    final = (small / "checkpoints" / "final.ckpt").read_bytes()
    for name, file, content in (
        ("run", "final.ckpt", final),
        ("truncated", "final.ckpt", final[: len(final) // 2]),
        ("unfinished", "best.ckpt", final),
    ):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / file).write_bytes(content)
    for file in ("empty/x", "there.pt2", "half.onnx.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    arguments, said = REFUSED[row]
    with pytest.raises(SystemExit) as stop:
        knep(["export", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_package_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(exporting._NEEDS, "onnx", ("onnx", "no_such_package"))
    with pytest.raises(InputError, match=r"needs no_such_package: pip install 'knep\[export\]'"):
        export(small, tmp_path / "model.onnx")


def test_every_block_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(instantiate, "_allowed", [])
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python", "python", "python", "python"]
    names: dict = {}
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, "export.md", "exec"), names)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            if program == "python":
                main([*arguments[1:], *(q for q in QUICK if "max_epochs" not in q)])
            else:
                knep(arguments)
    assert capsys.readouterr().out.count("model.onnx") == 2
    assert {f"model.{kind}" for kind in exporting.FORMATS} <= {p.name for p in tmp_path.iterdir()}
