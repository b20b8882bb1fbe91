"""What the processor can do."""

import torch


def cpu_bf16() -> bool:
    """Whether the CPU has bfloat16 products (avx512_bf16 or AMX); elsewhere bf16 is slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
