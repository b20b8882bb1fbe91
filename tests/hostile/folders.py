"""Folders and configs that decide too much: modules beside a run, what has no end, pipes, and names for a terminal."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.exhaustive.fuzzing.arena import Outcome

from .attack import Attack, Place
from .configs import SGD, _images, _set, _untouched, extra, listed, option, stored
from .runs import SMALL, a_run

EVIL = "open('../outside/canary', 'w')\nimport torch\ndef build(**k): return torch.nn.Identity()\n"
BILLION, MILLION = 10**9, 10**6


def beside(module: str, *command: str, said: str | None = None) -> Attack:
    """A module of that name in the current folder, which has a run in it, and a command."""

    def build(place: Place) -> list[str]:
        a_run(place)
        path = place.work / module
        path.parent.mkdir(exist_ok=True)
        path.write_text(EVIL)
        (place.work / "own.py").write_text("from statistics import mean\n" + EVIL)
        return list(command)

    door = "train" if command[0].startswith("recipe=") else "command"
    return Attack(door, build, said or "", tamed=None if said else _untouched)


def files(kind: Callable[[Path], object], name: str, *more: str, said: str = "", door: str = "resume") -> Attack:
    """A run folder in which one of its files is of another kind."""

    def build(place: Place) -> list[str]:
        path = a_run(place) / name
        if path.is_file():
            path.unlink()
        path.parent.mkdir(exist_ok=True)
        kind(path)
        run = str(place.work / "run")
        return {
            "resume": [run, "trainer.max_epochs=2"],
            "command": ["evaluate", run],
            "train": ["recipe=none", f"hydra.run.dir={run}", "data.limit=100", *more],
        }[door]

    return Attack(door, build, said or "a file belongs")


def _file(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.touch()


def linked(name: str, door: str, said: str = "leads outside") -> Attack:
    """A run folder in which a name that knep writes is a link to a file of the reader's."""

    def build(place: Place) -> list[str]:
        run = a_run(place)
        newest = int(Path("/proc/loadavg").read_text().split()[-1])  # the process that was begun last
        names = [name.format(newest + i) for i in range(300)] if "{}" in name else [name]
        for own in names:
            place_of = run / own
            place_of.unlink(missing_ok=True)
            place_of.symlink_to(place.secret)
        (place.work / "sweep").mkdir()
        (place.work / "sweep" / "0").symlink_to(run)
        return {
            "resume": [str(run), "trainer.max_epochs=2"],
            "command": ["evaluate", str(run)],
            "train": [*SMALL, f"hydra.run.dir={run}"],
            "sweep": [*SMALL, "-m", "seed=0,1", f"hydra.sweep.dir={run}"],
            "job": [*SMALL, "-m", "seed=0,1", f"hydra.sweep.dir={place.work / 'sweep'}"],
        }[door]

    entrance = {"sweep": "train", "job": "train"}.get(door, door)
    if door == "command":
        return Attack(entrance, build, tamed=_untouched)
    return Attack(entrance, build, said)


def checkout(config: str, attributes: str = "") -> Attack:
    """A folder from somebody else with a run in it, which is a checkout whose own config names a program."""

    def build(place: Place) -> list[str]:
        run = a_run(place)
        as_who = ("-c", "user.name=a", "-c", "user.email=a@b")
        for line in (("init", "-q"), ("add", "-A"), (*as_who, "commit", "-qm", "x")):
            subprocess.run(["git", "-C", str(place.work), *line], check=True, capture_output=True)
        with (place.work / ".git" / "config").open("a") as f:
            f.write(config.format(f"touch {place.canary}; cat"))
        (place.work / ".gitattributes").write_text(attributes)
        (run / "git_hash.txt").write_text("another\n")
        return [str(run), "trainer.max_epochs=2"]

    return Attack("resume", build, tamed=_untouched)


def chosen(kind: Callable[[Path], object], said: str) -> Attack:
    """An option that is no file, in a folder that is searched."""

    def build(place: Place) -> list[str]:
        path = place.work / "conf" / "optimizer" / "evil.yaml"
        path.parent.mkdir(parents=True)
        kind(path)
        return ["recipe=none", "optimizer=evil", f"hydra.searchpath=[file://{place.work}/conf]"]

    return Attack("train", build, said)


