"""Training mode and evaluation mode that a model does not keep, and batch norm: shared, or with a momentum that is read
in another framework's sense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from knep.doctor.checks.probe import Probe
from knep.doctor.findings import Finding, finding, named
from knep.doctor.subject.rng_isolation import undisturbed
from knep.surgery.record import hooked


def modes(p: Probe) -> list[Finding]:
    """mode_left_on where a layer that acts differently in training stays in the other mode."""
    if not any(map(_sensitive, p.model.modules())):
        return []
    off, on = (_left(p, training) for training in (True, False))
    found = []
    if off:
        text = f"{named(off)} stay in eval mode after model.train()" if len(off) > 1 else f"{off[0]} stays in eval mode"
        mend = "let train() reach every layer, and call no eval() in forward"
        found.append(finding("mode_left_on", f"{text}, in the pass of a training step", 0.9, layers=off, mend=mend))
    if on:
        text = f"{named(on)} act as in training after model.eval()"
        mend = "let eval() reach every layer, call no train() in forward, and give dropout training=self.training"
        found.append(finding("mode_left_on", text, 0.92, layers=on, mend=mend))
    if not found and p.subject.eval_given:
        layers = [path for path, m in p.model.named_modules() if _sensitive(m)]
        text = f"the model was given in eval mode, in which {named(layers)} do not act as in training"
        found.append(finding("mode_left_on", text, 0.85, layers=layers, mend="call model.train() before each epoch"))
    return found


def _left(p: Probe, training: bool) -> list[str]:
    """Layers in the wrong mode while a pass goes through them."""
    twin = p.subject.copy()
    twin.train(training)
    wrong: dict[str, None] = {}
    paths = {m: path for path, m in twin.named_modules() if _sensitive(m)}

    def look(m: nn.Module, args: Any, output: Any) -> None:
        if m.training != training:
            wrong[paths[m]] = None

    with torch.no_grad(), undisturbed(0), hooked(list(paths), leave=look):
        p.subject.answer(twin, p.batch)
    return list(wrong)


def _sensitive(m: nn.Module) -> bool:
    if isinstance(m, _DropoutNd):
        return m.p > 0
    fresh = isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None
    return bool(fresh and not m.running_mean.any() and bool((m.running_var == 1).all()))  # pyright: ignore


def norms(p: Probe) -> list[Finding]:
    """shared_norm and norm_momentum."""
    layers = {m: path for path, m in p.model.named_modules() if isinstance(m, _BatchNorm)}
    if not layers:
        return []
    high = [path for m, path in layers.items() if m.momentum is not None and 0.85 <= m.momentum < 1]
    found = []
    if high:
        momentum = max(m.momentum for m, path in layers.items() if path in high and m.momentum is not None)
        text = f"{named(high)}: momentum={momentum:g} keeps {1 - momentum:.2g} of the running statistics at each step: "
        text += "here it is the share of the new batch"
        mend = f"write momentum={1 - momentum:.3g}, what other frameworks call {momentum:g}"
        found.append(finding("norm_momentum", text, 0.9, layers=high, mend=mend))
    return found + _shared(p, layers)


def _shared(p: Probe, layers: dict[_BatchNorm, str]) -> list[Finding]:
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    twin = p.subject.copy().train()
    paths = {m: path for path, m in twin.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}

    def look(m: Any, args: Any, output: Any) -> None:
        x = args[0].detach().double()
        axes = [a for a in range(x.ndim) if a != 1]
        seen.setdefault(id(m), []).append((x.mean(axes), x.std(axes, correction=0)))

    with torch.no_grad(), undisturbed(0), hooked(list(paths), leave=look):
        p.subject.answer(twin, p.subject.some(p.subject.train[0], 64))
    ill = {}
    for m, path in paths.items():
        calls = seen.get(id(m), [])
        if len(calls) < 2:
            continue
        size = torch.stack([s for _, s in calls]).clamp(min=1e-6)
        means = torch.stack([c for c, _ in calls])
        apart = float((means.amax(0) - means.amin(0)).div(size.amax(0)).median())
        ratio = float((size.amax(0) / size.amin(0)).median())
        if apart > 0.5 or ratio > 1.6:
            ill[path] = (len(calls), apart, ratio)
    if not ill:
        return []
    path, (count, apart, ratio) = next(iter(ill.items()))
    text = f"{path} is passed {count} times in a forward pass, by values whose means lie {apart:.2g} deviations apart "
    text += f"and whose deviations differ {ratio:.3g} times: its running statistics fit none of them"
    return [finding("shared_norm", text, 0.9, layers=list(ill))]
