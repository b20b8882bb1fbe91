"""Findings with what their disease's table prescribes, and layers named compactly."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from knep.doctor.findings import Finding, diseases


def finding(
    disease: str, evidence: str, gravity: float, *, certain: bool = True, layers: Sequence[str] = ()
) -> Finding:
    """With the overrides and the advice of the table; gravity is cut to [0, 1]."""
    about = diseases()[disease]
    return Finding(
        disease,
        evidence,
        min(1.0, max(0.0, gravity)),
        certain,
        tuple(layers),
        overrides=about.overrides,
        mend=about.mend,
    )


def named(paths: Sequence[str]) -> str:
    """One or two paths in full, of more the first, the last and how many."""
    unique = list(dict.fromkeys(paths))
    if len(unique) <= 2:
        return " and ".join(unique)
    return f"{unique[0]} to {unique[-1]} ({len(unique)} layers)"


def share(value: float) -> str:
    """A share in percent, without rounding what is not all to all."""
    text = f"{value:.1%}"
    return "over 99.9%" if text == "100.0%" and value < 1 else text.replace(".0%", "%")


def row(values: Tensor) -> str:
    """Numbers by channel (C,), of more than four the first ones."""
    return "/".join(f"{v:.3g}" for v in values[:4].tolist()) + ("/..." if len(values) > 4 else "")
