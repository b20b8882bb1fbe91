"""What a config may ask of this machine: layers, bytes, processes and members, counted before they are made.

A config may come from a stranger, and a user's may have a slip of the keyboard in it. Each limit has a key that lifts
it, `budget.layers=50000`, for whoever types it; what a file says of its own budget is left out or refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knep.errors import InputError

if TYPE_CHECKING:
    from torch import nn

# Key -> what is allowed without a word; None is worked out from this machine.
DEFAULTS: dict[str, int | float | None] = {"layers": 10_000, "megabytes": 256, "members": 1000, "processes": None}
_limits = dict(DEFAULTS)
_MOST = 1e12
_STEPS = 10_000  # operations of torch within one constructor
_PROCESS, _WORKER = 500 << 20, 100 << 20  # bytes of one that trains, and of one that reads data
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_building = False


def lift(name: str, value: object) -> None:
    """Sets a limit, for a user who types `budget.<name>=<value>`; None is its default. Raises InputError for no key."""
    if name not in DEFAULTS:
        raise InputError(f"there is no key budget.{name}: write one of budget.{', budget.'.join(DEFAULTS)}")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MOST):
        raise InputError(
            f"budget.{name}={value} must be a number above 0, at most {_MOST:g}, or null for what this machine has"
        )
    _limits[name] = DEFAULTS[name] if value is None else value


def take(config: dict[str, Any]) -> None:
    """Takes `budget` out of a composed config. Raises InputError for a limit that nobody typed."""
    said = config.pop("budget", None) or {}
    for name, value in said.items() if isinstance(said, Mapping) else [("", said)]:
        if value != _limits.get(name, "") and value != DEFAULTS.get(name, ""):
            key = f"budget.{name}={value}".replace(".=", "=")
            raise InputError(f"{key} comes from a file, which cannot lift its own limits: type it if you trust it")


def machine_memory() -> int:
    """Bytes that this process may have: the machine's, or its container's where that is less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return memory


def check_processes(devices: int, workers: int = 0) -> None:
    """Raises InputError for more processes than this machine's cores and memory serve.

    devices: processes that train; workers: of each, that read data.
    """
    cores = os.cpu_count() or 1
    limit = _limits["processes"]
    wanted = devices * (1 + workers)
    key = f"data.workers={workers}" if workers else f"trainer.devices={devices}"
    if limit is not None:
        fits = wanted <= limit
    else:
        bytes_ = devices * (_PROCESS + workers * _WORKER)
        fits = (
            devices <= max(4, 2 * cores)
            and wanted <= max(16, 4 * cores)
            and (wanted == 1 or bytes_ <= machine_memory())
        )
    if not fits:
        raise InputError(
            f"{key} starts {wanted:,} processes, and this machine has {cores} cores and "
            f"{machine_memory() / 1e9:,.1f} GB: write fewer, or lift the limit with budget.processes={wanted}"
        )


def check_members(key: str, members: object) -> None:
    """Raises InputError for more models than a run is taken to mean."""
    if isinstance(members, int) and members > (_limits["members"] or 0):
        raise InputError(
            f"{key}={members} trains {members:,} models: write fewer, or lift the limit with budget.members={members}"
        )


def check_config(config: Mapping[str, Any]) -> None:
    """`check_processes` and `check_members` for a whole config, before any of it is built."""
    trainer, data, averaging = (config.get(key) or {} for key in ("trainer", "data", "averaging"))
    check_members("trainer.members", trainer.get("members"))
    check_members("averaging.members", averaging.get("members"))
    workers = data.get("workers")
    devices = _devices(trainer.get("devices"))
    check_processes(devices)
    check_processes(devices, workers if isinstance(workers, int) and workers > 0 else 0)
    nodes = trainer.get("num_nodes", 1)
    if (
        isinstance(nodes, int)
        and nodes > 1
        and not {"MASTER_ADDR", "NODE_RANK", "SLURM_NTASKS", "GROUP_RANK"} & set(os.environ)
    ):
        raise InputError(
            f"trainer.num_nodes={nodes} waits for other machines, and nothing says where they are: set MASTER_ADDR and "
            "NODE_RANK on each, or start it by torchrun or srun"
        )


def _devices(value: object) -> int:
    """How many processes Lightning starts for `trainer.devices` on this machine, as far as the value says it."""
    if isinstance(value, str) and "," in value:
        value = value.split(",")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return max(1, len(value))
    return max(1, int(value)) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else 1


@contextmanager
def layers_counted(what: str) -> Iterator[None]:
    """Raises InputError within as soon as more layers are put together than `budget.layers`."""
    from torch.nn.modules.module import register_module_module_registration_hook

    left = [int(_limits["layers"] or 0)]

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise InputError(
                f"{what} has more than {_limits['layers']:,} layers: write smaller numbers, or lift the limit with "
                f"budget.layers={2 * int(_limits['layers'] or 0)}"
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def bytes_counted() -> Iterator[None]:
    """Raises InputError within before tensors of more than `budget.megabytes` are made, or at too many operations."""
    global _building
    if _building:
        yield
        return
    from knep.config.factories import Counted

    most = int(float(_limits["megabytes"] or 0) * 1e6)
    _building = True
    try:
        with layers_counted("a part of the config"), Counted(most, _STEPS):
            yield
    finally:
        _building = False


def check_room(size: int, what: str, remedy: str) -> None:
    """Raises InputError where `size` bytes are more than the machine's memory; what: "the model's weights need"."""
    memory = machine_memory()
    if size > memory:
        raise InputError(f"{what} {size / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f} GB: {remedy}")
