"""What a checkpoint, a box, a summary or a table may hold is looked at before any of it is loaded, moved or removed."""

import copy
import csv
import json
import os
import shutil

import pytest
import torch

from knep.cli.train import main
from knep.config.catalog import options
from knep.config.compose import compose_config
from knep.config.schema import DataSpec, RunConfig
from knep.engine.build import build_module
from knep.engine.load import read_checkpoint, stored_module
from knep.engine.logging.csv_logger import earlier_rows
from knep.engine.stored_state import check_stored_run, expected_state
from knep.errors import InputError
from knep.io import checkpoint
from knep.io.run_folder import read_again, read_summary, write_summary
from knep.io.schema import alike, number, record, same, table, whole

SMALL = ["recipe=none", "trainer=cpu", "data.limit=60", "data.batch_size=10", "threads=1", "progress=false"]
SMALL += ["model.widths=[4,6]", "seed=3"]


@pytest.fixture(scope="module")
def soup(tmp_path_factory):
    """A run of three epochs whose callbacks keep files: a soup, and the best epoch of early stopping."""
    folder = tmp_path_factory.mktemp("soup") / "run"
    lines = ["optimizer=adamw", "averaging=soup", "averaging.k=2", "stopping=early", "trainer.max_epochs=3"]
    main([*SMALL, *lines, f"hydra.run.dir={folder}"])
    return folder


def callback(state, name):
    return next(found for key, found in state["callbacks"].items() if key.startswith(name))


def refusal(run, change):
    """The line that refuses a run's last checkpoint with a changed state, "" where none does."""
    path = run / "checkpoints" / "last.ckpt"
    state = read_checkpoint(path)
    change(state)
    try:
        check_stored_run(path, state, stored_module(path, state))
    except InputError as error:
        return str(error)
    return ""


def test_a_run_that_nobody_touched_is_gone_on_with(soup):
    assert refusal(soup, lambda state: None) == ""


def test_a_checkpoint_names_files_by_their_plain_names(soup):
    state = read_checkpoint(soup / "checkpoints" / "last.ckpt")
    assert all(name.startswith("soup_") for _, name in callback(state, "Soup")["kept"])
    assert callback(state, "Best")["best_model_path"] == "best.ckpt"
    assert str(soup) not in repr(state["callbacks"])


@pytest.mark.parametrize(
    "name",
    [
        "{secret}",
        "../{secret}",
        "soup_1.pt/../{secret}",
        "../soup_6.pt",
        "soup_6.pt\n",
        "soup_\0.pt",
        "soup_9999.pt",
        7,
    ],
)
def test_no_path_of_a_soup_is_followed(name, soup, tmp_path):
    secret = tmp_path / "secret.pt"
    secret.write_text("mine")
    odd = name.format(secret=secret) if isinstance(name, str) else name
    assert "Soup.kept[0][1]" in refusal(soup, lambda state: callback(state, "Soup")["kept"][0].__setitem__(1, odd))
    assert secret.read_text() == "mine"


@pytest.mark.parametrize("key", ["best_model_path", "kth_best_model_path", "last_model_path"])
def test_no_path_of_the_best_checkpoint_is_followed(key, soup):
    for path in ("/etc/passwd", "../..", 7):
        assert f"Best.{key}" in refusal(soup, lambda state, path=path: callback(state, "Best").update({key: path}))


