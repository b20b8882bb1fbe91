"""`profile=true` shows where a step's time goes and changes nothing."""

import json

import torch

from knep.cli.train import main
from knep.engine.logging.profile import PHASES, table

QUICK = ["trainer=cpu", "trainer.max_epochs=5", "data.limit=300", "data.batch_size=50", "progress=false", "threads=1"]


def test_a_profiled_run_ends_with_the_same_weights(tmp_path, capsys):
    weights = []
    for watched in ("true", "false"):
        main([*QUICK, "clip=norm", f"profile={watched}", f"hydra.run.dir={tmp_path}/{watched}"])
        weights.append(torch.load(tmp_path / watched / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[1])
    lines = (tmp_path / "true" / "profile" / "steps.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["phase", *PHASES, "all"]
    assert all(float(line.split()[1]) > 0 for line in lines[1:])
    assert lines[-1] in capsys.readouterr().out
    trace = json.loads((tmp_path / "true" / "profile" / "steps.pt.trace.json").read_text())
    assert any("backward" in str(event.get("name", "")).lower() for event in trace["traceEvents"])
    assert not (tmp_path / "false" / "profile").exists()


def test_shares_are_of_the_whole():
    text = table({"data": 1.0, "forward": 3.0}, steps=1000)
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["data", "1.000", "25.0%"],
        ["forward", "3.000", "75.0%"],
        ["all", "4.000", "100.0%"],
    ]
