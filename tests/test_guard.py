"""A bad step is caught before it counts: by what, at which step, and what is done about it."""

import csv
import json
import signal
from typing import ClassVar

import pytest
import torch
from lightning import pytorch as L
from lightning.pytorch import Callback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import knep
from knep.config.compose import compose_config
from knep.config.instantiate import allow, instantiate
from knep.config.schema import RunConfig
from knep.engine.fit import fit_member
from knep.errors import InputError, RunFailed
from knep.guard import deferred
from knep.guard.finite import Copies, digest, finite, first_bad
from knep.guard.loss_spikes import Spikes
from knep.guard.policy import Guard
from tests.exhaustive import guard_matrix as matrix
from tests.exhaustive import resume_matrix

# A slice of tests/exhaustive/guard_matrix.py: (fault, value, action, precision, variant, batch).
CASES = [
    ("inputs", "nan", "stop", "bf16-mixed", "plain", 4),
    ("inputs", "inf", "skip", "32-true", "lightning", 5),
    ("loss", "inf", "stop", "32-true", "window", 8),
    ("layer", "nan", "rollback", "32-true", "window", 12),
    ("gradient", "inf", "stop", "32-true", "lightning", 9),
    ("gradient", "nan", "rollback", "bf16-mixed", "sam", 9),
    ("optimizer", "nan", "stop", "32-true", "sam", 8),
    ("optimizer", "inf", "skip", "32-true", "plain", 8),
    ("gradient", "nan", "stop", "bf16-mixed", "plain", 10),
    ("second", "inf", "stop", "32-true", "plain", 8),
    ("second", "inf", "rollback", "32-true", "window", 12),
    ("layer", "inf", "stop", "bf16-mixed", "late", 12),
    ("second", "inf", "stop", "32-true", "late", 8),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_fault_is_caught_at_its_step_and_reaches_no_checkpoint(case, tmp_path):
    assert matrix.try_case(matrix.Case(*case), tmp_path / "run").startswith("caught: ")


@pytest.mark.parametrize(
    ("batch", "met"), [(8, 9), (9, 9), (13, 13)], ids=["amid", "before a checkpoint", "at the end"]
)
def test_a_late_verdict_is_read_at_the_end_of_the_next_step_or_before_anything_is_kept(
    batch, met, tmp_path, monkeypatch
):
    seen = []
    answer = deferred.LateSentry.answer
    monkeypatch.setattr(
        deferred.LateSentry,
        "answer",
        lambda self, bad: seen.append((bad.step, self.trainer.global_step)) or answer(self, bad),
    )
    case = matrix.Case("gradient", "nan", "stop", "32-true", "late", batch)
    assert matrix.try_case(case, tmp_path / "run").startswith("caught: the gradient is not finite")
    assert seen == [(batch, met)]


def test_a_late_sentry_reads_no_number_of_a_step_while_it_runs(tmp_path):
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    class Counting(Callback):
        counts: ClassVar[list[int]] = []

        def on_train_batch_start(self, *_):
            self.mode = Reads().__enter__()

        def on_train_batch_end(self, *_):
            self.mode.__exit__(None, None, None)
            self.counts.append(self.mode.count)

    allow("tests.exhaustive.guard_matrix.")
    lines = [*matrix.BASE, "checkpoint.every=null", "log_every=1000", "clip=norm"]
    config = compose_config(lines).config
    data = instantiate(config["data"])
    data.prepare()
    counts = {}
    for on in (False, True):
        Counting.counts = []
        with matrix.judged_late(on):
            fit_member(RunConfig.of(config), data, tmp_path / str(on), config["seed"], [Counting()])
        counts[on] = Counting.counts
    quiet = [i for i in range(matrix.BATCHES) if i not in (0, matrix.BATCHES - 1)]  # the first is logged
    assert all(counts[False][i] > 0 for i in quiet)
    assert all(counts[True][i] == 0 for i in quiet)


def test_without_a_guard_the_fault_reaches_the_weights(tmp_path):
    case = matrix.Case("gradient", "nan", "none", "32-true", "plain", 8)
    assert matrix.try_case(case, tmp_path / "run") == "missed: nobody looks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_anywhere_is_found(dtype, bad):
    tensors = [torch.randn(3, 5).to(dtype), torch.randn(7).to(dtype), torch.randn(2, 3, 4, 4).to(dtype)]
    assert finite(tensors)
    for i, t in enumerate(tensors):
        kept = t.flatten()[-1].clone()
        t.view(-1)[-1] = bad
        assert not finite(tensors)
        assert first_bad([(str(k), x) for k, x in enumerate(tensors)]) == str(i)
        t.view(-1)[-1] = kept


def test_what_overflows_when_summed_is_finite_all_the_same():
    assert finite([torch.full((10,), 3e38), torch.full((10,), 6e4, dtype=torch.float16)])
    assert finite([])


def test_copies_go_back_to_the_bit_and_a_digest_sees_one_bit():
    parameter = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    copies, before = Copies([parameter]), digest([("w", parameter)])
    copies.take()
    with torch.no_grad():
        parameter[0, 0, 0, 0] = torch.nextafter(parameter[0, 0, 0, 0], torch.tensor(9.0))
    assert digest([("w", parameter)]) != before
    copies.restore()
    assert digest([("w", parameter)]) == before


def test_the_robust_score_of_a_loss():
    losses = [1.0 + 0.5 * (-1) ** i for i in range(100)]  # median 1, MAD 0.5
    spikes = Spikes(10.0, losses)
    assert spikes.score(1 + 10 * 1.4826 * 0.5) == pytest.approx(10)
    assert spikes.strikes(8.5)
    assert not spikes.strikes(8.3)
    assert Spikes(10.0, [0.001] * 100).score(0.501) == pytest.approx(5)  # 0.1 nats are the least deviation


def test_no_spike_before_the_window_is_full_nor_below_an_earlier_loss():
    assert not Spikes(1.0, [0.0] * 99).strikes(1e9)
    assert Spikes(1.0, [0.0] * 100).strikes(1e9)
    assert not Spikes(1.0, [0.0] * 99 + [2e9]).strikes(1e9)
    assert not Spikes(None, [0.0] * 100).strikes(1e9)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"action": "jump"}, "guard.action=jump"),
        ({"spike": 0}, "guard.spike=0"),
        ({"spike": "high"}, "guard.spike=high"),
        ({"spike": True}, "guard.spike=True"),
        ({"budget": -1}, "guard.budget=-1"),
        ({"budget": 1.5}, "guard.budget=1.5"),
        ({"backoff": 0}, "guard.backoff=0"),
        ({"backoff": float("nan")}, "guard.backoff=nan"),
    ],
)
def test_settings_out_of_range_are_refused(values, said):
    with pytest.raises(InputError) as refused:
        Guard(**values)
    assert said in str(refused.value)