def test_a_refused_run_stays_as_it_is(soup, tmp_path):
    run = shutil.copytree(soup, tmp_path / "run")
    path = run / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    callback(state, "Soup")["kept"] = [[1e9 + i, str(tmp_path / "secret.pt")] for i in range(2)]
    torch.save(state, path)
    os.utime(run / "checkpoints" / "best.ckpt", (0, 0))
    (tmp_path / "secret.pt").touch()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        main([f"ckpt={run}", "trainer.max_epochs=4"])
    assert stop.value.code == 2
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_file_of_the_soup_that_is_of_another_model_is_told_before_training(soup, tmp_path):
    run = shutil.copytree(soup, tmp_path / "run")
    name = callback(read_checkpoint(run / "checkpoints" / "last.ckpt"), "Soup")["kept"][0][1]
    checkpoint.write({"model.classifier.weight": torch.zeros(1)}, run / "checkpoints" / name)
    assert f"{name} beside it is of another run" in refusal(run, lambda state: None)


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_run_that_was_moved_goes_on_as_if_it_had_not_been(how, soup, tmp_path):
    """Later epochs are worse: best.ckpt and the soup stay those of the first three, and the original is left alone."""
    stayed, there = tmp_path / "stayed", tmp_path / how
    for place in (stayed, there):
        shutil.copytree(soup, place)
    before = {p: p.read_bytes() for p in soup.rglob("*") if p.is_file()}
    if how == "moved":
        os.rename(there, tmp_path / "elsewhere")
        there = tmp_path / "elsewhere"
    for place in (stayed, there):
        main([f"ckpt={place}", "trainer.max_epochs=5", "optimizer.lr=3"])
    with (there / "metrics.csv").open() as f:
        losses = [float(row["val/loss"]) for row in csv.DictReader(f) if row["val/loss"]]
    assert len(losses) == 5
    best = read_checkpoint(there / "checkpoints" / "best.ckpt")
    assert best["epoch"] == losses.index(min(losses)) + 1 <= 3
    ends = [read_checkpoint(place / "checkpoints" / "final.ckpt")["state_dict"] for place in (stayed, there)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert {p: p.read_bytes() for p in soup.rglob("*") if p.is_file()} == before


def test_state_of_an_older_run_with_whole_paths_is_taken_by_its_names(soup):
    def older(state):
        soups, best = callback(state, "Soup"), callback(state, "Best")
        soups["kept"] = [[score, f"/home/x/run/checkpoints/{name}"] for score, name in soups["kept"]]
        own = "/home/x/run/checkpoints/best.ckpt"
        score = best["best_model_score"]
        best.update(best_model_path=own, kth_best_model_path=own, dirpath="/home/x", best_k_models={own: score})
        del state["exact"]["states"]

    assert refusal(soup, older) == ""


@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_the_state_of_every_optimizer_is_its_own(optimizer):
    config = compose_config(["recipe=none", "model.widths=[4]", f"optimizer={optimizer}", "trainer=cpu"]).config
    facts = {"config": config, "num_classes": 10, "channels": 1, "image_size": 8, "class_names": list("0123456789")}
    module = build_module(RunConfig.of(config), DataSpec.stored(facts), initialise=False)
    expected = expected_state(module)
    state = expected._optimizer.state_dict()
    check = expected.optimizer(steps=3)
    assert check(state) is None
    spoilt = copy.deepcopy(state)
    spoilt["param_groups"][0]["lr"] = "x"
    assert "param_groups[0].lr is text" in str(check(spoilt))
    shaped = [(i, k) for i, held in state["state"].items() for k, t in held.items() if torch.is_tensor(t) and t.dim()]
    for i, key in shaped[:3]:
        t = state["state"][i][key]
        for wrong in (t.flatten()[1:], t[:1].mean().expand(t.shape), t.long(), torch.full_like(t, torch.nan), "x", [t]):
            spoilt["param_groups"][0]["lr"] = state["param_groups"][0]["lr"]
            spoilt["state"][i] = {**state["state"][i], key: wrong}
            assert f"state.{i}.{key}" in str(check(spoilt))
        spoilt["state"][i] = {**state["state"][i], "more": t}
        assert "has the key 'more'" in str(check(spoilt))
        spoilt["state"][i] = state["state"][i]


def wide(weights):
    """Weights that are finite as they are stored, and infinite as the model has them."""
    return {name: t.double() + 1e300 for name, t in weights.items() if t.is_floating_point()}


def _count(state):
    return state["loops"]["fit_loop"]["epoch_progress"]["current"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(global_step=s["global_step"] + 1), "global_step"),
        (lambda s: s.update(epoch=10**400), "epoch"),
        (lambda s: _count(s).update(started=1), "epoch_progress.started"),
        (lambda s: _count(s).update(more=1), "nothing reads"),
        (lambda s: _count(s).update({None: 1}), "nothing reads"),
        (lambda s: s["lr_schedulers"][0].update(step="x"), "lr_schedulers[0]"),
        (lambda s: s["lr_schedulers"][0].update(last_epoch=1), "last_epoch"),
        (lambda s: s["optimizer_states"][0]["param_groups"][0].update(lr=0.5), "_last_lr"),
        (lambda s: s["optimizer_states"][0]["state"].pop(0), "by another count"),
        (lambda s: s["callbacks"].popitem(), "callbacks has no"),
        (lambda s: callback(s, "Early").update(best_score=torch.tensor(0.1)), "which no epoch had"),
        (lambda s: callback(s, "Early").update(patience=10**6), "patience"),
        (lambda s: callback(s, "History")["rows"].append({"epoch": -1}), "History.rows[3]"),
        (lambda s: s["exact"]["rng"].update(cpu=torch.zeros(5056, dtype=torch.uint8)), "rng.cpu"),
        (lambda s: s["exact"]["gradients"].update({"model.classifier.bias": torch.zeros(3)}), "gradients"),
        (lambda s: s["exact"].update(metrics={"val/loss": "x"}), "metrics.val/loss"),
        (lambda s: s["running"]["guard"].update(factor=float("nan")), "guard.factor"),
        (lambda s: s["running"]["sums"].update(train=torch.zeros(3)[:2]), "sums.train"),
        (lambda s: s["state_dict"].update({7: torch.zeros(1)}), "state_dict"),
        (lambda s: s.pop("running"), "has no running"),
        (lambda s: s["loops"]["fit_loop"].update(epoch_progress=torch.zeros(())), "epoch_progress is a Tensor"),
        (lambda s: s["knep"]["config"].update(guard=[]), "no guard"),
        (lambda s: s["knep"]["config"].update(trainer="x"), "no trainer"),
        (lambda s: s["knep"]["config"].pop("trainer"), "no trainer"),
        (lambda s: s["state_dict"].update(wide(s["state_dict"])), "is not finite"),
        (lambda s: s["state_dict"]["scaling.scale"].fill_(float("nan")), "scaling.scale is not finite"),
        (lambda s: s.update({"pytorch-lightning_version": "0.0.1"}), "pytorch-lightning_version"),
    ],
)
def test_a_field_of_a_checkpoint_that_cannot_be_is_named(change, said, soup):
    assert said in refusal(soup, change)


