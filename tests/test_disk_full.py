"""A full disk: the last good checkpoint stays, one clear line, exit code 1; with room again the run goes on."""

import os
import resource
import shutil
import subprocess

import pytest
from lightning.pytorch import Callback

from knep.cli.train import main
from knep.engine.fit import build_trainer
from knep.io.run_folder import read_summary
from tests.exhaustive import resume_matrix as matrix

LINES = [*matrix.BASE, "checkpoint.every=2"]
AT = 12  # the batch in which the disk fills: the checkpoint of step 10 is the last good one


class Small:
    """A disk of 16 MB; where none can be mounted, a limit on the size of each file."""

    def __init__(self, folder):
        self.folder, self._ballast = folder, folder / "ballast"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, leave):
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(leave, 1), self._limit[1]))
            return
        with self._ballast.open("wb") as f:
            f.write(bytes(max(0, shutil.disk_usage(self.folder).free - leave)))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)
        self._ballast.unlink(missing_ok=True)

    def end(self):
        self.free()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    small = Small(tmp_path / "disk")
    yield small
    small.end()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run leaves that never stopped."""
    folder = tmp_path_factory.mktemp("disk_full") / "whole"
    matrix.fit(LINES, folder)
    return matrix.traces(folder)


class Fill(Callback):
    """Fills the disk within a batch of the run; what: the kind of file that is to meet it first."""

    def __init__(self, disk, what):
        self._disk, self._what = disk, what

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 != AT:
            return
        self._disk.fill(100_000 if self._what == "last.ckpt" else 0)
        if self._what == "metrics.csv":
            trainer.loggers = trainer.loggers[1:]
        if self._what == "events":
            trainer.loggers[0].experiment.add_text("much", "x" * 300_000)


def filling(callback):
    def build(*args):
        args[4].append(callback)
        return build_trainer(*args)

    return build


@pytest.mark.parametrize("what", ["last.ckpt", "metrics.csv", "events"])
def test_the_last_good_one_stays_and_the_run_goes_on(what, disk, whole, monkeypatch, capfd):
    folder = disk.folder / "run"
    monkeypatch.setattr("knep.engine.fit.build_trainer", filling(Fill(disk, what)))
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*LINES, f"hydra.run.dir={folder}"])
    monkeypatch.undo()
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert f"make room, then go on with ckpt={folder}" in said
    if disk.mounted:
        named = folder if what == "events" else what
        assert f"{named} cannot be written (No space left on device" in said
    summary = read_summary(folder)
    assert (summary["status"], summary["reason"]) == ("failed", said.removeprefix("knep: ").strip())
    last = matrix.torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == AT - 2
    disk.free()
    main([f"ckpt={folder}"])
    assert read_summary(folder)["status"] == "finished"
    assert matrix.difference(whole, matrix.traces(folder)) == "identical"
