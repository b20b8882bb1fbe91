"""Trained models from their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from knep.config.catalog import TASK_SLOTS
from knep.config.instantiate import check_targets, instantiate
from knep.config.moved import with_current_names
from knep.config.schema import DataSpec, RunConfig
from knep.data.base import KINDS
from knep.engine.build import build_module, check_model
from knep.engine.module import Classifier
from knep.errors import InputError
from knep.io.checkpoint import read
from knep.io.schema import Check, listed, plain, table, text, whole
from knep.recipes.recipe import SLOTS
from knep.utils.text import shortened

_FACTS: dict[str, Check] = {
    "config": table(plain),
    "num_classes": whole(1),
    "channels": whole(1),
    "image_size": whole(1),
    "class_names": listed(text()),
}

# Where there is one.
_GROUPS = frozenset({"trainer", "data", "checkpoint", "slurm", "budget", "guard", "doctor", "task", *TASK_SLOTS})

_PIXELS = 1 << 28


def _one_of(*words: str) -> Check:
    return lambda value: None if value in words else f"={shortened(repr(value))} is none of {', '.join(words)}"


_ROWS: dict[str, Check] = {
    "target": _one_of(*KINDS),
    "dtype": _one_of("uint8", "int16", "int32", "int64", "float16", "float32", "float64"),
    "shape": listed(whole(1)),
    "counts": listed(plain),
    "fitted": table(plain),
}

_BITS = range(8, 33)  # of a number of an image


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The file's plain data, never unpickled. Raises InputError where it is missing, damaged or not knep's."""
    if not path.is_file():
        raise InputError(f"{path} is missing: give a run folder or a .ckpt file")
    state = read(path)
    if not isinstance(state, dict) or "knep" not in state or "state_dict" not in state:
        raise InputError(f"{path} was not written by knep: it has no config inside")
    return state


