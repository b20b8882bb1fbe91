"""What a number was measured on, and by which code."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from knep.io.git import git


def processor() -> str:
    """The processor's name, where the system tells it."""
    names: list[str] = []
    if Path("/proc/cpuinfo").is_file():
        names = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def hardware() -> str:
    """Processor, cores, Python and torch: what a number was measured on."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {os.cpu_count()} cores{gpu}, Python {platform.python_version()}, torch {torch.__version__}"


def commit() -> str:
    """The commit of knep that runs, 12 digits, or nothing where it lies in no git checkout."""
    return git("-C", str(Path(__file__).parent), "rev-parse", "HEAD").strip()[:12]