def unused(kind: Callable[[Path], object]) -> Attack:
    """The same, where another option is chosen: it is as if it were not there."""

    def build(place: Place) -> list[str]:
        path = place.work / "conf" / "optimizer" / "evil.yaml"
        path.parent.mkdir(parents=True)
        kind(path)
        path.with_name("fine.yaml").write_text(SGD + "lr: 0.1\n")
        return ["recipe=none", "optimizer=fine", "data.limit=100", f"hydra.searchpath=[file://{place.work}/conf]"]

    return Attack("train", build, tamed=_untouched)


def searched(place: str) -> Attack:
    return Attack("train", lambda _: ["recipe=none", f"hydra.searchpath=['{place}']"], "search path")


def typed(*lines: str, said: str) -> Attack:
    return Attack("train", lambda _: ["recipe=none", *lines], said)


def many_files(place: Place) -> list[str]:
    """Forty options, each of which takes in the next one twice."""
    folder = place.work / "conf" / "optimizer"
    folder.mkdir(parents=True)
    for i in range(40):
        (folder / f"x{i}.yaml").write_text(f"defaults: [x{i + 1}@a, x{i + 1}@b]\n")
    (folder / "x40.yaml").write_text("a: 1\n")
    return ["recipe=none", "optimizer=x0", f"hydra.searchpath=[file://{place.work}/conf]"]


