"""The floating-point type of a run, and the other levers that follow from the machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from knep.config.schema import DataSpec, RunConfig
from knep.errors import InputError
from knep.surgery.record import calls
from knep.utils.hardware import cpu_bf16

_WRONG = "{} reads single pixels with a stride, whose gradient in bf16 is wrong on CPUs"


def precision(wanted: object, accelerator: str, wrong: str | None = None, digits: str | None = None) -> Any:
    """`auto`: bf16-mixed on GPUs and CPUs that compute in bfloat16, otherwise 32-true; anything else as it is.

    float16 is never chosen unasked: it needs a loss scale, and its range is too small for some recipes.

    wrong: as `wrong_in_bf16` finds it; on a CPU `auto` is then 32-true, and InputError is raised for bf16; digits: as
    `lost_in_bf16` says; `auto` is then 32-true everywhere.
    """
    on_gpu = accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    if wrong and not on_gpu and str(wanted).startswith("bf16"):
        raise InputError(f"trainer.precision={wanted}: {_WRONG.format(wrong)}, write trainer.precision=32-true")
    if wanted != "auto":
        return wanted
    if digits:
        return "32-true"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_bf16() and not wrong
    return "bf16-mixed" if fast else "32-true"


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


def lost_in_bf16(task: str, spec: DataSpec) -> str | None:
    """Whose digits bfloat16 would round away, None for images, words and features that stand it.

    It keeps 8 binary digits, 3 of decimals: rows of a table differ in later ones, and so do numbers to predict. On
    ggplot2's diamonds the test's RMSE was 896 in bf16-mixed and 677 in 32-true, all else equal.
    """
    if task == "regression":
        return "numbers to predict"
    return "a table's numbers" if spec.dtype.startswith("float") and len(spec.row) != 3 else None


def why_not_bf16(wrong: str | None) -> str | None:
    """The line that says why `auto` is 32-true on a CPU that has bfloat16."""
    return f"precision 32-true: {_WRONG.format(wrong)}" if wrong and cpu_bf16() else None


def levers(
    run: RunConfig,
    chosen: str,
    device: torch.device,
    lean: bool,
    processes: int = 1,
    kept: bool = False,
    digits: str | None = None,
    images: bool = True,
) -> str:
    """One line: where and how a run computes.

    kept: freed memory stays with the process; digits: `lost_in_bf16`; images: whether inputs are (N, C, H, W).
    """
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    because = f" ({digits} would lose digits in bf16)" if digits and run.trainer.precision == "auto" else ""
    shown = [place, f"precision {chosen}{because}"]
    if processes > 1:
        shown.insert(0, f"{processes} processes that share each batch of data.batch_size={run.data['batch_size']}")
    if run.runtime.channels_last and images:
        shown.append("channels_last")
    if run.slots["optimizer"].get("fused"):
        shown.append("fused optimizer")
    if run.runtime.compile:
        shown.append("compiled" + (" with a search for kernels" if run.runtime.compile == "max" else ""))
    if device.type == "cuda" and not run.trainer.deterministic:
        shown.append("TF32, cudnn.benchmark")
    if kept:
        shown.append("freed memory kept")
    if lean:
        shown.append("lean loop")
    return "runs on " + ", ".join(shown)
