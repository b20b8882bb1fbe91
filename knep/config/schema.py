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
from knep.config.moved import with_first_names
from knep.errors import InputError

Node = Mapping[str, Any]  # an option: `_target_` and values, as its YAML or a user's has them


class Described(Protocol):
    """A data module that knows its images: `knep.data.base.ImageData`, or one of a user's."""

    num_classes: int
    channels: int
    image_size: int
    class_names: list[str]


@dataclass(frozen=True)
class DataSpec:
    """What a model has to know of its data. image_size: pixels of a side; bits: of a number of an image, None for 8."""

    num_classes: int
    channels: int
    image_size: int
    class_names: tuple[str, ...]
    bits: int | None = None

    @classmethod
    def of(cls, data: Described) -> DataSpec:
        names = tuple(data.class_names)
        return cls(data.num_classes, data.channels, data.image_size, names, getattr(data, "bits", None))

    @classmethod
    def stored(cls, facts: Node) -> DataSpec:
        """From what `plain` gave."""
        size = facts["num_classes"], facts["channels"], facts["image_size"]
        return cls(*size, tuple(facts["class_names"]), facts.get("bits"))

    def plain(self) -> dict[str, Any]:
        """What a checkpoint keeps, to be rebuilt without the data."""
        found = {name: getattr(self, name) for name in ("num_classes", "channels", "image_size")}
        return ({} if self.bits is None else {"bits": self.bits}) | found | {"class_names": list(self.class_names)}

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

    @classmethod
    def of(cls, config: Node) -> RunConfig:
        """From a composed config, or one that a checkpoint has kept, in which later keys are missing."""
        return cls(
            data=config.get("data") or {},
            model=config["model"],
            slots={slot: config[slot] for slot in SLOTS},
            trainer=TrainerConfig.of(config.get("trainer") or {}),
            plain=config,
            runtime=RuntimeConfig(**_known(RuntimeConfig, config)),
            checkpoint=CheckpointConfig(**_known(CheckpointConfig, config.get("checkpoint") or {})),
            resume=ResumeConfig(**_known(ResumeConfig, config)),
            **{k: config[k] for k in ("seed", "layer_decay", "guard", "doctor", "callbacks") if k in config},
        )

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
        return self.slots["stopping"].get("monitor", "val/loss"), self.slots["stopping"].get("mode", "min")

    def facts(self, spec: DataSpec) -> dict[str, Any]:
        """The plain data that a checkpoint needs to be rebuilt without the data set."""
        return {**spec.plain(), "config": dict(self.plain)}


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
    if "trainer" in config:  # a key that came later, and asks for nothing while it is null
        kept["trainer"] = {k: v for k, v in config["trainer"].items() if (k, v) != ("limit_test_batches", None)}
    kept = with_first_names(kept)
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


def _flat(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not isinstance(key, str):
                raise InputError(f"{prefix or key} has the key {key}, which is no name: write one number or text")
            path = f"{prefix}.{key}" if prefix else key
            yield path
            yield from _flat(value, path)


def _at(container: Any, key: str) -> Any:
    for part in key.split("."):
        container = container[part]
    return container


def _shown(value: Any) -> str:
    text = getattr(value, "text", value)
    if isinstance(text, bool):
        return str(text).lower()
    return "null" if text is None else str(text)


def check_time(value: Any) -> None:
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
        f"trainer.max_time={_shown(value)} is no time: write days:hours:minutes:seconds, for example "
        f"trainer.max_time={_as_time(value)}"
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_time(value: Any) -> str:
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


def check_ranges(config: Mapping[str, Any]) -> None:
    """Ranges of the keys that no constructor checks in time; keys that the config lacks are not asked for."""
    present = set(_flat(config))
    for key in present:
        value = _at(config, key)
        if isinstance(value, float) and _LARGEST < abs(value) < math.inf:
            raise InputError(f"{key}={value:g} is beyond float32, as weights are: write at most {_LARGEST:.2g}")
    for key, least in _AT_LEAST.items():
        if key in present:
            value = _at(config, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
                raise InputError(f"{key}={_shown(value)} must be at least {least}")
    if "trainer.limit_train_batches" in present and config["trainer"]["limit_train_batches"] == 0:
        raise InputError(
            "trainer.limit_train_batches=0 leaves nothing to train on: write a number of batches or a share"
        )
    for key in (key for key in sorted(present) if key.startswith("trainer.limit_")):
        value = _at(config, key)
        if isinstance(value, str) or (isinstance(value, float) and not 0 <= value <= 1):
            raise InputError(f"{key}={value} is no share: write one in [0, 1], or a whole number of batches")
    if config.get("trainer", {}).get("max_steps", -1) < -1:
        raise InputError(f"trainer.max_steps={config['trainer']['max_steps']} must be at least 1, or -1 for no limit")
    if "trainer.limit_test_batches" in present and config["trainer"]["limit_test_batches"] == 0:
        raise InputError("trainer.limit_test_batches=0 leaves nothing to test on: write a number of batches or a share")
    if not isinstance(config["accumulate"], int) or isinstance(config["accumulate"], bool) or config["accumulate"] < 1:
        raise InputError(f"accumulate={config['accumulate']} must be a whole number of micro-batches, at least 1")
    if not 0 < config["layer_decay"] <= 1:
        raise InputError(f"layer_decay={config['layer_decay']} must be in (0, 1]")
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
