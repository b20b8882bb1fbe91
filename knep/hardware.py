"""What this machine has, and the levers that follow from it: precision and memory format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from knep.errors import InputError

_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def precision(wanted: Any, accelerator: str) -> Any:
    """`auto`: bf16-mixed on GPUs and CPUs that compute in bfloat16, otherwise 32-true; anything else as it is.

    float16 is never chosen unasked: it needs a loss scale, and its range is too small for some recipes.
    """
    if wanted != "auto":
        return wanted
    on_gpu = accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_bf16()
    return "bf16-mixed" if fast else "32-true"


def cpu_bf16() -> bool:
    """Whether the CPU has bfloat16 products (avx512_bf16 or AMX); elsewhere bf16 is slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def reseed(seed: int, device: torch.device) -> None:
    """Seeds the generators that a step on `device` draws from: the CPU's and its own.

    `torch.manual_seed` asks every backend there could be, which takes longer than the step of a small network.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def compile_model(model: nn.Module, how: Any) -> None:
    """`torch.compile` in place, so that checkpoints and paths into the model stay as they are.

    how: null or false leaves the model alone, true compiles it, "max" also tries kernels (slow to start, on GPUs
    often the fastest). Raises InputError for anything else.
    """
    if how in (None, False):
        return
    if how not in (True, "max"):
        raise InputError(f"compile={how} is unknown: write compile=true, compile=max or compile=false")
    model.compile(mode="max-autotune" if how == "max" else None)


def fast_products(deterministic: Any) -> bool:
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


def levers(config: Any, chosen: Any, device: torch.device, lean: bool) -> str:
    """One line: where and how a run computes."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    shown = [place, f"precision {chosen}"]
    if config["channels_last"]:
        shown.append("channels_last")
    if config["optimizer"].get("fused"):
        shown.append("fused optimizer")
    if config["compile"]:
        shown.append("compiled" + (" with a search for kernels" if config["compile"] == "max" else ""))
    if device.type == "cuda" and not config["trainer"]["deterministic"]:
        shown.append("TF32, cudnn.benchmark")
    if lean:
        shown.append("lean loop")
    return "runs on " + ", ".join(shown)
