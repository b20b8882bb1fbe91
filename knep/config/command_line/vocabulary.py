"""The words of other training tools (vocabulary.yaml), and the line of knep that means the same."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from knep.config.catalog import SLOTS, options

# What else a word for an option may have meant, said with the option that it is taken as.
_OTHERWISE = {
    "he": "he_uniform",
    "kaiming": "he_uniform",
    "xavier": "glorot_uniform",
    "glorot": "glorot_uniform",
    "normal": "unit_normal",
}
_NOTHING = ("false", "off", "no", "null", "nil", "disabled")
_TORCHVISION = (18, 34, 50, 101, 152)  # depths of its residual nets
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?")
_NETS = re.compile(
    r"alexnet|convnext|densenet|efficientnet|googlenet|inception_v|maxvit|mnasnet|mobilenet|regnet|resnext|"
    r"shufflenet|squeezenet|swin|vgg|vit|wide_resnet"
)


@lru_cache
def _tables() -> dict[str, Any]:
    """The tables of vocabulary.yaml, by word: it is written by meaning."""
    import yaml

    read = yaml.safe_load((Path(__file__).parent / "vocabulary.yaml").read_text(encoding="utf-8"))
    return {
        "words": _by_word(read["words"]),
        "flags": read["flags"],
        "aliases": {group: _by_word(named) for group, named in read["aliases"].items()},
        "numbers": read["numbers"],
    }


def _by_word(table: dict[str, str]) -> dict[str, str]:
    return {word: meaning for meaning, words in table.items() for word in str(words).split()}


def meant(group: str, word: str) -> str | None:
    """The option that a word plainly means: "bn" is norm=batch, "Adam" optimizer=adam; None for any other."""
    known = options(group)
    bare = re.sub(r"[\W_]", "", word.lower())
    spelled = [name for name in known if name == word] or [name for name in known if name.replace("_", "") == bare]
    if spelled:
        return spelled[0]
    if "none" in known and word.lower() in _NOTHING:
        return "none"
    return _tables()["aliases"].get(group, {}).get(bare)


def otherwise(word: str) -> str | None:
    """The other option that a word for an option may have meant."""
    return _OTHERWISE.get(word.lower())


def option_line(group: str, word: str) -> str | None:
    """What to write instead of a word that is no option of a group; None where nothing is known of it."""
    small = word.lower()
    if _NUMBER.fullmatch(small) and group in _tables()["numbers"]:
        return _tables()["numbers"][group].format(v=word)
    if group == "model":
        return _model_line(word)
    if group == "callbacks":
        return _tables()["words"].get(small.replace("-", "_")) or _tables()["flags"]["callbacks"]
    if group == "data" and "/" in word:
        return f"write data=image_folder data.root={word}"
    last = small.rpartition(".")[2]
    if last != small and meant(group, last):
        return f"write {group}={meant(group, last)}"
    line = _tables()["words"].get(small, "")
    return line if line.startswith(f"write {group}=") and "{v}" not in line else None


def _model_line(word: str) -> str | None:
    small = word.lower().replace("-", "_")
    depth = re.fullmatch(r"resnet_?(\d+)", small)
    if depth:
        own = f"model=resnet model.depth={depth[1]}"
        torchvision = f", or model=torchvision model.name=resnet{depth[1]}" if int(depth[1]) in _TORCHVISION else ""
        return f"write {own}{torchvision}"
    if _NETS.match(small):
        name = _of_torchvision(small)
        return f"write model=torchvision model.name={name}" if name else None
    named = re.fullmatch(r"\w+(\.\w+)+(:\w+)?", word)
    return f"write model=import model.path={word}" if named else None


def _of_torchvision(word: str) -> str | None:
    """The network of torchvision that a word names, or the first of its family."""
    from torchvision import models

    known = models.list_models(module=models)
    family = re.match(r"[a-z]+", word)
    near = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    near = near or [name for name in known if family and name.startswith(family[0])]
    return word if word in known else next(iter(near), None)


def line_for(key: str, value: str, whole: bool = False) -> str | None:
    """What to write instead of another tool's key; None where nothing is known of it.

    key: as typed, "lr" or "clip.max_norm": of a dotted one the whole is looked up, then the last word, unless `whole`.
    """
    word = key.lower().replace("-", "_")
    _, dot, last = word.rpartition(".")
    tables = _tables()
    line = tables["flags"].get(last) if word.startswith("trainer.") else None
    line = line or tables["words"].get(word) or (tables["words"].get(last) if dot and not whole else None)
    if line is None:
        return None
    group = word.partition(".")[0]
    if (
        dot
        and group in (*SLOTS, "guard")
        and word not in tables["words"]
        and line[0] != "{"
        and not _concerns(line, group)
    ):
        return None  # the word of another slot
    if value.lower() in _NOTHING and line.startswith("write ") and "{v}" not in line and " or " not in line:
        return "nothing of the kind is done unless it is asked for: leave it out"
    if value.lower() == "true" and (found := re.fullmatch(r"(write (\w+)=\w+) \2\.\w+=\{v\}", line)):
        return found[1]
    if line.startswith("{"):
        return _choice(line.strip("{}"), last, value)
    return line.format(v=value.strip("[]") if "[{v}]" in line else value)


def _concerns(line: str, group: str) -> bool:
    """Whether a line to write is of a group, or none of a slot's."""
    slots = [slot for slot in SLOTS if re.search(rf"\b{slot}[.=]", line)]
    return not slots or group in slots


def _choice(group: str, last: str, value: str) -> str:
    if group == "monitor":
        kind = "acc" if "acc" in value.lower() else "loss"
        rising = " stopping.mode=max" if kind == "acc" else ""
        return f"write stopping=early stopping.monitor=val/{kind}{rising}"
    if group == "devices":
        if value in ("0", "none"):
            return "write trainer=cpu"
        if value in ("1", "-1", "auto"):
            return "all that there is are taken, or one: write trainer=gpu, or trainer=cpu"
        return f"write trainer=ddp trainer.devices={value}"
    if group == "trainer":
        return f"write trainer.{last}={value}"
    option = meant(group, value)
    if option is not None:
        return f"write {group}={option}"
    return option_line(group, value) or f"write {group}= and one of {', '.join(options(group))}"
