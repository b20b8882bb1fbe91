"""`model.weights`: weights to start from, read from a run, a file, or what torchvision and timm publish, and laid in.

Nothing is unpickled. Weights are matched by name and shape; what a source lacks stays new, such as a head for other
classes, and what matches in too few places is refused.
"""

from __future__ import annotations

import hashlib
import importlib
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knep.config.schema import Node
from knep.errors import InputError
from knep.io import checkpoint
from knep.utils.text import shortened, shown

_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Where projects keep weights in a file that holds more: Lightning and timm, DeiT and its like, averages of either.
_NESTED = ("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema")
_PREFIXES = ("module.", "model.", "_orig_mod.")  # of wrappers, not of layers
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # opens what torch.save wrote before 2020
# These were trained on pixels in [-1, 1]; torchvision turns inputs into that inside nets that it builds with weights.
_HALF = ("GoogLeNet_Weights", "Inception_V3_Weights")
_SECONDS = 20.0  # that a server may be silent


@dataclass(frozen=True)
class Source:
    """Weights as they were found. name: as it was typed; sha256: of the file.

    weights: names without those of wrappers; scaling: shift and scale of raw pixels, (x - shift) * scale, of each
    channel, None where nobody says; config: of the run that trained them, {} where there was none.
    """

    name: str
    sha256: str
    weights: Mapping[str, Tensor]
    scaling: tuple[Tensor, Tensor] | None = None
    config: Node = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """What came of a source. new: parameters that it had nothing for; said: lines about it."""

    source: Source
    loaded: tuple[str, ...]
    new: tuple[str, ...]
    said: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """What the checkpoint and the summary of a run keep of it."""
        counts = {"loaded": len(self.loaded), "new": list(self.new)}
        return {"source": self.source.name, "sha256": self.source.sha256, **counts}


def read(weights: str, model: Node) -> Source:
    """The source that `model.weights` names; model: the model's node, whose library may publish weights.

    Raises InputError for a source that is missing, holds no weights, cannot be fetched, or is published by nobody.
    """
    if not isinstance(weights, str):
        raise InputError(f"model.weights={weights} is no source: write DEFAULT, a file, or a run folder")
    path = Path(weights).expanduser()
    if path.is_dir():
        path = _of_run(path)
    if path.is_file():
        return _of_file(weights, path)
    if "/" in weights or path.suffix in _ENDINGS:
        raise InputError(f"model.weights={shown(weights)} is missing: give a run folder, or a file{_either(_ENDINGS)}")
    return _published(weights, model)


def _either(endings: Collection[str]) -> str:
    return " that ends in " + ", ".join(endings)


def _of_run(folder: Path) -> Path:
    members = sorted(folder.glob("member_*"))
    if members:
        raise InputError(
            f"model.weights={shown(folder)} holds {len(members)} models: name one, model.weights={shown(members[0])}"
        )
    file = folder / "checkpoints" / "final.ckpt"
    if not file.is_file():
        unfinished = (folder / "checkpoints").is_dir()
        why = "did not finish" if unfinished else "is no run folder"
        raise InputError(
            f"model.weights={shown(folder)} {why}: give a finished run, or a checkpoint file of another one"
        )
    return file


def _of_file(name: str, path: Path) -> Source:
    if path.suffix == ".safetensors":
        return Source(name, _sha256(path), _stripped(_safetensors(path)))
    state = _torch_file(path)
    stored = state.get("knep") if isinstance(state, Mapping) else None
    found = _nested(state, path)
    if not isinstance(stored, Mapping) or not isinstance(stored.get("config"), Mapping):
        return Source(name, _sha256(path), _stripped(found))
    shift, scale = found.get("scaling.shift"), found.get("scaling.scale")
    scaling = (shift.flatten(), scale.flatten()) if shift is not None and scale is not None else None
    own = {key.removeprefix("model."): value for key, value in found.items() if key.startswith("model.")}
    return Source(name, _sha256(path), own, scaling, stored["config"])


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{shown(path)} is no safetensors file ({shortened(str(error), 80)}): give another") from error


