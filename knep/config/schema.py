"""A run, typed: its plain config crosses into these classes once, and each part below takes its own.

Options of slots stay open nodes, `_target_` and values. Ranges, and what a run is told apart by, stand here too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from knep.config.catalog import SLOTS
from knep.config.moved import with_first_names, with_outright_norm
from knep.errors import InputError
from knep.utils.batch_plan import plan_of
from knep.utils.monitors import OF_TASK

Node = Mapping[str, Any]  # an option: `_target_` and values, as its YAML or a user's has them


class Described(Protocol):
    """A data module that knows its images: `knep.data.base.ImageData`, or one of a user's."""

    num_classes: int
    channels: int
    image_size: int
    class_names: list[str]


_OF_ROWS: dict[str, Any] = {"target": "class", "shape": None, "dtype": "uint8"}  # which other rows than images change


@dataclass(frozen=True)
class DataSpec:
    """What a model has to know of its data.

    num_classes: classes, labels, or different tokens or tags, or numbers to predict in a row; class_names: of those.
    channels: of an image; of a vector its length; of tokens how many different ones there are.
    image_size: pixels of a side; 1 for vectors, for sequences their length.
    bits: of a number of an image, None for 8.
    counts: how often each class is there in training, (K,), of labels (2, K) without and with; None where no loss asks.
    target: what a row's target is, a key of `knep.data.base.KINDS`: a class, a number, labels, a mask or tokens.
    shape: of a row's input where it is no square image; dtype: of the input.
    fitted: what rows are read with, fitted on the training split, as plain data; None for rows read as they lie.
    """

    num_classes: int
    channels: int
    image_size: int
    class_names: tuple[str, ...]
    bits: int | None = None
    target: str = "class"
    shape: tuple[int, ...] | None = None
    dtype: str = "uint8"
    counts: tuple[Any, ...] | None = None
    fitted: Node | None = None

    @classmethod
    def of(cls, data: Described) -> DataSpec:
        names = tuple(data.class_names)
        more = {key: getattr(data, key, default) for key, default in _OF_ROWS.items()}
        more["fitted"] = getattr(data, "fitted", None)
        return cls(data.num_classes, data.channels, data.image_size, names, getattr(data, "bits", None), **more)

    @classmethod
    def stored(cls, facts: Node) -> DataSpec:
        """From what `plain` gave."""
        size = facts["num_classes"], facts["channels"], facts["image_size"]
        more = {key: facts.get(key, default) for key, default in _OF_ROWS.items()}
        more["shape"] = None if more["shape"] is None else tuple(more["shape"])
        counts = None if facts.get("counts") is None else tuple(facts["counts"])
        more |= {"counts": counts, "fitted": facts.get("fitted")}
        return cls(*size, tuple(facts["class_names"]), facts.get("bits"), **more)

    def plain(self) -> dict[str, Any]:
        """What a checkpoint keeps, to be rebuilt without the data; of images with a class each, no more than before."""
        found = {name: getattr(self, name) for name in ("num_classes", "channels", "image_size")}
        more = {key: getattr(self, key) for key, default in _OF_ROWS.items() if getattr(self, key) != default}
        more |= {} if self.shape is None else {"shape": list(self.shape)}
        more |= {} if self.counts is None else {"counts": list(self.counts)}
        more |= {} if self.fitted is None else {"fitted": self.fitted}
        bits = {} if self.bits is None else {"bits": self.bits}
        return bits | found | more | {"class_names": list(self.class_names)}

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of a row's input."""
        return (self.channels, self.image_size, self.image_size) if self.shape is None else self.shape

    @property
    def words(self) -> bool:
        """Whether inputs are numbers of words, which no scaling may touch."""
        return self.dtype in ("int64", "int32")

    @property
    def size(self) -> dict[str, int]:
        """The keywords that every model's builder takes."""
        return {"in_channels": self.channels, "num_classes": self.num_classes, "image_size": self.image_size}


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer`: what knep reads of it. lightning: all that Lightning's Trainer is built with, an open node."""

    lightning: Node
    members: int = 1
    accelerator: str = "auto"
    precision: str | int = "auto"
    strategy: str = "auto"
    devices: int | str | list[int] = 1
    num_nodes: int = 1
    max_epochs: int | None = None
    max_steps: int = -1
    max_time: str | Node | None = None
    fast_dev_run: bool | int = False
    deterministic: bool | str = False
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    check_val_every_n_epoch: int | None = 1

    @classmethod
    def of(cls, node: Node) -> TrainerConfig:
        return cls({k: v for k, v in node.items() if k != "members"}, **_known(cls, node, "lightning"))


@dataclass(frozen=True)
class RuntimeConfig:
    """How a run is computed and shown; none of it is a trick."""

    progress: bool = True
    log_every: int = 10
    compile: bool | str = False
    profile: bool = False
    lean: bool = True
    channels_last: bool = False
    test_flip: bool = False
    keep_memory: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """every: optimizer steps or a time such as "5m"; None saves at the ends of epochs alone."""

    every: int | str | None = None


@dataclass(frozen=True)
class ResumeConfig:
    """ckpt: the run folder or checkpoint to go on from; resume: "auto", False or None."""

    ckpt: str | None = None
    resume: str | bool | None = None


@dataclass(frozen=True)
class RunConfig:
    """A whole run. plain: the config that it was made of, which is stored and hashed."""

    data: Node
    model: Node
    slots: Mapping[str, Node]
    trainer: TrainerConfig
    plain: Node
    seed: int = 0
    layer_decay: float = 1.0
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    guard: Node | None = None
    doctor: Node | None = None
    callbacks: Node | None = None
    task: Node | None = None
    loss: Node | None = None
    sampling: Node | None = None
    finetune: Node = field(default_factory=lambda: _function("knep.recipes.finetune.none"))
    metrics: Any = None
    weights: str | None = None  # what the model starts from, as typed
    checkpointing: bool = False  # of activations
    distill: Node | None = None
    calibrate: bool = False

    @classmethod
    def of(cls, config: Node) -> RunConfig:
        """From a composed config, or one that a checkpoint has kept, in which later keys are missing."""
        return cls(
            data=config.get("data") or {},
            model={k: v for k, v in config["model"].items() if k not in _OF_RUN},
            weights=config["model"].get("weights"),
            checkpointing=config["model"].get("checkpointing", False),
            slots={slot: config[slot] for slot in SLOTS},
            trainer=TrainerConfig.of(config.get("trainer") or {}),
            plain=config,
            runtime=RuntimeConfig(**_known(RuntimeConfig, config)),
            checkpoint=CheckpointConfig(**_known(CheckpointConfig, config.get("checkpoint") or {})),
            resume=ResumeConfig(**_known(ResumeConfig, config)),
            **{k: config[k] for k in _PARTS if k in config},
        )

    @property
    def task_name(self) -> str:
        """Of `knep.utils.monitors.OF_TASK`, or the `_target_` of a task of one's own."""
        target = str((self.task or TASK)["_target_"])
        return TASK_NAMES.get(target, target)

    def size(self, spec: DataSpec) -> dict[str, int]:
        """The keywords that every model's builder takes; num_classes: how many numbers the model gives."""
        return {**spec.size, **({"num_classes": 1} if self.task_name == "binary" else {})}

    @property
    def members(self) -> int:
        """How many models are trained, each in a folder of its own where there are several."""
        return max(self.trainer.members, self.slots["averaging"].get("members", 1))

    def seeded(self, seed: int) -> RunConfig:
        """The same run with another seed."""
        return replace(self, seed=seed, plain={**self.plain, "seed": seed})

    @property
    def watched(self) -> tuple[str, str]:
        """The validation metric by which epochs are compared, and its direction."""
        node, name = self.slots["stopping"], self.task_name
        if "monitor" in node or name == "multiclass" or name not in OF_TASK:
            return node.get("monitor", "val/loss"), node.get("mode", "min")
        return f"val/{OF_TASK[name].primary}", OF_TASK[name].mode

    def facts(self, spec: DataSpec) -> dict[str, Any]:
        """The plain data that a checkpoint needs to be rebuilt without the data set."""
        return {**spec.plain(), "config": dict(self.plain)}


_OF_RUN = ("weights", "checkpointing")  # keys of `model` that no builder sees
_PARTS = (
    "seed",
    "layer_decay",
    "guard",
    "doctor",
    "callbacks",
    "task",
    "loss",
    "sampling",
    "finetune",
    "metrics",
    "distill",
    "calibrate",
)

TASK_NAMES = {
    "knep.tasks.classification.Classification": "multiclass",
    "knep.tasks.binary.Binary": "binary",
    "knep.tasks.binary.Multilabel": "multilabel",
    "knep.tasks.regression.Regression": "regression",
    "knep.tasks.segmentation.Segmentation": "segmentation",
    "knep.tasks.tokens.NextToken": "tokens",
    "knep.tasks.tokens.Tagging": "tagging",
}


def _function(name: str) -> dict[str, Any]:
    return {"_target_": name, "_partial_": True}


# Keys that came later than the first runs, with what they say while nothing is asked of them.
TASK = _function("knep.tasks.classification.Classification")
_LATER: dict[str, tuple[Any, ...]] = {
    "task": (TASK,),
    "loss": (_function("knep.recipes.loss.auto"),),
    "sampling": (_function("knep.recipes.sampling.none"),),
    "finetune": (_function("knep.recipes.finetune.none"),),
    "metrics": ("none", None, []),
    "calibrate": (False,),
    "distill": ({"teacher": None, "alpha": 0.5, "temperature": 2.0},),
}
_LATER_IN: dict[str, dict[str, Any]] = {
    "trainer": {"limit_test_batches": None},
    "data": {"task": "multiclass", "micro": None},
    "model": {"args": None, "weights": None, "checkpointing": False},
    "averaging": {"warmup": "ratio"},
    "scheduler": {"start": None, "prefix": True, "by_epoch": False},
    "optimizer": {"lr_per": None, "variant": "muon", "coefficients": "original", "beta2": None, "wrap": []},
    "augment": {"off_epoch": None, "padding": "black", "mode": "black", "count": 1},
}


def as_first(config: Node) -> dict[str, Any]:
    """A config as runs had it before the keys that came later, where these ask for nothing."""
    kept = {k: v for k, v in config.items() if k not in _LATER or v not in _LATER[k]}
    for group, later in _LATER_IN.items():
        if isinstance(kept.get(group), Mapping):
            kept[group] = {k: v for k, v in kept[group].items() if k not in later or v != later[k]}
    return kept


def completed(config: Node) -> dict[str, Any]:
    """A config of any version with all keys that came later, to be compared with others."""
    return {key: values[0] for key, values in _LATER.items()} | as_first(config)


def _known(kind: type, node: Node, *beside: str) -> dict[str, Any]:
    return {f.name: node[f.name] for f in fields(kind) if f.name in node and f.name not in beside}


# Where a run lies and how it is watched does not change what it computes.
NOT_HASHED = (
    "allow_targets",
    "budget",
    "name",
    "ckpt",
    "progress",
    "log_every",
    "threads",
    "checkpoint",
    "resume",
    "slurm",
)


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hex digits that name what a run computes: two runs with the same hash do the same."""
    kept = {k: v for k, v in config.items() if k not in NOT_HASHED}
    kept["data"] = {k: v for k, v in config.get("data", {}).items() if k != "write_cache"}
    kept = with_first_names(with_outright_norm(as_first(kept)))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


_DEVICES, _THREADS = 128, 128  # of one machine

_NAME = re.compile(r"[^\W_][\w +.,=@-]{0,199}")

_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")

_LARGEST = 3.4e38  # of float32


_AT_LEAST = {
    "trainer.max_epochs": 1,
    "trainer.num_nodes": 1,
    "trainer.members": 1,
    "log_every": 1,
    "trainer.check_val_every_n_epoch": 1,
}


_TABLES = frozenset({"accumulate"})  # by epochs: their numbers are no keys


def key_paths(node: object, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping) and prefix not in _TABLES:
        for key, value in node.items():
            if not isinstance(key, str):
                raise InputError(f"{prefix or key} has the key {key}, which is no name: write one number or text")
            path = f"{prefix}.{key}" if prefix else key
            yield path
            yield from key_paths(value, path)


def value_at(container: Any, key: str) -> Any:
    for part in key.split("."):
        container = container[part]
    return container


def as_typed(value: object) -> str:
    text = getattr(value, "text", value)
    if isinstance(text, bool):
        return str(text).lower()
    return "null" if text is None else str(text)


def check_time(value: object) -> None:
    """Raises InputError unless `trainer.max_time` is null, "days:hours:minutes:seconds" or a group like {hours: 1}."""
    if value is None:
        return
    if isinstance(value, Mapping):
        fine = value and set(value) <= set(_UNITS) and all(_number(v) and v >= 0 for v in value.values())
        if fine and any(value.values()):
            return
    elif isinstance(value, str):
        given = re.fullmatch(r"(\d{1,6}):(\d\d):(\d\d):(\d\d)", value.strip())
        if given and any(map(int, given.groups())):
            return
    raise InputError(
        f"trainer.max_time={as_typed(value)} is no time: write days:hours:minutes:seconds, for example "
        f"trainer.max_time={_as_time(value)}"
    )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_time(value: object) -> str:
    """What somebody may have meant by a number of seconds, "90s", "10m" or "01:30:00"; else ten minutes."""
    found = re.fullmatch(r"(\d{1,9})(\.\d*)?\s*([smhd]?)[a-z]*", str(value).strip().lower())
    clock = re.fullmatch(r"(?:(\d{1,4}):)?(\d{1,4}):(\d{1,2})", str(value).strip())
    seconds = 600
    if found:
        seconds = int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[3]]
    elif clock:
        seconds = int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + int(clock[3])
    minutes, seconds = divmod(seconds or 600, 60)
    return f"{minutes // 1440:02}:{minutes // 60 % 24:02}:{minutes % 60:02}:{seconds:02}"


def _check_warmup(scheduler: Node, epochs: object) -> None:
    warmup = scheduler.get("warmup")
    ours = str(scheduler.get("_target_", "")).startswith("knep.recipes.scheduler.")
    if not ours or not isinstance(warmup, (int, float)) or warmup < 1:
        return
    cure = "a twentieth of them is 0.05"
    if isinstance(epochs, int) and epochs > warmup:
        cure = f"of {epochs} epochs, {warmup} are {warmup / epochs:.3g}"
    raise InputError(f"scheduler.warmup={warmup} is a share of all steps, in [0, 1): {cure}")


def _check_distill(node: Node) -> None:
    """Ranges of `distill`, and that there is a teacher where its values were changed."""
    if not node:
        return
    (plain,) = _LATER["distill"]
    changed = next((key for key, value in node.items() if value != plain[key]), None)
    if node["teacher"] is None and changed is not None:
        raise InputError(f"distill.{changed}={as_typed(node[changed])} asks for distill.teacher=outputs/<run>")
    if not _number(node["alpha"]) or not 0 < node["alpha"] <= 1:
        raise InputError(f"distill.alpha={as_typed(node['alpha'])} must be in (0, 1]")
    if not _number(node["temperature"]) or node["temperature"] <= 0:
        raise InputError(f"distill.temperature={as_typed(node['temperature'])} must be in (0, inf)")


def check_ranges(config: Mapping[str, Any]) -> None:
    """Ranges of the keys that no constructor checks in time; keys that the config lacks are not asked for."""
    present = set(key_paths(config))
    for key in present:
        value = value_at(config, key)
        if isinstance(value, float) and _LARGEST < abs(value) < math.inf:
            raise InputError(f"{key}={value:g} is beyond float32, as weights are: write at most {_LARGEST:.2g}")
    for key, least in _AT_LEAST.items():
        if key in present:
            value = value_at(config, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
                raise InputError(f"{key}={as_typed(value)} must be at least {least}")
    if "trainer.limit_train_batches" in present and config["trainer"]["limit_train_batches"] == 0:
        raise InputError(
            "trainer.limit_train_batches=0 leaves nothing to train on: write a number of batches or a share"
        )
    for key in (key for key in sorted(present) if key.startswith("trainer.limit_")):
        value = value_at(config, key)
        if isinstance(value, str) or (isinstance(value, float) and not 0 <= value <= 1):
            raise InputError(f"{key}={value} is no share: write one in [0, 1], or a whole number of batches")
    if config.get("trainer", {}).get("max_steps", -1) < -1:
        raise InputError(f"trainer.max_steps={config['trainer']['max_steps']} must be at least 1, or -1 for no limit")
    if "trainer.limit_test_batches" in present and config["trainer"]["limit_test_batches"] == 0:
        raise InputError("trainer.limit_test_batches=0 leaves nothing to test on: write a number of batches or a share")
    plan_of(config["accumulate"])
    _check_warmup(config.get("scheduler") or {}, config.get("trainer", {}).get("max_epochs"))
    if not 0 < config["layer_decay"] <= 1:
        raise InputError(f"layer_decay={config['layer_decay']} must be in (0, 1]")
    _check_distill(config.get("distill") or {})
    if not isinstance((config.get("model") or {}).get("checkpointing", False), bool):
        raise InputError(f"model.checkpointing={as_typed(config['model']['checkpointing'])} must be true or false")
    if not isinstance(config.get("calibrate", False), bool):
        raise InputError(f"calibrate={as_typed(config['calibrate'])} must be true or false")
    check_time(config.get("trainer", {}).get("max_time"))
    devices = config.get("trainer", {}).get("devices")
    if isinstance(devices, int) and devices > _DEVICES:
        raise InputError(f"trainer.devices={devices} starts as many processes: write at most {_DEVICES}")
    if not _NAME.fullmatch(str(config.get("name", "x"))):
        raise InputError(f"name={config['name']} ends the run folder's name: write up to 200 letters, digits, - or _")
    if not 0 <= config.get("seed", 0) < 2**32:
        raise InputError(f"seed={config['seed']} must be in [0, 2**32)")
    threads = config.get("threads")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads={threads} must be a whole number, at least 1, or null for all cores")
    if threads is not None and threads > _THREADS:
        raise InputError(f"threads={threads} starts as many threads: write at most {_THREADS}, or null for all cores")
