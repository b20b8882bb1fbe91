"""The options of every group, read from the YAML files: no torch, no Hydra, so that it answers at once."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

SLOTS = (
    "scaling",
    "augment",
    "norm",
    "activation",
    "dropout",
    "init",
    "optimizer",
    "clip",
    "scheduler",
    "regularization",
    "averaging",
    "stopping",
)
# Of what is learned, and from which weights: tricks too, which no ledger of images has measured.
TASK_SLOTS = ("loss", "sampling", "finetune")
GROUPS = ("recipe", "data", "model", "task", *TASK_SLOTS, *SLOTS, "guard", "callbacks", "trainer")
CONF = Path(str(files("knep") / "conf"))
_RESULTS = Path(str(files("knep") / "evidence" / "results"))


def options(group: str) -> list[str]:
    """The options of a group, in alphabetical order."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def reason(group: str, option: str) -> str:
    """The first comment of an option's file: when to use it, and its source."""
    for line in (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
    return ""


def cells(slot: str) -> list[dict[str, Any]]:
    """What the ledger measured of a slot's options, a cell per option and workload; [] where nothing was."""
    path = _RESULTS / f"{slot}.json"
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []


def headline(slot: str) -> dict[str, str]:
    """Option -> its measured effect on test accuracy in points, with its 95 % interval, on each workload."""
    said: dict[str, list[str]] = {}
    for cell in cells(slot):
        if cell.get("effect"):
            a = cell["effect"]["accuracy"]
            numbers = f"{100 * a['mean']:+.2f} [{100 * a['low']:+.2f}, {100 * a['high']:+.2f}]"
            said.setdefault(cell["option"], []).append(f"{cell['workload']} {numbers} n={cell['n']}")
    return {option: ", ".join(parts) for option, parts in said.items()}


def recipe_choices(recipe: str) -> dict[str, str]:
    """Slot -> option that a recipe picks, from the `override /slot: option` lines of its file, a list as "[a,b]"."""
    path = CONF / "recipe" / f"{recipe}.yaml"
    if not path.is_file():
        return {}  # a recipe of the user's own, on their search path
    picked = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("- override /"):
            slot, _, option = text.removeprefix("- override /").partition(":")
            picked[slot] = option.split("#")[0].replace(" ", "")
    return picked


def help_text() -> str:
    """What `python train.py --help` prints."""
    width = max(len(g) for g in GROUPS)
    lines = [f"  {group:{width}}  {', '.join(options(group))}" for group in GROUPS]
    return "\n".join(
        [
            "python train.py [group=option ...] [key=value ...]",
            "",
            "Trains a recipe on a data set and tests it once. Each trick is one override:",
            "",
            *lines,
            "",
            "Any key of the config can be set, for example optimizer.lr=3e-3 trainer.max_epochs=5 seed=1;",
            "--cfg job prints them all. -m runs one job per value: -m dropout=standard dropout.p=0,0.2,0.5.",
            "ckpt=<run folder> resumes a run. Runs lie in outputs/: tensorboard --logdir outputs shows them.",
        ]
    )
