"""calibrate=true: a temperature by Guo et al. 2017, in the weights that everything reads."""

import json

import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from knep.cli.main import main
from knep.config.compose import compose_config
from knep.config.schema import config_hash
from knep.engine.calibration import calibration_error, output_layer, reliability, temperature_of
from knep.engine.evaluate import retest
from knep.errors import InputError
from knep.run.run import run

LINES = ["data=digits", "recipe=none", "model=mlp", "model.widths=[64]", "scaling=unit", "threads=1", "progress=false"]
LINES += ["optimizer=adamw", "optimizer.lr=0.03", "trainer.max_epochs=8"]


class Whole(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def trained(folder, *lines):
    made = compose_config([*LINES, *lines])
    return run(made.config, folder, made.choices, made.overrides, figures=True)


def test_scores_that_are_three_times_too_large_are_divided_by_three():
    torch.manual_seed(0)
    honest = torch.randn(20000, 5) * 2
    labels = torch.distributions.Categorical(logits=honest).sample()
    assert temperature_of(honest, labels) == pytest.approx(1, rel=0.05)
    assert temperature_of(3 * honest, labels) == pytest.approx(3 * temperature_of(honest, labels), rel=1e-3)


def test_the_error_is_that_of_torchmetrics():
    torch.manual_seed(0)
    p, y = (torch.randn(500, 4) * 3).softmax(1), torch.randint(0, 4, (500,))
    confidence, predicted = p.max(1)
    found = calibration_error(reliability(confidence, predicted == y))
    assert found == pytest.approx(float(multiclass_calibration_error(p, y, num_classes=4, n_bins=15)), abs=1e-6)


def test_a_run_says_and_keeps_its_temperature(tmp_path, capsys):
    plain, made = trained(tmp_path / "plain"), trained(tmp_path / "made", "calibrate=true")
    assert made["test/acc"] == plain["test/acc"]  # one number changes no ranking
    assert made["val/loss"] < plain["val/loss"]
    assert made["temperature"] != 1
    assert "calibration error" in capsys.readouterr().out
    assert retest(tmp_path / "made", "val", False)["val/loss"] == pytest.approx(made["val/loss"], rel=1e-6)
    assert json.loads((tmp_path / "made" / "summary.json").read_text())["test/ece"] == made["test/ece"]
    before, after = (
        torch.load(tmp_path / name / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]
        for name in ("plain", "made")
    )
    ratios = {name: (before[name] / after[name]).mean().item() for name in before if before[name].ndim == 2}
    assert sorted(ratios.values(), key=lambda r: abs(r - 1))[-1] == pytest.approx(made["temperature"], rel=1e-4)
    assert sum(abs(r - 1) > 1e-4 for r in ratios.values()) == 1


def test_an_export_has_it(tmp_path):
    from safetensors.torch import load_file

    trained(tmp_path / "run", "calibrate=true", "norm=weight")
    main(["export", str(tmp_path / "run"), str(tmp_path / "net.safetensors")])  # compares its scores with the run's
    assert load_file(tmp_path / "net.safetensors")


def test_a_model_without_an_output_layer_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh())
    kept = {name: t.clone() for name, t in net.state_dict().items()}
    module = Whole(net)
    with pytest.raises(InputError, match="no linear layer at its end"):
        output_layer(module, torch.rand(8, 1, 8, 8))
    assert all(torch.equal(t, kept[name]) for name, t in net.state_dict().items())  # it is as it was
    net[2] = nn.Identity()
    assert output_layer(module, torch.rand(8, 1, 8, 8)) is net[1]


def test_other_tasks_are_refused(tmp_path):
    rows = "\n".join(f"{k},{k % 7},{k * 0.5}" for k in range(100))
    (tmp_path / "rows.csv").write_text(f"a,b,y\n{rows}\n")
    made = [f"data.path={tmp_path / 'rows.csv'}", "data.target=y", "task=regression", "data.batch_size=16"]
    with pytest.raises(InputError, match="task=regression has none"):
        trained(tmp_path / "run", "calibrate=true", "data=csv", "scaling=none", *made)


@pytest.mark.parametrize("line", ["calibrate=1", "calibrate=often"])
def test_another_value_is_refused(line):
    with pytest.raises(InputError, match="calibrate="):
        compose_config([line])


def test_runs_without_it_keep_their_hash():
    made = compose_config([]).config
    assert config_hash({k: v for k, v in made.items() if k != "calibrate"}) == config_hash(made)
