"""Freed memory that stays with the process: fewer page faults, and a line that says so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from knep.cli.train import main
from knep.engine import fit
from knep.utils import memory

_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")

# Four blocks of 40 MiB, more than glibc keeps by itself, all alive at once and written to, as activations are.
_FAULTS = """
import resource, sys, torch
from knep.utils.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def step():
    return [torch.ones(10 * 2**20) for _ in range(4)] and None
for _ in range(8):  # the heap grows until it has room for aligned blocks beside each other
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _child(how: str, **env: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", _FAULTS, how]
    done = subprocess.run(command, env=clean | env, check=True, capture_output=True, text=True)
    return done.stdout.split()


@_glibc
def test_steps_that_follow_touch_no_new_pages() -> None:
    (kept, few), (left, many) = _child("keep"), _child("leave")
    assert (kept, left) == ("True", "False")
    assert int(few) < int(many) / 10


@pytest.mark.parametrize("setting", ["MALLOC_TRIM_THRESHOLD_=1000000", "GLIBC_TUNABLES=glibc.malloc.trim_threshold=1"])
def test_settings_of_the_users_own_stand(setting: str) -> None:
    name, _, value = setting.partition("=")
    assert _child("keep", **{name: value})[0] == "False"


@pytest.mark.parametrize(
    ("library", "preloaded"), [("musl", ""), ("glibc", "/usr/lib/libjemalloc.so.2"), ("glibc", "libtcmalloc.so.4")]
)
def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch, library: str, preloaded: str) -> None:
    def called(*_: object) -> None:
        raise AssertionError("mallopt was asked for")

    monkeypatch.setattr(memory.platform, "libc_ver", lambda: (library, "1"))
    monkeypatch.setattr(memory.ctypes, "CDLL", called)
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    memory.keep_freed_memory.cache_clear()
    try:
        assert not memory.keep_freed_memory()
    finally:
        memory.keep_freed_memory.cache_clear()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_asks_for_it_and_says_so(
    wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(fit, "keep_freed_memory", lambda: asked.append(True) or True)
    lines = ["model=mlp", "model.widths=[8]", "trainer=cpu", "trainer.max_steps=1", f"hydra.run.dir={tmp_path}/run"]
    main([*lines, f"keep_memory={str(wanted).lower()}"])
    assert asked == [True] * wanted
    assert ("freed memory kept" in capsys.readouterr().out) is wanted