def deep(place: Place) -> list[str]:
    """Aliases that laugh, in a file three folders deep that an option takes in."""
    folder = place.work / "conf" / "optimizer"
    (folder / "a" / "b" / "c").mkdir(parents=True)
    laughs = ["a0: &a0 [ha, ha]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    (folder / "a" / "b" / "c" / "laughs.yaml").write_text("\n".join(laughs))
    (folder / "evil.yaml").write_text(f"defaults: [a/b/c/laughs]\n{SGD}")
    return ["recipe=none", "optimizer=evil", f"hydra.searchpath=[file://{place.work}/conf]"]


def by_reference(text: str) -> Attack:
    lines = "".join(f"x{i}: {text.format(f'${{optimizer.x{i - 1}}}')}\n" for i in range(1, 60))
    return option(f"{SGD}x0: [1, 1]\n{lines}")


def workers(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def all_of(config: dict[str, Any]) -> None:
        config["data"] = {"_target_": "knep.data.image_folder.ImageFolder", "root": ".", "size": 8, "channels": 1}
        change(config)

    return all_of


def embedding(at: str, partial: bool = False, rows: int = BILLION) -> Callable[[dict[str, Any]], None]:
    node = {"_target_": "torch.nn.Embedding", "num_embeddings": rows, "embedding_dim": 1}
    return _set(at, node | ({"_partial_": True} if partial else {}))


def _plain(place: Place, outcome: Outcome) -> str:
    """What reaches a terminal is letters alone, whatever the folders are called."""
    odd = {c for c in outcome.out + outcome.err if unicodedata.category(c)[0] == "C" and c not in "\n\r\t"}
    return f"a terminal obeys {sorted(odd)}" if odd else ""


def named(name: str, *more: str) -> Attack:
    """A run in a folder of that name."""
    folder = name.replace("'", "\\'")
    lines = ["recipe=none", "data.limit=100", "data.batch_size=50", f"hydra.run.dir='{folder}'", *more]
    return Attack("train", lambda _: lines, tamed=_plain)


def classes(name: str) -> Attack:
    """Images whose class folders are called like that."""

    def build(place: Place) -> list[str]:
        images = _images(place)
        (images / "3").rename(images / name)
        return ["recipe=none", "data=image_folder", f"data.root={images}", "data.size=8", "data.channels=1",
                "data.batch_size=10", "data.workers=0"]  # fmt: skip

    return Attack("train", build, tamed=_plain)


def called(name: str) -> Attack:
    """An option whose file is called like that."""

    def build(place: Place) -> list[str]:
        path = place.work / "conf" / "optimizer" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(SGD + "lr: 0.1\n")
        return ["recipe=none", f"optimizer='{name}'", "data.limit=100", f"hydra.searchpath=[file://{place.work}/conf]"]

    return Attack("train", build, tamed=_plain, refusal=True)


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path.name)
    os.chdir(here)


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


ENSEMBLE = "averaging=ensemble\naveraging.members=1000000000"
LIFTS = "budget.layers=1e12\nmodel.convs=1000000"
OWN = ("recipe=none", "model=import", "model.path=own:build")
IMAGES = "data=image_folder\ndata.root=.\ndata.workers=3000"
_ALL = {
    "beside: a package of the export": beside("safetensors.py", "export", "run", "m.safetensors"),
    "beside: a folder of one": beside("safetensors/__init__.py", "export", "run", "m.safetensors"),
    "beside: a name of Python's": beside("colorsys.py", "export", "run", "m.safetensors", "--allow", "nobody."),
    "beside: what the user's own imports": beside("statistics.py", *OWN, said="rename yours"),
    "beside: what the user allows": beside(
        "torchvision.py", "recipe=none", "model=import", "model.path=torchvision:build", said="rename yours"
    ),
    "beside: a plan": beside("torchvision.py", "plan", "--model", "torchvision.models:resnet18", said="rename yours"),
    "beside: a doctor": beside("colorsys.py", "doctor", "--model", "colorsys:build", said="rename yours"),
    "stored: augment of a billion rows": stored(embedding("augment"), "Embedding"),
    "stored: data of a billion rows": stored(embedding("data"), "MB"),
    "stored: data with a part of a billion rows": stored(
        _set("data.extra", {"_target_": "torch.nn.Embedding", "num_embeddings": BILLION, "embedding_dim": 1}), "MB"
    ),
    "stored: norm of a billion rows": stored(embedding("norm", partial=True), "norm"),
    "stored: scaling of a billion rows": stored(embedding("scaling", partial=True), "scaling"),
    "stored: rows beyond numbers": stored(embedding("augment", rows=10**30), "augment"),
    "stored: regularization of ten million layers": stored(
        _set("regularization", {"_target_": "torch.nn.LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 10**7}),
        "steps",
    ),
    "stored: a transformer without end": stored(
        _set("augment", {"_target_": "torch.nn.Transformer", "d_model": 2, "nhead": 1, "num_encoder_layers": 10**8}),
        "steps",
    ),
    "stored: a million convolutions": stored(_set("model.convs", MILLION), "layers"),
    "stored: a trillion convolutions": stored(_set("model.convs", 10**12), "convs"),
    "stored: widths of a billion": stored(_set("model.widths", [BILLION, BILLION])),
    "stored: three thousand workers": stored(workers(_set("data.workers", 3000)), "data.workers=3000"),
    "stored: images of a million pixels": stored(workers(_set("data.size", MILLION)), "data.size"),
    "stored: lifts its own limit": stored(
        lambda c: c.update(budget={"layers": 10**12}, model=c["model"] | {"convs": MILLION}), "layers"
    ),
    "overrides: a million convolutions": listed("model.convs=1000000", "convs"),
    "overrides: lifts its own limit": listed(LIFTS, "convs"),
    "overrides: lifts it by force": listed(f"++{LIFTS}", "convs"),
    "overrides: lifts all of them": listed("budget={layers:1e12}\nmodel.convs=1000000", "budget"),
    "overrides: three thousand workers": listed(IMAGES, "data.workers=3000"),
    "overrides: augment of a billion rows": listed(
        "augment._target_=torch.nn.Embedding\n+augment.num_embeddings=1000000000\n+augment.embedding_dim=1", "MB"
    ),
    "overrides: 99 processes": listed("trainer.devices=99", "trainer.devices=99"),
    "overrides: processes by name": listed("trainer.devices='99'", "99 processes"),
    "overrides: a list of processes": listed(f"trainer.devices=[{','.join('0' * 90)}]", "90 processes"),
    "overrides: a billion members": listed("trainer.members=1000000000", "trainer.members"),
    "overrides: a billion members of an ensemble": listed(ENSEMBLE, "averaging.members"),
    "overrides: a thousand machines": listed("trainer.num_nodes=1000", "trainer.num_nodes"),
    "option: lifts its own limit": extra("budget: {layers: 1000000000}\nmodel: {convs: 1000000}\n", "budget.layers"),
    "typed: no limit": typed("budget.layers=much", said="budget.layers"),
    "typed: a limit that is none": typed("budget.layers=-1", said="budget.layers"),
    "option: laughs by reference": by_reference("['{0}', '{0}']"),
    "option: laughs in a text": by_reference("'{0}{0}'"),
    "option: laughs in groups": by_reference("{{a: '{0}', b: '{0}'}}"),
    "option: laughs, relative": option(
        SGD + "x0: [1, 1]\n" + "".join(f"x{i}: ['${{..x{i - 1}}}', '${{..x{i - 1}}}']\n" for i in range(1, 50))
    ),
    "option: defaults without end": Attack("train", many_files, "defaults"),
    "option: laughs three folders deep": Attack("train", deep, "aliases"),
    "option: a set": option(SGD + "lr: !!set {a, b}\n", "!!set"),
    "option: a time": option(SGD + "lr: !!timestamp 2001-12-14\n", "!!timestamp"),
    "option: bytes in base 64": option(SGD + "lr: !!binary aGVsbG8=\n", "!!binary"),
    "option: an ordered list": option(SGD + "lr: !!omap [a: 1]\n", "!!omap"),
    "option: a tag of one's own": option(SGD + "lr: !evil 1\n", "!evil"),
    "option: a tag with terminal codes": option(SGD + "lr: !<\\e[31m> 1\n"),
    "option: a number of 5,000 digits": option(SGD + f"lr: {'9' * 5000}\n"),
    "option: keys that are no text": option(SGD + "1: a\nnull: b\ntrue: c\n2.5: d\n"),
    "option: a list for a key": option(SGD + "? [a, b]\n: 1\n"),
    "option: a key without value": option("_target_\n"),
    "option: lists 2,000 deep": option(SGD + "lr: " + "[" * 2000 + "]" * 2000 + "\n"),
    "option: a megabyte": option(SGD + f"# {'x' * (2 << 20)}\n", "1 MiB"),
    "option: two documents": option(SGD + "---\na: 1\n"),
    "option: takes itself in": option("defaults: [evil]\n" + SGD),
    "option: a pipe": chosen(os.mkfifo, "evil"),
    "option: a socket": chosen(bind, "evil"),
    "option: a folder": chosen(Path.mkdir, "evil"),
    "option: a device": chosen(zero, "evil"),
    "option: a link in a circle": chosen(lambda path: path.symlink_to(path), "evil"),
    "option: a pipe that nobody asks for": unused(os.mkfifo),
    "option: a device that nobody asks for": unused(zero),
    "option: tags that nobody asks for": unused(lambda path: path.write_text("lr: !!set {a}\n")),
    "searched: http": searched("http://127.0.0.1:1/conf"),
    "searched: https": searched("https://example.org/conf"),
    "searched: ftp": searched("ftp://example.org/conf"),
    "searched: a scheme of nobody's": searched("s3://bucket/conf"),
    "searched: Hydra's own": searched("structured://conf"),
    "searched: a file": searched("file:///etc/passwd"),
    "searched: no package": searched("pkg://nobody.conf"),
    "searched: a package of the current folder": searched("pkg://own"),
    "searched: terminal codes": searched("\x1b[31m://x"),
    **{
        f"run folder: {name} is a pipe": files(os.mkfifo, name)
        for name in ("train.log", "metrics.csv", "summary.json", "config.yaml", "tensorboard/hparams.yaml", ".lock")
    },
    "run folder: overrides are a pipe": files(os.mkfifo, "overrides.txt"),
    "run folder: the checkpoint is a pipe": files(os.mkfifo, "checkpoints/last.ckpt", said="last.ckpt"),
    "run folder: the tested checkpoint is a pipe": files(
        os.mkfifo, "checkpoints/final.ckpt", said="did not finish", door="command"
    ),
    "run folder: the tested checkpoint is a device": files(
        zero, "checkpoints/final.ckpt", said="did not finish", door="command"
    ),
    "run folder: a socket": files(bind, "metrics.csv"),
    "run folder: the log of another run is a pipe": files(os.mkfifo, "train.log", door="train"),
    "run folder: the lock of another run is a socket": files(bind, ".lock", door="train"),
    "run folder: the lock is a folder": files(Path.mkdir, ".lock"),
    "run folder: the lock of another run is a folder": files(Path.mkdir, ".lock", door="train"),
    "run folder: half a checkpoint is a folder": files(Path.mkdir, "checkpoints/.last.ckpt.part"),
    "run folder: events are a file": files(_file, "tensorboard", said="a folder belongs"),
    "run folder: checkpoints are a file": files(_file, "checkpoints", said="a folder belongs", door="train"),
    **{
        f"run folder: {name} of a {door} is a link": linked(name, door)
        for door in ("resume", "train")
        for name in (".lock", "train.log", "metrics.csv", "summary.json", "checkpoints/.best.ckpt.part")
    },
    "run folder: half a summary is a link": linked(".summary.json.{}", "command"),
    "run folder: half a config is a link": linked(".config.yaml.{}", "resume"),
    "sweep folder: the rows are a link": linked(".jobs", "sweep"),
    "sweep folder: the list is a link": linked("multirun.yaml", "sweep"),
    "sweep folder: a job's log is a link": linked("train.log", "job"),
    "checkout: a monitor": checkout('[core]\n\tfsmonitor = "{}"\n'),
    "checkout: a tool for differences": checkout('[diff]\n\texternal = "{}"\n'),
    "checkout: a driver": checkout('[diff "x"]\n\tcommand = "{0}"\n\ttextconv = "{0}"\n', "* diff=x\n"),
    "checkout: a filter": checkout(
        '[filter "x"]\n\tclean = "{0}"\n\tprocess = "{0}"\n\trequired = true\n', "* filter=x\n"
    ),
    "named: all of it": named("a[/b][red]:smile:\x1b[31m\x9b\u202e\x1b]0;owned\x07"),
    "named: markup": named("a[/b]c"),
    "named: markup of a colour": named("[red]a[/]"),
    "named: terminal codes": named("a\x1b[31mb"),
    "named: a title of the terminal": named("a\x1b]0;owned\x07"),
    "named: from right to left": named("a\u202egpj.exe"),
    "named: a picture": named(":smile:"),
    "named: C1 codes": named("a\x9b31mb"),
    "named: for the doctor": named("[/]x", "callbacks=doctor"),
    "classes: all of it": classes("[b]:smile:\x1b[31m\u202e"),
    "classes: markup": classes("[b]"),
    "classes: terminal codes": classes("\x1b[31mred"),
    "classes: from right to left": classes("\u202eabc"),
    "called: terminal codes": called("\x1b[31m"),
    "called: markup": called("[b]"),
}  # fmt: skip
# The same kind as another row, or seconds long.
_HEAVY = (
    "stored: lifts its own limit",
    "stored: regularization of ten million layers",
    "stored: scaling of a billion rows",
    "overrides: lifts it by force",
    "overrides: a million convolutions",
    "overrides: processes by name",
    "overrides: a list of processes",
    "overrides: a billion members",
    "option: laughs in groups",
    "option: laughs in a text",
    "option: a device that nobody asks for",
    "option: tags that nobody asks for",
    "option: lists 2,000 deep",
    "beside: a name of Python's",
    "beside: a plan",
    "named: markup",
    "named: markup of a colour",
    "named: a title of the terminal",
    "named: from right to left",
    "named: a picture",
    "named: C1 codes",
    "named: for the doctor",
    "named: terminal codes",
    "classes: markup",
    "classes: from right to left",
    "classes: terminal codes",
    "called: markup",
    "beside: what the user allows",
    "overrides: three thousand workers",
)
ATTACKS = {name: replace(attack, heavy=name in _HEAVY) for name, attack in _ALL.items()}