def read_facts(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The config and what else a checkpoint says about its model: plain data, see `knep.engine.build.about`.

    Raises InputError where a part is missing, or where the config names a target that is not allowed.
    """
    facts = with_current_names(state["knep"])
    for key, check in _FACTS.items():
        if not isinstance(facts, dict) or key not in facts:
            raise InputError(f"{path} was not written by knep: it does not say its {key}, give another checkpoint")
        wrong = check(facts[key])
        if wrong:
            raise InputError(f"{path} was not written by knep: its {key}{wrong}, give another checkpoint")
    groups = {*SLOTS, "model", *(facts["config"].keys() & _GROUPS)}
    missing = [key for key in sorted(groups) if not isinstance(facts["config"].get(key), dict)]
    missing += [] if missing or isinstance(facts["config"]["model"].get("_target_"), str) else ["model"]
    if missing:
        raise InputError(f"{path} was not written by knep: its config has no {missing[0]}, give another checkpoint")
    _check_start(path, facts)
    names, shape = facts["class_names"], (facts["channels"], facts["image_size"], facts["num_classes"])
    if len(names) != shape[2]:
        raise InputError(
            f"{path} was not written by knep: {len(names)} names do not fit {shape[2]} classes, give another"
        )
    _check_rows(path, facts)
    if facts.get("bits", 16) not in _BITS:
        raise InputError(f"{path} was not written by knep: its images have no bits, give another checkpoint")
    if shape[0] * shape[1] ** 2 > _PIXELS:
        raise InputError(
            f"{path} is for images of {shape[0]} x {shape[1]} x {shape[1]} pixels, too large: give another"
        )
    try:
        check_targets(facts["config"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return facts


_START: dict[str, Check] = {"source": text(), "sha256": text(), "loaded": whole(0), "new": listed(text())}


def _check_start(path: Path, facts: Mapping[str, Any]) -> None:
    """What a checkpoint says of the weights that its run began with."""
    found = facts.get("weights", {})
    for key, check in _START.items() if found != {} else ():
        wrong = check(found[key]) if isinstance(found, dict) and key in found else " is missing"
        if wrong:
            raise InputError(f"{path} was not written by knep: its weights.{key}{wrong}, give another checkpoint")


def _check_rows(path: Path, facts: Mapping[str, Any]) -> None:
    """What a checkpoint says of rows that are no square images."""
    for key, check in _ROWS.items():
        wrong = check(facts[key]) if key in facts else None
        if wrong:
            raise InputError(f"{path} was not written by knep: its {key}{wrong}, give another checkpoint")
    if math.prod(facts.get("shape", ())) > _PIXELS:
        raise InputError(f"{path} is for rows of {facts['shape']} numbers, too large: give another")


def load_module(path: Path) -> Classifier:
    """The Classifier in a checkpoint file, in eval mode on the CPU. Nothing is built before its config is checked."""
    state = read_checkpoint(path)
    module = stored_module(path, state)
    load_weights(module, state["state_dict"], path)
    wrong = not_finite(module, state["state_dict"])
    if wrong:
        raise InputError(f"{path} was not written by knep: {wrong}, give another checkpoint")
    return module.eval()


def not_finite(module: Classifier, weights: Mapping[str, Tensor]) -> str | None:
    """Which weight is not finite and must be; None where all are.

    The input's scale comes from data that was looked at. Parameters are so where the config has a guard, and with them
    what is derived from them, as a spectral norm's vectors; running statistics of activations need not be.
    """
    guarded = module.about["config"].get("guard", {}).get("action", "none") != "none"
    names = [name for name, _ in module.named_parameters() if guarded]
    names += [
        name
        for name, _ in module.named_buffers()
        if name.startswith(("scaling.", "task.")) or (guarded and ".parametrizations." in name)
    ]
    own = module.state_dict()

    def whole(name: str) -> bool:
        """Also as the type that the model has: what float64 holds may be infinite there."""
        return bool(weights[name].to(own[name].dtype).isfinite().all())

    odd = next((name for name in names if name in weights and not whole(name)), None)
    return odd and f"{odd} is not finite, which its {'guard' if guarded else 'data'} forbids"


def stored_module(path: Path, state: Mapping[str, Any]) -> Classifier:
    """The Classifier that the config in a checkpoint builds, without its weights; no larger than the file holds."""
    facts = read_facts(path, state)
    _check_size(path, facts, state["state_dict"])
    try:
        run, spec = RunConfig.of(facts["config"]), DataSpec.stored(facts)
        return build_module(run, spec, initialise=False, kept=facts.get("weights"))
    except InputError:
        raise
    except Exception as error:  # whatever a model's builder raises for values that it was not made for
        raise InputError(f"{path}: its config builds no model ({' '.join(str(error).split())[:120]})") from error


def _check_size(path: Path, facts: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuses a config that builds more than the file holds, before it is built."""
    if not isinstance(weights, Mapping) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise InputError(f"{path} was not written by knep: its weights are no tensors, give another checkpoint")
    try:
        run = RunConfig.of(facts["config"])
        check_model(run.model, run.size(DataSpec.stored(facts)), sum(w.numel() for w in weights.values()))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """`load_state_dict` that answers in one line. Raises InputError where the weights are of another model."""
    wrong = weights_wrong(module, weights)
    if wrong:
        raise InputError(f"{path} holds another model: {shortened(wrong, 200)}")
    module.load_state_dict(weights)


def weights_wrong(module: nn.Module, weights: object) -> str | None:
    """Why these are not the weights of `module`, by their names, shapes and kinds of numbers; None where they are."""
    own: Mapping[str, Any] = module.state_dict()
    if not isinstance(weights, Mapping):
        return f"its weights are a {type(weights).__name__}"
    names = [*(f"it has no {name}" for name in own if name not in weights)]
    names += [f"it has {shortened(repr(name))}, which the model lacks" for name in weights if name not in own]
    if names:
        return names[0] + (f", and {len(names) - 1} more differ" if names[1:] else "")
    for name, mine in own.items():
        its = weights[name]
        if isinstance(mine, Tensor) and not isinstance(its, Tensor):
            return f"{name} is a {type(its).__name__}, not a tensor"
        if isinstance(mine, Tensor) and its.shape != mine.shape:
            return f"{name} has the shape {tuple(its.shape)}, not {tuple(mine.shape)}"
        if isinstance(mine, Tensor) and its.is_floating_point() != mine.is_floating_point():
            return f"{name} is of {its.dtype}, not {mine.dtype}"
    return None


def stored_data(member: Classifier) -> Any:
    """The prepared data that a loaded model's config names, which only reads.

    Raises InputError where it names none, or one of other images than the model was made for.
    """
    from knep.data.base import ImageData

    node = member.about["config"].get("data")
    try:
        # Where to find the data the checkpoint says; it has no say in what is written.
        data = instantiate(node | {"cache": False} if "cache" in node else node)
        if isinstance(data, ImageData):
            if hasattr(data, "keep"):
                data.keep(member.about)
            data.only_reads = True
            data.prepare()
    except InputError:
        raise
    except Exception as error:  # whatever a data set raises for values that it was not made for
        raise InputError(f"the checkpoint's config builds no data ({shortened(str(error), 120)})") from error
    spec = DataSpec.stored(member.about)
    for key in ("num_classes", "channels", "image_size", "target", "shape"):
        if getattr(data, key, None) != getattr(spec, key):
            raise InputError(
                f"the model was made for {key}={getattr(spec, key)}, which its data is not: give other data"
            )
    return data


def load_members(run: Path) -> list[Classifier]:
    """The tested models of a run folder (or of one file): several for an ensemble."""
    if run.is_file():
        return [load_module(run)]
    if not run.is_dir():
        raise InputError(f"{run} is missing: give a run folder such as outputs/<date>/<time>_<name>")
    folders = sorted(run.glob("member_*"), key=lambda folder: (len(folder.name), folder.name)) or [run]
    for folder in folders:
        checkpoints = folder / "checkpoints"
        if not (checkpoints / "final.ckpt").is_file() and (checkpoints / "best.ckpt").is_file():
            raise InputError(f"{folder} did not finish: resume it with ckpt={run}, or give {checkpoints / 'best.ckpt'}")
    return [load_module(folder / "checkpoints" / "final.ckpt") for folder in folders]
