"""Configs: in a run folder's overrides, in a checkpoint, and in a folder of options that the user searches."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.exhaustive.fuzzing.arena import Outcome

from .attack import Attack, Place
from .runs import SMALL, a_run, spoilt

EVIL = "import os\nfrom pathlib import Path\nPath('../outside/canary').touch()\ndef build(*a, **k): os.system('ls')\n"


def listed(line: str | bytes, said: str = "") -> Attack:
    """A run folder whose overrides.txt has this line."""

    def build(place: Place) -> list[str]:
        run = a_run(place)
        (place.work / "evil.py").write_text(EVIL)
        with (run / "overrides.txt").open("ab") as f:
            f.write(line if isinstance(line, bytes) else f"{line}\n".encode())
        return [str(run), "trainer.max_epochs=2"]

    return Attack("resume", build, said)


def stored(change: Callable[[dict[str, Any]], Any], said: str = "") -> Attack:
    """A checkpoint whose config `change` edits, tested."""

    def build(place: Place) -> list[str]:
        (place.work / "evil.py").write_text(EVIL)
        return ["evaluate", *spoilt(place, lambda state: change(state["knep"]["config"]))]

    return Attack("command", build, said)


def option(text: str, said: str = "", file: str = "optimizer/evil.yaml", *chosen: str) -> Attack:
    """An option in a folder of somebody else's configs, which the user searches and chooses it from."""

    def build(place: Place) -> list[str]:
        path = place.work / "conf" / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
        (place.work / "evil.py").write_text(EVIL)
        pick = chosen or (f"{path.parent.name}={path.stem}",)
        return ["recipe=none", *pick, f"hydra.searchpath=[file://{place.work}/conf]"]

    return Attack("train", build, said)


def target(name: str, rest: str = "") -> Attack:
    return option(f"_target_: {name}\n_partial_: true\n{rest}", name)


SGD = "_target_: torch.optim.SGD\n_partial_: true\n"


def package(text: str) -> Attack:
    """An option that sets keys outside its own group."""
    return option(f"# @package _global_\noptimizer:\n  _target_: torch.optim.SGD\n  _partial_: true\n{text}", "hydra")


def extra(text: str, said: str) -> Attack:
    """An option of a group that knep has not."""
    return option(f"# @package _global_\n{text}", said, "extra/evil.yaml", "+extra=evil")


def laughs() -> str:
    lines = ["a0: &a0 [ha, ha]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    return SGD + "\n".join(lines) + "\n"


def _images(place: Place) -> Path:
    """Forty pictures of 8 x 8 pixels in ten classes."""
    from PIL import Image

    images = place.work / "images"
    for name in "0123456789":
        (images / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), i).save(images / name / f"{i}.png")
    return images


def cached(place: Place) -> list[str]:
    """A checkpoint whose config would write a cache of images to a folder of its choice."""
    images = _images(place)

    def change(state: dict[str, Any]) -> None:
        state["knep"]["config"]["data"] = {
            "_target_": "knep.data.image_folder.ImageFolder",
            "root": str(images),
            "cache": str(place.outside / "autostart"),
            "size": 8,
            "channels": 1,
            "batch_size": 2,
        }

    return ["evaluate", *spoilt(place, change)]


def cache_of_a_run(lines: str, pipe: bool = False) -> Attack:
    """A run on images whose list of overrides would write a cache elsewhere, or reads one from a pipe without end."""

    def build(place: Place) -> list[str]:
        from knep.cli.train import main
        from knep.data.cache import cache_path

        run, images = place.work / "run", _images(place)
        data = ["data=image_folder", f"data.root={images}", "data.size=8", "data.channels=1", "data.workers=0"]
        with contextlib.redirect_stdout(io.StringIO()):
            main([*SMALL, "data.limit=20", "data.batch_size=10", *data, "progress=false", f"hydra.run.dir={run}"])
        with (run / "overrides.txt").open("a") as f:
            f.write(lines)
        if pipe:
            path = cache_path(images, place.work / "cache", 1, 8)
            path.parent.mkdir()
            os.mkfifo(path)
        return [str(run), "trainer.max_epochs=2"]

    return Attack("resume", build, tamed=_untouched)


def fetched(place: Place) -> list[str]:
    """A checkpoint whose config would download a data set into a folder of its choice."""

    def change(state: dict[str, Any]) -> None:
        state["knep"]["config"]["data"] = {"_target_": "knep.data.mnist.Mnist", "root": str(place.outside / "new")}

    return ["evaluate", *spoilt(place, change)]