def test_the_memory_format_may_change_between_two_parts_of_a_run(tmp_path):
    """A fused optimizer reads its state in the parameter's order of memory, which `channels_last` sets."""
    main([*SMALL, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}/a"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name, layout in (("a", "true"), ("b", "false")):
        main([f"ckpt={tmp_path}/{name}", "trainer.max_epochs=2", f"channels_last={layout}"])
    ends = [read_checkpoint(tmp_path / name / "checkpoints" / "final.ckpt")["state_dict"] for name in "ab"]
    assert all(torch.allclose(ends[0][key].float(), ends[1][key].float(), atol=1e-5) for key in ends[0])


def test_tensors_of_a_checkpoint_have_memory_of_their_own():
    t = torch.arange(6.0)
    tree = checkpoint.in_own_memory({"a": t[:3], "b": [t, (t,)], "c": t[:1].expand(4), "d": torch.ones(2)})
    tensors = [tree["a"], tree["b"][0], tree["b"][1][0], tree["c"], tree["d"]]
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == 5
    assert tree["c"].tolist() == [0.0] * 4
    assert tree["a"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"sealed": "x"}',
        '{"sealed": -1}',
        '{"sealed": %s}' % ("9" * 5000),
        '{"status": []}',
        "[]",
        "",
        "\0",
    ],
)
def test_a_summary_that_is_none_is_told(content, tmp_path):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InputError, match=r"summary\.json"):
        read_summary(tmp_path)
    assert (tmp_path / "summary.json").read_text() == content


def test_a_run_whose_summary_nobody_named_is_left_out_and_told(soup, tmp_path, capsys):
    from knep.run.resume import earlier_runs

    shutil.copytree(soup, tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "summary.json").write_text('{"sealed": "x"}')
    config = read_checkpoint(soup / "checkpoints" / "final.ckpt")["knep"]["config"]
    folders = [folder for folder, _ in earlier_runs(config, tmp_path)]
    assert folders in ([tmp_path / "good"], [])  # the stored config may differ in what is not hashed
    assert "bad/summary.json" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["step,epoch\n0,0\n0,1\n", "step,step\n0,1\n", "step,val/loss\n0,x\n", "step\n-1\n"])
def test_a_table_that_a_run_cannot_have_written_is_refused(table, tmp_path):
    (tmp_path / "metrics.csv").write_text(table)
    with pytest.raises(InputError, match="is damaged"):
        earlier_rows(tmp_path / "metrics.csv")


def test_checks_say_where_and_what():
    check = record({"a": table(whole(0, 9)), "b": same([1, "x"])}, {"c": number()})
    assert check({"a": {"x": 9}, "b": (1, "x"), "c": 2}) is None
    assert check({"a": {"x": True}, "b": [1, "x"]}) == ".a.x is true or false, not a whole number"
    assert check({"a": {"x": 10}, "b": [1, "x"]}) == ".a.x is 10, not within 0 and 9"
    assert check({"a": {}, "b": [1, "y"]}) == ".b[1] is 'y', not 'x'"
    assert check({"a": {}}) == " has no b"
    assert check({"a": {}, "b": [1, "x"], "c": float("nan")}) == ".c is nan, not within -inf and inf"
    assert check({"a": {}, "b": [1, "x"], "c": 10**400}) == ".c has 1329 bits, more than a float can tell apart"
    assert check({"a": {}, "b": [1, "x"], 7: 1}) == " has the key 7, which nothing reads"
    assert alike({"n": 0, "f": 1.0, "t": "x", "b": [True]})({"n": 5, "f": 0.5, "t": "x", "b": [False]}) is None
    assert json.dumps(alike(1)(1.0)) == '" is a number, not a whole number"'


def test_a_look_at_one_run_is_not_counted_by_another_around_it(soup, tmp_path):
    outer = shutil.copytree(soup, tmp_path / "outer")
    inner = shutil.copytree(soup, outer / "got")
    (inner / "summary.json").unlink()
    write_summary(outer, {"status": "finished", "sealed": 1})
    for folder in (inner, inner / "checkpoints" / "last.ckpt"):
        read_again(folder)
        assert read_summary(outer)["sealed"] == 1
    read_again(outer / "member_0")
    assert read_summary(outer)["sealed"] == 2


def test_a_run_that_goes_on_downloads_nothing(soup, tmp_path, capsys):
    run = shutil.copytree(soup, tmp_path / "run")
    with (run / "overrides.txt").open("a") as f:
        f.write(f"data=mnist\ndata.root={tmp_path}/far/away\n")
    with pytest.raises(SystemExit, match="2"):
        main([f"ckpt={run}"])
    assert "a checkpoint may not download" in capsys.readouterr().err
    assert not (tmp_path / "far").exists()