def _torch_file(path: Path) -> Any:
    with path.open("rb") as f:
        legacy = f.read(len(_LEGACY)) == _LEGACY
    if not legacy:
        return checkpoint.in_own_memory(checkpoint.read(path))
    try:
        return checkpoint.in_own_memory(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises what its many readers raise
        raise InputError(
            f"{shown(path)} is damaged, or no plain weights ({type(error).__name__}): give another"
        ) from error


def _nested(state: object, path: Path) -> dict[str, Tensor]:
    """The weights in what a file holds: it itself, or the first of `_NESTED` that is one."""
    candidates = [state, *(state[key] for key in _NESTED if key in state)] if isinstance(state, Mapping) else []
    for found in candidates:
        tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
        if tensors and all(isinstance(k, str) for k in tensors):
            return tensors
    raise InputError(f"{shown(path)} holds no weights by name: give a state_dict, alone or under {', '.join(_NESTED)}")


def _stripped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the names of wrappers that stand in front of every weight, or that a compiled layer has inside."""
    found = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    for _ in range(4):
        prefix = next((p for p in _PREFIXES if found and all(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# What libraries publish


def _published(word: str, model: Node) -> Source:
    target = str(model.get("_target_"))
    if target == "knep.models.torchvision.torchvision":
        return _of_torchvision(word, str(model.get("name")))
    if target == "knep.models.timm.timm":
        return _of_timm(word, str(model.get("name")))
    raise InputError(
        f"model.weights={shown(word)} is no file or folder, and nobody publishes weights of this model: give a file "
        f"{_either(_ENDINGS).strip()}, or a run folder"
    )


def _of_torchvision(word: str, name: str) -> Source:
    from torchvision.models import get_model_weights

    published: Any = get_model_weights(name)
    short = word.rpartition(".")[2]
    if short not in published.__members__:
        near = get_close_matches(short, list(published.__members__), n=1, cutoff=0.0)
        remedy = f"did you mean {near[0]}?" if near else "it publishes none, give a file"
        raise InputError(f"model.weights={shown(word)} is no file or folder, nor weights of {name}: {remedy}")
    chosen = published[short]
    path = _fetched(word, chosen.url)
    preset = chosen.transforms()
    half = published.__name__ in _HALF
    mean, std = ([0.5] * 3, [0.5] * 3) if half else (preset.mean, preset.std)
    return Source(
        f"{name} {chosen.name}", _sha256(path), _stripped(_nested(_torch_file(path), path)), pixels(mean, std)
    )


def _fetched(word: str, url: str) -> Path:
    """The file of a URL, from torch.hub's folder where it lies there, by its name with the head of its SHA-256."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    begin = path.stem.rpartition("-")[2]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=begin, progress=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise _offline(word, url, error) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _offline(word: str, where: str, error: Exception) -> InputError:
    reason = shortened(" ".join(str(error).split()), 100)
    return InputError(
        f"model.weights={shown(word)}: {where} cannot be fetched ({reason}): fetch it where there is a network, and "
        "write model.weights=FILE"
    )


def _of_timm(word: str, name: str) -> Source:
    library: Any = importlib.import_module("timm")
    if word != "DEFAULT":
        raise InputError(
            f"model.weights={shown(word)} is no file or folder: write DEFAULT, with the tag in model.name, such as "
            "resnet18.a1_in1k"
        )
    facts: Any = library.get_pretrained_cfg(name)
    if facts is None or not facts.has_weights or not (facts.hf_hub_id or facts.url):
        raise InputError(f"model.weights=DEFAULT: timm publishes no weights of {name}: give a file")
    path = _from_hub(word, facts.hf_hub_id) if facts.hf_hub_id else _fetched(word, facts.url)
    whole = library.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    return Source(f"{name} {path.name}", _sha256(path), whole.state_dict(), pixels(facts.mean, facts.std))


def _from_hub(word: str, repository: str) -> Path:
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.hf_hub_download(repository, "model.safetensors", etag_timeout=_SECONDS))
    except Exception as error:  # of the network, of the hub, or of its cache: each a class of its own
        raise _offline(word, f"{repository} of the hub", error) from error


