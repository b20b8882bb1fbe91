"""`knep export`: a run's model as a file that needs no knep to be used, checked before it is kept."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from knep.engine.load import load_members
from knep.errors import InputError
from knep.export.plain_model import Portable, portable
from knep.io.atomic import new_file
from knep.utils.text import shown

FORMATS = ("safetensors", "onnx", "pt2")
_NEEDS = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxruntime", "onnxscript"), "pt2": ()}


class Deployed(nn.Module):
    """Raw pixels 0..255, float32 (N, C, H, W), to logits (N, K): the scaling and the model in one graph."""

    def __init__(self, scaling: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.scaling, self.model = scaling, model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(self.scaling(pixels))


def export(run: Path, file: Path, kind: str | None = None) -> list[Path]:
    """Writes a run's model to `file` and what to know about it to `file`.json; returns the paths written.

    run: a run folder or a checkpoint; an ensemble gives a file per member, <name>_0, <name>_1 ...
    kind: safetensors (weights; the model reads scaled images), onnx or pt2 (graphs that read raw pixels); None goes by
    the file's suffix.
    Raises InputError for a run that cannot be read, a file that exists, a package that is missing, a model that cannot
    be traced, or a file that gives other logits than the run's model.
    """
    kind = _kind(file, kind)
    members = load_members(run)
    files = [file] if len(members) == 1 else [_numbered(file, i) for i in range(len(members))]
    for path in [p for f in files for p in (f, _beside(f))]:
        if path.exists():
            raise InputError(f"{path} exists already: remove it or choose another name")
    written = []
    for i, (member, path) in enumerate(zip(members, files, strict=True)):
        found = portable(member)
        if len(members) > 1:
            ensemble = {"member": i, "members": len(members), "rule": "mean of the members' probabilities"}
            found = replace(found, about=found.about | {"ensemble": ensemble})
        written += _write(found, path, kind)
    return written


def _kind(file: Path, kind: str | None) -> str:
    kind = kind or file.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise InputError(f"{file}: write --format {' or '.join(FORMATS)}, or give the file one of these endings")
    if file.suffix != f".{kind}":
        raise InputError(f"{file} does not end in .{kind}: write {file.with_suffix(f'.{kind}')}")
    if "\ufffd" in str(file).encode(errors="surrogateescape").decode(errors="replace"):
        raise InputError(f"{shown(file)} is no text in UTF-8: choose another name")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is no folder: make it, or write the file elsewhere")
    missing = [name for name in _NEEDS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--format {kind} needs {', '.join(missing)}: pip install 'knep[export]'")
    return kind


def _numbered(file: Path, i: int) -> Path:
    return file.with_name(f"{file.stem}_{i}{file.suffix}")


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _write(found: Portable, file: Path, kind: str) -> list[Path]:
    """Both files under temporary names, checked, then renamed: what has its name is whole and right."""
    writer: Callable[[Portable, Path, str], Callable[[Tensor], Tensor]] = _WRITERS[kind]
    reads = "scaled images" if kind == "safetensors" else "pixels"
    about = found.about | {"format": kind, "input": found.about["input"] | {"reads": reads}}
    text = json.dumps(about, indent=2)
    hidden = [path.with_name(f".{os.getpid()}.{path.name}") for path in (file, _beside(file))]
    try:
        for path in hidden:
            new_file(path).close()
        run = writer(found, hidden[0], text)
        for images in (len(found.pixels), 1):
            found.check(run(found.pixels[:images]), f"{file} on {images} images")
        hidden[1].write_text(text + "\n", encoding="utf-8")
        hidden[0].replace(file)
        hidden[1].replace(_beside(file))
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}): choose another folder") from error
    finally:
        for path in hidden:
            path.unlink(missing_ok=True)
    return [file, _beside(file)]


def _safetensors(found: Portable, file: Path, text: str) -> Callable[[Tensor], Tensor]:
    """Writes the weights under the model's own names; what comes back reads the file and scales as its text says."""
    from safetensors.torch import load_file, save_file

    scaling = json.loads(text)["input"]["scaling"]
    if scaling["mean"] is None:
        raise InputError(f"scaling={scaling['kind']} is no mean and deviation per channel: use --format onnx or pt2")
    # Tied weights are written under each of their names.
    state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in found.model.state_dict().items()}
    save_file(state, file, metadata={"format": "pt", "knep": text})
    found.model.load_state_dict(load_file(file))
    shape = (1, -1, *[1] * (found.pixels.ndim - 2))
    mean, std = (torch.tensor(scaling[key]).reshape(shape) for key in ("mean", "std"))

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        return found.model((pixels - mean) / std if pixels.is_floating_point() else pixels)

    return run


@contextmanager
def _traceable(kind: str) -> Iterator[None]:
    """What a model raises while it is traced, as one line."""
    try:
        yield
    except Exception as error:  # the tracers raise whatever a model's own forward does
        said = " ".join(str(error).split())[:200]
        raise InputError(f"--format {kind} cannot trace the model ({said}): use --format safetensors") from error


def _deployed(found: Portable) -> Deployed:
    return Deployed(found.scaling, found.model).eval().requires_grad_(False)


def _pt2(found: Portable, file: Path, text: str) -> Callable[[Tensor], Tensor]:
    any_number = {"pixels": {0: torch.export.Dim("N")}}
    with _traceable("pt2"):
        program = torch.export.export(_deployed(found), (found.pixels,), dynamic_shapes=any_number)
    torch.export.save(program, file, extra_files={"knep.json": text})
    return torch.export.load(file).module()


def _onnx(found: Portable, file: Path, text: str) -> Callable[[Tensor], Tensor]:
    from onnxruntime import InferenceSession

    options = {"input_names": ["pixels"], "output_names": ["logits"], "dynamic_shapes": {"pixels": {0: "N"}}}
    with _traceable("onnx"):
        made = torch.onnx.export(_deployed(found), (found.pixels,), dynamo=True, verbose=False, **options)
    assert made is not None
    made.model.metadata_props["knep"] = text
    made.save(file, external_data=False)
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])


_WRITERS = {"safetensors": _safetensors, "onnx": _onnx, "pt2": _pt2}
