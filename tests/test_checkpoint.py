"""Checkpoint files are whole or absent, and a damaged one never loads."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from knep.engine.checkpointing import interval
from knep.engine.load import read_checkpoint
from knep.errors import InputError, RunFailed
from knep.io import checkpoint
from knep.io.find_checkpoint import find_whole
from tests.exhaustive import kill_checkpoints

STATE = {"state_dict": {"w": torch.arange(300.0)}, "knep": {"config": {}}, "global_step": 3}


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    checkpoint.write(STATE, path)
    return path


def test_what_is_written_is_read_by_us_and_by_torch(stored):
    for state in (checkpoint.read(stored), torch.load(stored, weights_only=True)):
        assert torch.equal(state["state_dict"]["w"], STATE["state_dict"]["w"])
        assert state["global_step"] == 3
    assert [p.name for p in stored.parent.iterdir()] == ["last.ckpt"]


def test_a_file_of_torch_alone_is_read(tmp_path):
    torch.save(STATE, tmp_path / "theirs.ckpt")
    assert checkpoint.read(tmp_path / "theirs.ckpt")["global_step"] == 3


def test_every_flipped_bit_is_found(stored):
    whole, draw = stored.read_bytes(), random.Random(0)
    bits = [draw.randrange(len(whole) * 8) for _ in range(50)]
    bits += range((len(whole) - 98) * 8, len(whole) * 8, 7)  # the archive's last record and the checksum
    for bit in bits:
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        stored.write_bytes(broken)
        assert checkpoint.damage(stored), bit


def test_every_truncation_is_found(stored):
    whole, draw = stored.read_bytes(), random.Random(1)
    for size in [*(draw.randrange(len(whole)) for _ in range(50)), *range(len(whole) - 98, len(whole), 5), 0, 1]:
        stored.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"last\.ckpt is (empty, so truncated|truncated or damaged)"):
            read_checkpoint(stored)


def test_the_newest_whole_one_is_used(stored, capsys):
    best = stored.with_name("best.ckpt")
    shutil.copy(stored, best)
    os.utime(best, ns=(0, 0))
    assert find_whole(stored.parent.parent) == stored
    stored.write_bytes(stored.read_bytes()[:-1])
    assert find_whole(stored.parent.parent) == best
    said = capsys.readouterr().err
    assert "last.ckpt is truncated or damaged: going on from best.ckpt" in said
    assert said.count("\n") == 1
    best.write_bytes(b"")
    with pytest.raises(InputError, match="no whole checkpoint is left"):
        find_whole(stored.parent.parent)


def test_a_kill_while_writing_leaves_a_whole_one(tmp_path):
    path, draw = tmp_path / "last.ckpt", random.Random(2)
    weights = torch.arange(500_000.0)  # 2 MB
    checkpoint.write({"step": 0, "weights": weights}, path)
    steps, parts = [], 0
    for _ in range(40):
        child = os.fork()
        if not child:
            step = 0
            while True:
                step += 1
                checkpoint.write({"step": step, "weights": weights}, path)
        time.sleep(draw.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = checkpoint.read(path)
        assert torch.equal(state["weights"], weights)
        steps.append(state["step"])
        parts += path.with_name(".last.ckpt.part").exists()
    assert max(steps) > 0
    assert parts  # some kills did come in the middle of a write


def test_the_script_counts_what_is_lost(tmp_path, monkeypatch):
    found = kill_checkpoints.kills(6, 1, tmp_path) | kill_checkpoints.damages(10, 5, 1, tmp_path)
    good = {"kills": 6, "none whole": 0, "older than one interval": 0, "flips": 10, "flips not found": 0}
    assert found.items() >= (good | {"truncations": 5, "truncations not found": 0}).items()
    monkeypatch.setattr(checkpoint, "damage", lambda path: None)
    found = kill_checkpoints.damages(3, 2, 0.1, tmp_path)
    assert (found["flips not found"], found["truncations not found"]) == (3, 2)


def test_no_room_is_one_clear_line_and_the_earlier_one_stays(stored, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = stored.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match=r"last\.ckpt cannot be written \(No space left on device\)"):
        checkpoint.write({"other": 1}, stored)
    assert stored.read_bytes() == before
    assert [p.name for p in stored.parent.iterdir()] == ["last.ckpt"]


def test_intervals():
    assert [interval(e) for e in (None, 200, "30s", "5m", "1h")] == [(0, 0), (200, 0), (0, 30), (0, 300), (0, 3600)]
    for wrong in (0, -1, True, 2.5, "5", "m", "0s", "5 m", "5d"):
        with pytest.raises(InputError, match=r"checkpoint\.every="):
            interval(wrong)