def _untouched(place: Place, outcome: Outcome) -> str:
    return ""


def in_folder(name: str) -> Attack:
    def build(place: Place) -> list[str]:
        run = a_run(place)
        moved = run.rename(place.work / name)
        return [str(moved), "trainer.max_epochs=2"]

    return Attack("resume", build, "${")


def link(name: str) -> Attack:
    """A run folder in which a file that a run writes to is a link to somebody's own file."""

    def build(place: Place) -> list[str]:
        path = a_run(place) / name
        if path.is_dir():
            path.rename(path.with_name("moved"))
            path.symlink_to(place.outside)
        else:
            path.unlink(missing_ok=True)
            path.symlink_to(place.secret)
        return [str(place.work / "run"), "trainer.max_epochs=2"]

    return Attack("resume", build, "leads outside")


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *way, last = path.split(".")
        for key in way:
            config = config[key]
        config[last] = value

    return change


def big(place: Place) -> list[str]:
    run = a_run(place)
    with (run / "overrides.txt").open("wb") as f:
        f.truncate(1 << 32)
    return [str(run)]


ATTACKS = {
    "overrides: os.system": listed("optimizer._target_=os.system", "os.system"),
    "overrides: a module in the current folder": listed("model._target_=evil.build", "evil.build"),
    "overrides: path of a model": listed("model.path=evil:build"),
    "overrides: allows itself": listed("allow_targets=[evil.]", "comes from a file"),
    "overrides: environment": listed("name=${oc.env:HOME}", "oc.env"),
    "overrides: decode of an environment": listed("name=${oc.decode:${oc.env:HOME}}", "overrides.txt"),
    "overrides: a custom resolver": listed("name=${evil:1}", "overrides.txt"),
    "overrides: resolver in a list": listed("model.widths=[8,${oc.env:UID}]", "overrides.txt"),
    "overrides: resolver with spaces": listed("name='${ oc.env : HOME }'", "overrides.txt"),
    "overrides: nested resolver name": listed("name=${${seed}:HOME}", "overrides.txt"),
    "overrides: searchpath": listed("hydra.searchpath=[file:///]", "hydra"),
    "overrides: Hydra's logging": listed("+hydra.job_logging.handlers.x={'()':os.system}", "hydra"),
    "overrides: Hydra's callbacks": listed("+hydra.callbacks.x._target_=os.system", "hydra"),
    "overrides: an option of the command": listed("--config-dir=/", "--config-dir"),
    "overrides: run folder elsewhere": listed("hydra.run.dir=../outside/run", "hydra"),
    "overrides: name with a path": listed("name=../../outside/x", "name"),
    "overrides: cache of other data elsewhere": listed("data=image_folder\ndata.cache=../outside/new", "data.root"),
    "overrides: cache elsewhere": cache_of_a_run("data.cache=../outside/new\n"),
    "overrides: cache elsewhere, allowed by itself": cache_of_a_run("data.cache=../outside\ndata.write_cache=true\n"),
    "overrides: cache elsewhere, added": cache_of_a_run("++data.cache=../outside\n++data.write_cache=true\n"),
    "overrides: cache is a pipe": cache_of_a_run("data.cache=cache\n", pipe=True),
    "overrides: a class of Lightning": listed("+trainer.profiler._target_=lightning.pytorch.profilers.PyTorchProfiler"),
    "overrides: no text": listed(b"\xff\xfe\x00seed=1\n", "no UTF-8 text"),
    "overrides: terminal codes": listed("\x1b]0;owned\x07\x1b[2J=1"),
    "overrides: YAML tag": listed("name=!!python/object/apply:os.system"),
    "overrides: no end": listed("seed=" + "[" * 20000),
    "overrides: 4 GB": Attack("resume", big, "overrides.txt"),
    "run folder: log is a link": link("train.log"),
    "run folder: metrics are a link": link("metrics.csv"),
    "run folder: TensorBoard's folder is a link": link("tensorboard"),
    "run folder: checkpoints are a link": link("checkpoints"),
    "run folder: a name with a resolver": in_folder("run ${oc.env:HOME}"),
    "stored: os.system": stored(_set("model._target_", "os.system"), "os.system"),
    "stored: eval": stored(_set("model", {"_target_": "builtins.eval", "_args_": ["1"]}), "builtins.eval"),
    "stored: hydra.utils.call": stored(_set("data._target_", "hydra.utils.call"), "hydra.utils.call"),
    "stored: hydra's get_object": stored(_set("data._target_", "hydra.utils.get_object"), "hydra.utils"),
    "stored: torch.load": stored(_set("data", {"_target_": "torch.load", "f": "../outside/secret"}), "torch.load"),
    "stored: torch.hub": stored(_set("model._target_", "torch.hub.load"), "torch.hub.load"),
    "stored: load_state_dict_from_url": stored(
        _set("model._target_", "torch.hub.load_state_dict_from_url"), "torch.hub"
    ),
    "stored: partial chain": stored(
        _set("model", {"_target_": "functools.partial", "_args_": [{"_target_": "functools.partial"}]}), "functools"
    ),
    "stored: through a module of ours": stored(_set("data._target_", "knep.data.locate.Path"), "pathlib"),
    "stored: importlib": stored(_set("norm._target_", "importlib.import_module"), "importlib"),
    "stored: numpy.load": stored(_set("data._target_", "numpy.load"), "numpy.load"),
    "stored: torch.ops": stored(_set("model._target_", "torch.ops.load_library"), "torch.ops"),
    "stored: a module that compiles": stored(_set("model._target_", "torch.utils.cpp_extension.load"), "cpp_extension"),
    "stored: resolver": stored(_set("norm.eps", "${oc.env:HOME}"), "oc.env"),
    "stored: a target in a list of lists": stored(
        _set("model.widths", [[{"_target_": "os.system", "command": "ls"}]]), "os.system"
    ),
    "stored: weights of torchvision": stored(
        _set("model", {"_target_": "knep.models.torchvision.torchvision", "weights": "x"})
    ),
    "stored: cache of images elsewhere": Attack("command", cached, tamed=_untouched),
    "stored: downloads elsewhere": Attack("command", fetched, "data.root"),
    "option: os.system": target("os.system", "command: touch ../outside/canary\n"),
    "option: evil.build": target("evil.build"),
    "option: hydra.utils.instantiate": target("hydra.utils.instantiate", "config: {_target_: os.system}\n"),
    "option: python object": option("_target_: !!python/object/apply:os.system ['touch ../outside/canary']\n"),
    "option: python name": option(SGD + "lr: !!python/name:os.system\n"),
    "option: python module": option(SGD + "lr: !!python/module:evil\n"),
    "option: pathlib": option(SGD + "foreach: !!python/object/apply:pathlib.Path [/]\n"),
    "option: laughs": option(laughs()),
    "option: environment": option(SGD + "lr: 0.1\nmaximize: ${oc.env:HOME}\n", "oc.env"),
    "option: environment in a name": extra("name: ${oc.env:HOME}\n", "oc.env"),
    "option: environment behind a choice": option(SGD + "lr: ${oc.select:x,${oc.env:HOME}}\n", "oc.env"),
    "option: decode": option(SGD + "lr: ${oc.decode:'${oc.env:HOME}'}\n", "oc."),
    "option: custom resolver": option(SGD + "lr: ${evil:1}\n", "evil"),
    "option: what does not resolve": option(SGD + "lr: ${nowhere.to.be.found}\n"),
    "option: what goes round": option(SGD + "lr: ${optimizer.lr}\n"),
    "option: Hydra's callbacks": package("hydra: {callbacks: {x: {_target_: os.system, command: ls}}}\n"),
    "option: Hydra's launcher": package("hydra: {launcher: {_target_: evil.build}}\n"),
    "option: Hydra's sweeper": package("hydra: {sweeper: {_target_: evil.build}}\n"),
    "option: Hydra's logging": package("hydra: {job_logging: {handlers: {file: {filename: ../outside/log}}}}\n"),
    "option: Hydra's environment": package("hydra: {job: {env_set: {LD_PRELOAD: evil.so}}}\n"),
    "option: Hydra's run folder": package("hydra: {sweep: {dir: ../outside/run}}\n"),
    "option: Hydra's working folder": package("hydra: {job: {chdir: true}}\n"),
    "option: allows itself": option(
        "# @package _global_\nallow_targets: [evil.]\noptimizer: {_target_: evil.build}\n", "allow_targets"
    ),
    "option: not YAML": option("{{{"),
    "option: a list": option("- 1\n- 2\n"),
    "option: bytes": option("_target_: \x00\x01\n"),
    "option: terminal codes": option('_target_: "\\e]0;owned\\a"\n'),
    "option: a path for a name": extra("name: ../../outside/x\n", "name"),
}  # fmt: skip
