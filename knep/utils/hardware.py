"""What this machine has, and the levers that follow from it: precision and memory format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import nn

from knep.errors import InputError

_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def at_precision(trainer: Trainer, module: nn.Module) -> None:
    """Gives `module` the floating-point type of a run whose weights are all float64 or all half precision.

    Lightning does so once a checkpoint is loaded and averages are made, which then are of another type.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, (DoublePrecision, HalfPrecision)):
        plugin.convert_module(module)


def compile_model(model: nn.Module, how: object) -> None:
    """`torch.compile` in place, so that checkpoints and paths into the model stay as they are.

    how: null or false leaves the model alone, true compiles it, "max" also tries kernels (slow to start, on GPUs
    often the fastest). Raises InputError for anything else.
    """
    if how in (None, False):
        return
    if how not in (True, "max"):
        raise InputError(f"compile={how} is unknown: write compile=true, compile=max or compile=false")
    model.compile(mode="max-autotune" if how == "max" else None)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU what the kernel could give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            lines = dict(line.split(":", 1) for line in f)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def fast_products(deterministic: object) -> bool:
    """TF32 for float32 products on GPUs unless the run is `deterministic`; whether cudnn may try its kernels first."""
    fast = torch.cuda.is_available() and not deterministic
    if fast:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    return fast


@contextmanager
def quick_checks() -> Iterator[None]:
    """Spares a machine without a GPU the search for its driver, which Adam's step repeats where Lightning asks for it.

    The variable keeps worker processes usable where there is a GPU, and is left alone there.
    """
    before = None if torch.cuda.is_available() else os.environ.pop(_NVML, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_NVML] = before


def cpu_bf16() -> bool:
    """Whether the CPU has bfloat16 products (avx512_bf16 or AMX); elsewhere bf16 is slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
