"""`knep import-unsafe`: a pickle runs only where the user says so, in a child, and what comes out is plain."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from knep.cli.main import main
from knep.errors import InputError
from knep.io import checkpoint, import_pickle
from knep.io.import_pickle import FLAG, NETWORK


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


class Caller:
    """Calls at every door that it is told of, says which let it in, and leaves a tensor."""

    def __init__(self, doors):
        self.doors = doors

    def __reduce__(self):
        code = f"""
import os, socket, sys
got = []
for family, kind, address in {self.doors!r}:
    try:
        s = socket.socket(family, kind)
        s.connect(address)
        s.send(b"secret")
        got.append(address)
    except OSError:
        pass
if os.fork():
    sys.stderr.write("x" * (1 << 20))
else:
    os.setsid()  # stays behind
    os.execvp("sleep", ["sleep", "600"])
open(os.environ["HOME"] + "/../canary", "w").write(repr(got))
"""
        return (exec, (code,))


def test_what_is_imported_has_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    doors, heard = [], []
    for family, kind, address in (
        (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        (socket.AF_UNIX, socket.SOCK_STREAM, "door"),
        (socket.AF_UNIX, socket.SOCK_STREAM, f"\0knep{os.getpid()}"),
    ):
        heard.append(socket.socket(family, kind))
        heard[-1].bind(address)
        if kind == socket.SOCK_STREAM:
            heard[-1].listen()
        heard[-1].setblocking(False)
        at = heard[-1].getsockname()
        doors.append((int(family), int(kind), str(tmp_path / at) if at == "door" else at))
    torch.save({"state_dict": {"w": torch.ones(2)}, "evil": Caller(doors)}, tmp_path / "foreign.pt")
    main(["import-unsafe", "foreign.pt", "plain.ckpt", FLAG])
    assert (tmp_path / "canary").read_text() == "[]"  # it did run
    for door in heard:
        with pytest.raises(BlockingIOError):
            door.recv(9) if door.type == socket.SOCK_DGRAM else door.accept()
        door.close()


def test_where_the_network_stays_nothing_runs(tmp_path, capsys, monkeypatch):
    pickled(tmp_path)
    source, made = str(tmp_path / "foreign.pt"), str(tmp_path / "made")
    code = f"""import os, knep.io.import_pickle as u
u.take_network = lambda: False
u._child({source!r}, {made!r}, 9, False, os.getppid())"""
    child = subprocess.run([sys.executable, "-c", code], check=False, env={"HOME": made} | os.environ)
    assert child.returncode == import_pickle._KEEPS_NETWORK
    assert not (tmp_path / "canary").exists()
    refuses = tmp_path / "python"
    refuses.write_text(f"#!/bin/sh\nexit {import_pickle._KEEPS_NETWORK}\n")
    refuses.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(refuses))
    assert NETWORK in refusal(["import-unsafe", source, tmp_path / "plain.ckpt", FLAG], capsys)


class Answer:
    """Answers in the child's place, and ends it before it can."""

    def __reduce__(self):
        return (exec, ("import os, sys\nwith open(sys.argv[2], 'wb') as f: f.truncate(600 << 20)\nos._exit(0)",))


def test_a_child_that_answers_hundreds_of_megabytes(tmp_path, capsys):
    torch.save({"state_dict": Answer()}, tmp_path / "foreign.pt")
    said = refusal(["import-unsafe", tmp_path / "foreign.pt", tmp_path / "plain.ckpt", FLAG], capsys)
    assert "cannot be converted" in said
    assert [p.name for p in tmp_path.iterdir()] == ["foreign.pt"]


ONE = {"w": torch.ones(2)}
ANSWERS = {
    "nothing": (lambda path: None, "cannot be converted (why)"),
    "nonsense": (lambda path: path.write_bytes(b"\x1b[31m" * 99), "something else"),
    "no end": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2 << 20), "left 2,097,152 bytes"),
    "a pipe": (os.mkfifo, "left no file"),
    "a link": (lambda path: path.symlink_to("/dev/zero"), "left no file"),
    "a folder": (lambda path: path.mkdir(), "left no file"),
    "a list": (lambda path: torch.save([ONE], path), "something else"),
    "no weights": (lambda path: torch.save({"values": {}, "left_out": 0}, path), "something else"),
    "weights of text": (
        lambda path: torch.save({"state_dict": {"w": "x"}, "values": {}, "left_out": 0}, path),
        "something else",
    ),
    "a count of text": (lambda path: torch.save({"state_dict": ONE, "values": {}, "left_out": "0"}, path), "something"),
    "values of tensors": (
        lambda path: torch.save({"state_dict": ONE, "values": {"a": [ONE["w"]]}, "left_out": 0}, path),
        "something else",
    ),
    "values in a list": (lambda path: torch.save({"state_dict": ONE, "values": [], "left_out": 0}, path), "something"),
    "a program": (lambda path: torch.save({"state_dict": Evil(), "values": {}, "left_out": 0}, path), "something"),
}


def taken(made):
    import_pickle._check_made(made, 1 << 20, 0, made.with_name("foreign.pt"), "why")
    import_pickle._keep(made, made.with_name("foreign.pt"), made.with_name("plain.ckpt"))


@pytest.mark.parametrize("name", ANSWERS)
def test_what_a_child_leaves_is_looked_through(name, tmp_path):
    leave, said = ANSWERS[name]
    leave(tmp_path / "made")
    with pytest.raises(InputError) as refused:
        taken(tmp_path / "made")
    assert said in str(refused.value)
    assert not (tmp_path / "plain.ckpt").exists()
    assert not (tmp_path.parent / "canary").exists()
