"""What this machine has, and the levers that follow from it: precision and memory format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from knep.errors import InputError
from knep.nn.norm import calls
from knep.utils.cpu import cpu_bf16

_WRONG = "{} reads single pixels with a stride, whose gradient in bf16 is wrong on CPUs"
_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def precision(wanted: Any, accelerator: str, wrong: str | None = None) -> Any:
    """`auto`: bf16-mixed on GPUs and CPUs that compute in bfloat16, otherwise 32-true; anything else as it is.

    float16 is never chosen unasked: it needs a loss scale, and its range is too small for some recipes.

    wrong: as `wrong_in_bf16` finds it; on a CPU `auto` is then 32-true, and InputError is raised for bf16.
    """
    on_gpu = accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    if wrong and not on_gpu and str(wanted).startswith("bf16"):
        raise InputError(f"trainer.precision={wanted}: {_WRONG.format(wrong)}, write trainer.precision=32-true")
    if wanted != "auto":
        return wanted
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_bf16() and not wrong
    return "bf16-mixed" if fast else "32-true"


def at_precision(trainer: Any, module: nn.Module) -> None:
    """Gives `module` the floating-point type of a run whose weights are all float64 or all half precision.

    Lightning does so once a checkpoint is loaded and averages are made, which then are of another type.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, (DoublePrecision, HalfPrecision)):
        plugin.convert_module(module)


def wrong_in_bf16(model: nn.Module, x_NCHW: Tensor) -> str | None:
    """The path of the first convolution whose gradient in bfloat16 is wrong on a CPU, None where all are right.

    Measured with torch 2.14 on avx512_bf16: where a strided convolution reads a single pixel, the gradient of the taps
    that see padding alone is whatever stood in memory before. In float32 it is 0, as it should be.

    x_NCHW: two images as the model reads them.
    """
    paths = {module: path for path, module in model.named_modules()}
    for call in calls(model, x_NCHW):
        m = call.module
        if isinstance(m, _ConvNd) and any(
            side == 1 and stride > 1 and taps > 1
            for side, stride, taps in zip(call.input.shape[2:], m.stride, m.kernel_size, strict=False)
        ):
            return paths[m]
    return None


def why_not_bf16(wrong: str | None) -> str | None:
    """The line that says why `auto` is 32-true on a CPU that has bfloat16."""
    return f"precision 32-true: {_WRONG.format(wrong)}" if wrong and cpu_bf16() else None


def reseed(seed: int, device: torch.device) -> None:
    """Seeds the generators that a step on `device` draws from: the CPU's and its own.

    `torch.manual_seed` asks every backend there could be, which takes longer than the step of a small network.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a step on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


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


def levers(config: Any, chosen: Any, device: torch.device, lean: bool, processes: int = 1, kept: bool = False) -> str:
    """One line: where and how a run computes; kept: freed memory stays with the process."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    shown = [place, f"precision {chosen}"]
    if processes > 1:
        shown.insert(
            0, f"{processes} processes that share each batch of data.batch_size={config['data']['batch_size']}"
        )
    if config["channels_last"]:
        shown.append("channels_last")
    if config["optimizer"].get("fused"):
        shown.append("fused optimizer")
    if config["compile"]:
        shown.append("compiled" + (" with a search for kernels" if config["compile"] == "max" else ""))
    if device.type == "cuda" and not config["trainer"]["deterministic"]:
        shown.append("TF32, cudnn.benchmark")
    if kept:
        shown.append("freed memory kept")
    if lean:
        shown.append("lean loop")
    return "runs on " + ", ".join(shown)