def test_a_budget_ends_in_a_stop():
    guard = Guard(action="rollback", budget=2, backoff=0.5)
    assert [guard.decide("loss") for _ in range(3)] == ["rollback", "rollback", "stop"]
    assert guard.factor == 0.25
    again = Guard(action="rollback", budget=2, backoff=0.5)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.report() == guard.report() == {"action": "rollback", "interventions": 3, "loss": 3}


class Spoiled(Callback):
    """Makes the loss of the given batches of a run a thousand times what it is, or NaN."""

    def __init__(self, *batches, factor=float("nan")):
        self._batches, self._factor, self.weights = batches, factor, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        number = trainer.current_epoch * resume_matrix.BATCHES + batch_idx
        # A state that a run that was killed and resumed has too.
        pl_module.recipe.regularization.penalty = (
            (lambda params: params[0].sum() * 0 + self._factor) if number in self._batches else (lambda params: 0.0)
        )
        self.weights[number] = next(pl_module.model.parameters()).detach().clone()
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]


def run(lines, folder, *callbacks, resume=False):
    return resume_matrix.fit(["optimizer=adamw", *lines], folder, callbacks, resume)


def test_skip_leaves_the_weights_and_goes_on_with_the_next_batch(tmp_path):
    spoiled = Spoiled(9)
    run(["guard=skip"], tmp_path / "run", spoiled)
    assert torch.equal(spoiled.weights[9], spoiled.weights[10])
    assert not torch.equal(spoiled.weights[10], spoiled.weights[11])
    rows = {int(r["step"]): r for r in csv.DictReader((tmp_path / "run" / "metrics.csv").open())}
    assert {step for step, row in rows.items() if row["guard/interventions"]} == {9}


