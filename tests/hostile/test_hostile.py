"""Every attack over every door is refused in one line or does no harm; the canary is shown to sing."""

import os

import pytest
import torch

from knep.utils.memory import keep_freed_memory
from tests.cells import thinned
from tests.exhaustive.fuzzing.arena import run

from .attack import fight
from .catalogue import ATTACKS
from .checkpoints import Call, named
from .doors import warm

LIGHT = [name for name, attack in ATTACKS.items() if not attack.heavy]


@pytest.fixture(scope="module", autouse=True)
def _warm():
    warm()


def test_there_are_enough_attacks():
    assert len(LIGHT) >= 60
    assert {attack.door for attack in ATTACKS.values()} >= {"train", "resume", "command", "read"}


@pytest.mark.parametrize("name", thinned(LIGHT, len(LIGHT) // 3))
def test_an_attack(name, tmp_path):
    assert fight(ATTACKS[name], tmp_path).wrong == []


def unpickle(arguments):
    torch.load(arguments[0], weights_only=False)


@pytest.mark.parametrize(
    ("gadget", "said"),
    [
        (Call(os.system, "touch ../outside/canary"), "os.system"),
        (Call(open, "../outside/canary", "w"), "open"),
        (Call(open, "../outside/secret"), "secret"),
        (Call(os.mkdir, "../outside/new"), "os.mkdir"),
    ],
)
def test_the_canary_sings_where_a_pickle_is_let_run(gadget, said, tmp_path):
    for name in ("work", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret").touch()
    torch.save({"x": gadget}, tmp_path / "work" / "evil.ckpt")
    outcome = run(unpickle, [str(tmp_path / "work" / "evil.ckpt")], tmp_path / "work")
    assert any(said in event for event in outcome.events)


@pytest.mark.parametrize("kept", [False, True])
def test_memory_is_measured(tmp_path, kept):
    (tmp_path / "work").mkdir()
    if kept:  # as a run in this process has it; what is freed here must not hide what a child takes
        keep_freed_memory()
        torch.ones(30 << 20)
    outcome = run(lambda arguments: torch.ones(20 << 20), [], tmp_path / "work")
    assert 80 << 20 <= outcome.grew < 120 << 20


def test_a_hang_is_stopped(tmp_path):
    (tmp_path / "work").mkdir()
    assert run(lambda arguments: os.read(os.pipe()[0], 1), [], tmp_path / "work", seconds=0.2).code is None


def test_a_pickle_by_hand_is_one():
    import pickle

    assert pickle.loads(named("builtins", "len", "abc")) == 3