def pixels(mean: Collection[float], std: Collection[float]) -> tuple[Tensor, Tensor]:
    """Shift and scale of pixels in 0..255, of the mean and deviation that libraries give of pixels in 0..1."""
    return 255 * torch.tensor(list(mean)), 1 / (255 * torch.tensor(list(std)))


# Laying them in


@torch.no_grad()
def fill(model: nn.Module, source: Source, output: Collection[str]) -> Loaded:
    """Copies into `model` what the source has under the same name and in the same shape; the rest stays as it is.

    A first convolution over one channel takes the sum of the three that the source has, as of a gray image repeated.

    output: names of the output layer's parameters, which may well be new.
    Raises InputError where less than half of the other parameters is found, or where weights are not finite.
    """
    own = model.state_dict(keep_vars=True)
    parameters = {name for name, _ in model.named_parameters()}
    found, said, shapes = {}, [], []
    first = next((name for name, t in own.items() if t.ndim > 1), "")
    for name, mine in own.items():
        its = source.weights.get(name)
        if its is None:
            continue
        if name == first and _is_color_for_gray(its, mine):
            its = its.sum(1, keepdim=True)
            said.append(f"{name} reads one channel, and takes the sum of the three that it was trained with")
        if its.shape == mine.shape and its.is_floating_point() == mine.is_floating_point():
            found[name] = its
        else:
            shapes.append(f"{name} {'x'.join(map(str, its.shape))}, not {'x'.join(map(str, mine.shape))}")
    _refuse_few(source, own, parameters - set(output), found)
    odd = next((n for n, t in found.items() if t.is_floating_point() and not t.isfinite().all()), None)
    if odd is not None:
        raise InputError(f"model.weights={shown(source.name)}: {odd} is not finite: give other weights")
    for name, its in found.items():
        own[name].copy_(its)
    loaded = tuple(name for name in own if name in found and name in parameters)
    new = tuple(name for name in own if name in parameters and name not in found)
    unread = [name for name in source.weights if name not in own]
    counts = f"{len(loaded)} of {len(parameters)} parameters" + (f", new: {_few(new)}" if new else "")
    parts = [f"weights of {shown(source.name)} (SHA-256 {source.sha256}): {counts}"]
    parts += [f"of another shape: {_few(shapes)}"] if shapes else []
    parts += [f"left out: {_few(unread)}"] if unread else []
    return Loaded(source, loaded, new, ("; ".join(parts), *said))


def _is_color_for_gray(its: Tensor, mine: Tensor) -> bool:
    return (
        its.ndim == mine.ndim == 4
        and (its.shape[1], mine.shape[1]) == (3, 1)
        and (its.shape[0], its.shape[2:]) == (mine.shape[0], mine.shape[2:])
    )


def _refuse_few(source: Source, own: Mapping[str, Tensor], backbone: Collection[str], found: Collection[str]) -> None:
    hits = [name for name in backbone if name in found]
    if 2 * len(hits) >= len(backbone) and hits:
        return
    missed = [name for name in own if name in backbone and name not in found]
    theirs = [name for name in source.weights if name not in found]
    raise InputError(
        f"model.weights={shown(source.name)} fits {len(hits)} of {len(backbone)} parameters before the output layer: "
        f"the model has {_few(missed, own)}, and the source {_few(theirs, source.weights)}: choose the model that it "
        "was made with"
    )


def _few(names: Collection[str], sized: Mapping[str, Tensor] | None = None) -> str:
    first = [shown(n) + (f" {tuple(sized[n].shape)}" if sized else "") for n in list(names)[:3]]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if first else "nothing else"
