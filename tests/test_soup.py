"""`knep soup`: the weights of several runs as one model, chosen on validation, of runs of one model alone."""

import json
import shutil

import pytest
import torch

from knep.cli.main import main
from knep.cli.train import main as train
from knep.engine.load import load_members
from knep.errors import InputError
from knep.optim.soup import greedy, mean_of
from knep.run.soup import soup

SMALL = ["recipe=none", "data=digits", "data.limit=200", "model=mlp", "model.widths=[16]", "optimizer=adamw",
         "trainer=cpu", "trainer.max_epochs=2", "progress=false", "threads=1", "scaling=unit"]  # fmt: skip


def test_greedy_keeps_what_makes_the_mean_no_worse():
    """On numbers whose loss is the distance of their mean from 2: 1, 4 and 3 are taken, the 9 between is not."""
    states = [{"w": torch.tensor([v])} for v in (1.0, 9.0, 4.0, 3.0)]
    asked = []

    def loss(state):
        asked.append(state["w"].item())
        return abs(asked[-1] - 2)

    kept, best = greedy(states, loss)
    assert asked == pytest.approx([1, 5, 2.5, 8 / 3])
    assert (kept, best) == ([0, 2], 0.5)
    assert mean_of(states)["w"].item() == 4.25
    assert mean_of([{"n": torch.tensor(3)}, {"n": torch.tensor(4)}])["n"].dtype == torch.int64


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that go on from one, with other rates, and one that began elsewhere."""
    root = tmp_path_factory.mktemp("soup")
    for name, lines in {"a": ["seed=1"], "c": ["seed=7"], "wide": ["model.widths=[24]"]}.items():
        train([*SMALL, *lines, f"hydra.run.dir={root / name}"])
    shutil.copytree(root / "a", root / "b")
    path = root / "b" / "checkpoints" / "final.ckpt"
    state = torch.load(path, weights_only=True)
    draw = torch.Generator().manual_seed(0)
    for key, value in state["state_dict"].items():
        if key.startswith("model."):
            state["state_dict"][key] = value + 0.01 * torch.randn(value.shape, generator=draw)
    torch.save(state, path)
    return root


def model_weights(run):
    (member,) = load_members(run)
    return {name: p.detach() for name, p in member.model.named_parameters()}


def test_a_uniform_soup_is_the_mean_and_a_run_like_any_other(runs, tmp_path, capsys):
    main(["soup", str(runs / "a"), str(runs / "b"), "--kind", "uniform", "--out", str(tmp_path / "s")])
    assert "uniform soup of 2" in capsys.readouterr().out
    a, b, mixed = (model_weights(run) for run in (runs / "a", runs / "b", tmp_path / "s"))
    for name, value in mixed.items():
        torch.testing.assert_close(value, ((a[name].double() + b[name].double()) / 2).float())
    main(["evaluate", str(tmp_path / "s"), "--split", "val"])
    said = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "s" / "soup.json").read_text())
    assert said["val/loss"] == pytest.approx(stored["val/loss"], rel=1e-5)


def test_a_greedy_soup_is_no_worse_than_its_best_run_and_leaves_out_what_began_elsewhere(runs, tmp_path):
    made = soup([runs / "c", runs / "a", runs / "b"], tmp_path / "s")
    assert made.loss <= min(made.losses) + 1e-9
    assert list(made.losses) == sorted(made.losses)
    kept = {run.name for run, yes in zip(made.runs, made.kept, strict=True) if yes}
    assert made.runs[0].name in kept
    assert not {"a", "c"} <= kept
    assert not {"b", "c"} <= kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{a}"], "a soup is of two runs at least"),
        (["{a}", "{a}"], "is there twice"),
        (["{a}", "{wide}"], "model.widths=[24]"),
        (["{a}", "{none}"], "is missing: give a run folder"),
        (["{a}", "{b}", "--out", "{a}"], "is there already: write --out"),
    ],
)
def test_what_makes_no_soup_is_refused_in_one_line(runs, tmp_path, words, said, capsys):
    names = {name: runs / name for name in ("a", "b", "wide", "none")}
    with pytest.raises(SystemExit) as stop:
        main(["soup", *(word.format(**names) for word in words)])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in err
    assert err.count("\n") == 1
    assert issubclass(InputError, ValueError)
