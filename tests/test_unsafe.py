"""`knep import-unsafe`: a pickle runs only where the user says so, in a child, and what comes out is plain."""

import os
from pathlib import Path

import pytest
import torch

from knep import checkpoint
from knep.cli import main
from knep.unsafe import FLAG


class Evil:
    """Writes its process's id and environment beside the canary, like any program could."""

    def __reduce__(self):
        write = "open(os.environ['HOME'] + '/../canary', 'w').write(f'{os.getpid()} {dict(os.environ)}')"
        code = f"import os; {write}"
        return (exec, (code,))


def pickled(folder):
    model = torch.nn.Linear(3, 2)
    extra = {"epoch": 3, "note": "hello", "model": model.state_dict(), "object": torch.nn.ReLU(), "evil": Evil()}
    torch.save(extra, folder / "foreign.pt")
    return model


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_nothing_runs_without_the_users_word(tmp_path, capsys):
    pickled(tmp_path)
    said = refusal(["import-unsafe", tmp_path / "foreign.pt", tmp_path / "plain.ckpt"], capsys)
    assert FLAG in said
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "plain.ckpt").exists()


def test_a_pickle_becomes_plain_in_a_child(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    model = pickled(tmp_path)
    main(["import-unsafe", str(tmp_path / "foreign.pt"), str(tmp_path / "plain.ckpt"), FLAG])
    said = capsys.readouterr().out
    assert "in a child process" in said
    assert "2 tensors and 2 plain values" in said
    state = checkpoint.read(tmp_path / "plain.ckpt")
    model.load_state_dict(state["state_dict"])
    assert state["values"] == {"epoch": 3, "note": "hello"}
    ran = (tmp_path / "canary").read_text()  # it does run: that is what the user was asked
    assert int(ran.split()[0]) != os.getpid()
    assert "hush" not in ran
    assert sorted(p.name for p in tmp_path.iterdir()) == ["canary", "foreign.pt", "plain.ckpt"]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(b"no pickle"), "cannot be converted"),
        (lambda path: torch.save({"a": 1}, path), "no tensors"),
        (lambda path: None, "missing"),
    ],
)
def test_what_is_no_checkpoint(write, said, tmp_path, capsys):
    write(tmp_path / "foreign.pt")
    assert said in refusal(["import-unsafe", tmp_path / "foreign.pt", Path(tmp_path / "plain.ckpt"), FLAG], capsys)
    assert not (tmp_path / "plain.ckpt").exists()