def test_rollback_goes_back_to_the_last_checkpoint_at_a_lower_rate(tmp_path):
    spoiled = Spoiled(10)
    run(["guard=rollback", "guard.backoff=0.25"], tmp_path / "run", spoiled)
    assert torch.equal(spoiled.weights[11], spoiled.weights[resume_matrix.BATCHES])  # saved at the end of an epoch
    assert not torch.equal(spoiled.weights[10], spoiled.weights[11])
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["running"]["guard"]["factor"] == 0.25
    assert spoiled.rate == 0.003  # the schedule's own rate is left alone


def test_a_lower_rate_makes_smaller_steps(tmp_path):
    moved = []
    for backoff in (1.0, 0.125):
        spoiled = Spoiled(0)
        run(["guard=rollback", f"guard.backoff={backoff}", "optimizer=sgd"], tmp_path / str(backoff), spoiled)
        moved.append((spoiled.weights[2] - spoiled.weights[1]).norm().item())
    assert moved[1] == pytest.approx(moved[0] / 8, rel=1e-3)


def test_a_spent_budget_stops_the_run(tmp_path):
    with pytest.raises(RunFailed, match="step 9: the loss is not finite"):
        run(["guard=skip", "guard.budget=2"], tmp_path / "run", Spoiled(3, 5, 9, 11))


def test_a_spike_is_dropped_and_a_healthy_run_has_none(tmp_path):
    lines = ["guard=skip", "guard.spike=100", "trainer.max_epochs=16", "data=synthetic", "data.images=150"]
    spoiled = Spoiled(105, factor=1e6)
    run([*lines, "scaling=unit"], tmp_path / "run", spoiled)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [int(r["step"]) for r in rows if r["guard/interventions"]] == [105]
    assert max(float(r["train/loss"]) for r in rows if r["train/loss"]) < 100


@pytest.mark.parametrize(
    "lines", [["guard=skip", "accumulate=3"], ["guard=rollback", "averaging=ema", "guard.spike=9"]]
)
def test_a_run_with_interventions_resumes_to_the_bit(lines, tmp_path):
    bad = (4, 12)
    run(lines, tmp_path / "whole", Spoiled(*bad))
    run(lines, tmp_path / "parts", Spoiled(*bad), resume_matrix.Strike(9, signal.SIGINT))
    run(lines, tmp_path / "parts", Spoiled(*bad), resume_matrix.Strike(13, signal.SIGINT), resume=True)
    run(lines, tmp_path / "parts", Spoiled(*bad), resume=True)
    traces = [resume_matrix.traces(tmp_path / name) for name in ("whole", "parts")]
    assert resume_matrix.difference(*traces) == "identical"


def test_the_guard_changes_no_bit_of_a_healthy_run(tmp_path):
    lines = ["averaging=ema", "norm=batch", "dropout=standard", "clip=norm"]
    kept = []
    for option in ("none", "stop", "rollback"):
        resume_matrix.fit([*lines, f"guard={option}"], tmp_path / option)
        traces = resume_matrix.traces(tmp_path / option)
        kept.append({k: v for k, v in traces.items() if "/running/guard" not in k})
    assert resume_matrix.difference(kept[0], kept[1]) == "identical"
    assert resume_matrix.difference(kept[0], kept[2]) == "identical"


def test_a_module_of_ones_own_stops_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    recipe = knep.load("none")
    x = torch.randn(8, 1, 2, 2)
    x[5] = float("nan")
    module = knep.LitModule(model, recipe, num_classes=2)
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loader = torch.utils.data.DataLoader(list(zip(x, torch.zeros(8, dtype=torch.long), strict=True)), batch_size=4)
    with pytest.raises(RunFailed, match=r"step 1: the loss is not finite, first in the batch's images"):
        trainer.fit(module, loader)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("lean", ["true", "false"])
def test_an_epoch_whose_steps_were_all_dropped_has_no_training_loss(lean, tmp_path, capsys):
    lines = ["recipe=baseline", "data=digits", "data.limit=256", "model=mlp", "trainer.max_epochs=2", "guard=skip"]
    run = compose_config(
        [*lines, "optimizer=sgd", "optimizer.lr=1e20", f"lean={lean}", "trainer.precision=32-true"]
    ).run
    data = instantiate(run.data)
    data.prepare()
    fitted = fit_member(run, data, tmp_path, 0)
    assert not fitted.interrupted
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/acc")]
    assert len(rows) == 2
    assert rows[0]["train/loss"]
    assert not rows[1]["train/loss"]
    assert "train/loss nan" in capsys.readouterr().out
