"""Findings that looks show: inputs, labels, signals, gradients and parameters of single steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from knep.doctor.findings import Finding, finding
from knep.doctor.live.history import Stream, middle
from knep.observe.layer_stats import Look, Values

# Beyond what healthy runs show; see tests/doctor/test_live.py for those that are held against them.
_RAW, _TINY, _SHIFTED = 10.0, 0.01, 8.0
_DEAD, _DEAD_LAYER = 0.7, 0.95
_FLAT = 0.75
_VANISHED, _EXPLODED = 1e-4, 1e3
_LOUD = 1e4
_STUCK = 0.5
_STALE, _STALE_RATIO = 0.35, 2.5  # deviations, and ratio of variances, between running statistics and the batch's
_CONFIRM = 3  # looks that have to agree on what a step may show by chance


def symptoms(stream: Stream) -> Iterator[Finding]:
    """What the looks so far show; a finding's `began` is the first look that showed it."""
    if not stream.looks:
        return
    for judge in (_inputs, _labels, _outputs, _parameters, _symmetric, _rectifiers, _flat_ends, _gradients):
        yield from judge(stream)
    for judge in (_precision, _statistics):
        yield from judge(stream)


def _inputs(stream: Stream) -> Iterator[Finding]:
    if stream.bad_input is not None:
        text = f"{stream.bad_share:.2%} of the values of the batch of step {stream.bad_input} are NaN or infinite"
        yield finding("non_finite_inputs", text, 1.0, stream.bad_input)
    if stream.bad_target is not None:
        text = f"the targets of step {stream.bad_target} hold NaN or infinity"
        yield finding("non_finite_targets", text, 1.0, stream.bad_target)
    seen = [look for look in stream.looks if look.input is not None]
    same = [look for look in seen if look.input and look.input.apart == 0 and look.input.finite == 1]
    if seen and len(same) == len(seen) and len(seen) >= 2:
        text = f"the images of a batch do not differ in any of {len(seen)} batches (steps {_steps(seen)})"
        yield finding("constant_inputs", text, 0.98, seen[0].step)
        return
    given = [look for look in stream.looks if look.first is not None and "Norm" not in look.first_kind]
    odd = [look for look in given if _odd(look.first)]
    if odd and odd[0] is given[0] and len(odd) > 0.5 * len(given):
        first = odd[0].first
        assert first is not None
        text = f"the first layer is given values of mean {first.mean:.3g} and deviation {first.std:.3g}"
        raw = first.std > _RAW or abs(first.mean) > _RAW
        yield finding("unscaled_inputs", text, 0.85 if raw else 0.7, odd[0].step, certain=raw)


def _odd(given: Values | None) -> bool:
    """Whether values are far from mean 0 and deviation 1; those that do not vary at all are another disease."""
    if given is None or given.std == 0 or given.finite < 1:
        return False
    shifted = abs(given.mean) > _SHIFTED * given.std and abs(given.mean) > 1
    return given.std > _RAW or abs(given.mean) > _RAW or given.std < _TINY or shifted


def _labels(stream: Stream) -> Iterator[Finding]:
    total, batches = stream.counted, len(stream.labels)
    images = total.total()
    if batches < 5 or images < 40:
        return
    most = max(total.values()) / images
    if len(total) == 1 and batches >= 20:
        text = f"all {images} labels of the first {batches} batches are {next(iter(total))}"
        yield finding("constant_labels", text, 0.97, 0)
        return
    usual = middle(stream.labels)
    # Where the labels come in an order, the few classes of a batch say nothing about all: long enough sequences do.
    if usual > 0.8 and most < 0.65:
        text = f"the commonest class makes {usual:.0%} of a batch and {most:.0%} of {batches} batches together"
        yield finding("sorted_batches", text, 0.9, 0)
    elif most > 0.9:
        yield finding("class_imbalance", f"{most:.0%} of {images} labels are one class", 0.6, 0, certain=False)


def _outputs(stream: Stream) -> Iterator[Finding]:
    seen = [look for look in stream.looks if look.output is not None]
    soft = [look for look in seen if look.probabilities]
    if seen and len(soft) == len(seen) and soft[0].doubled is not False:
        known = bool(soft[0].doubled)
        said = "the loss is the cross-entropy that takes them for scores" if known else "the loss is near log(classes)"
        text = f"the outputs are probabilities already (rows sum to 1), and {said}"
        if known or _bounded(stream):
            yield finding("double_softmax", text, 0.95 if known else 0.7, soft[0].step, certain=known)
    flat = [look for look in seen if _collapsed(look)]
    if len(seen) >= 2 and len(flat) >= max(2, len(seen) // 2) and flat[-1] is seen[-1]:
        out = flat[-1].output
        assert out is not None
        text = f"outputs differ by {out.apart:.1e} between images, at a size of {out.largest:.1e}"
        yield finding("signal_collapse", text, 0.8, flat[0].step)


def _bounded(stream: Stream) -> bool:
    """Whether losses stay where the cross-entropy of probabilities has to be: above log(1 + (K - 1) / e)."""
    look = stream.looks[0]
    classes = look.classes
    losses = stream.recent(len(stream.losses))
    return classes > 1 and len(losses) > 0 and min(losses) >= math.log(1 + (classes - 1) / math.e) - 1e-3


def _collapsed(look: Look) -> bool:
    given, out = look.input, look.output
    if given is None or out is None or given.apart == 0 or out.finite < 1:
        return False
    return out.apart <= 1e-4 * max(out.largest, 1e-12) or out.apart < 1e-7


def _parameters(stream: Stream) -> Iterator[Finding]:
    looks = [look for look in stream.looks if look.weights]
    if not looks:
        return
    if stream.absent:
        text = f"the optimizer does not have {_names(stream.absent)}"
        text += f", but {stream.foreign} tensors that the model has not" if stream.foreign else ""
        yield finding("cut_off", text, 0.9, 0, layers=stream.absent)
    else:
        none = [w.path for w in looks[-1].weights if w.grad_norm is None]
        missing = [path for path in none if all(_without(look, path) for look in looks)]
        if missing and len(looks) >= 2:
            text = f"{_names(missing)} got no gradient in {len(looks)} looks at steps {_steps(looks)}"
            yield finding("cut_off", text, 0.9, looks[0].step, layers=tuple(missing))
    if stream.frozen:
        text = f"{_names(stream.frozen)} have requires_grad=False"
        if stream.fresh:
            text += f"; {_names(stream.fresh)} look like a random start"
        grave = 0.85 if stream.fresh else 0.4
        yield finding("frozen_parameters", text, grave, 0, certain=bool(stream.fresh), layers=stream.frozen)


def _without(look: Look, path: str) -> bool:
    return any(w.path == path and w.grad_norm is None for w in look.weights)


def _symmetric(stream: Stream) -> Iterator[Finding]:
    looks = [look for look in stream.looks if look.weights]
    if len(looks) < 2:
        return
    alike = [w.path for w in looks[0].weights if w.alike]
    still = [path for path in alike if any(w.path == path and w.alike for w in looks[1].weights)]
    if still:
        text = f"the units of {_names(still)} have equal weights and equal gradients at steps {_steps(looks[:2])}"
        yield finding("symmetric_weights", text, 0.95, looks[0].step, layers=tuple(still))


def _rectifiers(stream: Stream) -> Iterator[Finding]:
    """Units that were above 0 for no image of the last looks."""
    shares: dict[str, float] = {}
    for path, kept in stream.fired.items():
        masks = [mask for _, mask in kept]
        if len(masks) == _CONFIRM and all(m.shape == masks[0].shape for m in masks):
            shares[path] = 1 - float(torch.stack(masks).any(0).float().mean())
    if not shares:
        return
    mean, worst = sum(shares.values()) / len(shares), max(shares, key=lambda path: shares[path])
    if mean > _DEAD or shares[worst] > _DEAD_LAYER:
        began = stream.fired[worst][0][0]
        many = sum(share > 0.5 for share in shares.values())
        text = (
            f"{shares[worst]:.0%} of the units of {worst} are 0 for every image of {_CONFIRM} batches "
            f"(mean of all rectifiers {mean:.0%}, more than half in {many} of {len(shares)})"
        )
        yield finding("dying_relu", text, 0.8 + 0.1 * mean, began, layers=(worst,))


def _flat_ends(stream: Stream) -> Iterator[Finding]:
    run: list[Look] = []
    for look in (k for k in stream.looks if k.layers):
        shares = [layer.saturated for layer in look.layers if layer.saturated is not None]
        run = [*run, look] if shares and max(shares) > _FLAT else []
        if len(run) == _CONFIRM:
            worst = max((x for x in look.layers if x.saturated is not None), key=lambda x: x.saturated or 0)
            text = f"{worst.saturated:.0%} of the outputs of {worst.path} ({worst.kind}) lie at the flat ends"
            mean = sum(shares) / len(shares)
            yield finding("saturation", text, 0.7 + 0.2 * mean, run[0].step, layers=(worst.path,))
            return


def _gradients(stream: Stream) -> Iterator[Finding]:
    """The gradient of the first layer's output against the last one's, and the size of the signal on its way."""
    small: list[tuple[int, float]] = []
    for look in stream.looks:
        ratio = look.depth_ratio
        if ratio is None:
            continue
        small = [*small, (look.step, ratio)] if ratio < _VANISHED else []
        if len(small) == _CONFIRM:
            text = f"the gradient of the first layer's weights is {ratio:.1e} times that of the last one's, by size"
            yield finding("vanishing_gradient", text, 0.85, small[0][0])
            break
    for look in [k for k in stream.looks[:1] if k.layers]:  # later, it may be steps that made it loud
        loud = max(look.layers, key=lambda layer: layer.std)
        ratio, given = look.depth_ratio, look.first
        scale = max(given.std, abs(given.mean), 1.0) if given else 1.0
        if not math.isfinite(loud.std) or loud.std > _LOUD * scale or (ratio is not None and ratio > _EXPLODED):
            text = f"at step {look.step} the signal has deviation {loud.std:.1e} in {loud.path}"
            if ratio is not None:
                text += f", and the first layer's gradient is {ratio:.1e} times the last one's"
            yield finding("exploding_gradient", text, 0.88, look.step, layers=(loud.path,))


def _precision(stream: Stream) -> Iterator[Finding]:
    looks = [(k, [w.stuck for w in k.weights if w.stuck is not None]) for k in stream.looks]
    stuck = [(look.step, middle(shares)) for look, shares in looks if shares]
    if len(stuck) >= _CONFIRM and middle([share for _, share in stuck]) > _STUCK:
        share = middle([share for _, share in stuck])
        text = f"{share:.0%} of the half-precision weights with a gradient are left as they were by a step"
        yield finding("precision_underflow", text, 0.8, stuck[0][0])


def _statistics(stream: Stream) -> Iterator[Finding]:
    apart = _validates_worse(stream)  # then, statistics that are slow by their momentum are too slow
    late = [
        k for k in stream.looks if any(x.off is not None and k.step >= (40 if apart else x.settled) for x in k.layers)
    ]
    off = [(k.step, middle([x.off for x in k.layers if x.off is not None]), _ratio(k)) for k in late]
    far = [(step, gap, ratio) for step, gap, ratio in off if gap > _STALE or ratio > _STALE_RATIO]
    if len(off) >= _CONFIRM and len(far) == len(off):
        _, gap, ratio = far[-1]
        text = f"running means are {gap:.1f} deviations from the batch's, variances differ by a factor of {ratio:.1f}"
        yield finding("stale_statistics", text, 0.75, far[0][0])
    few = [k for k in stream.looks if any(layer.off is not None and layer.batch <= 4 for layer in k.layers)]
    if len(few) >= 2 and len(few) == len([k for k in stream.looks if k.layers]):
        size = max(layer.batch for layer in few[0].layers)
        text = f"batch norm sees {size} images at a time"
        yield finding("tiny_norm_batches", text, 0.7 if size <= 2 else 0.5, few[0].step, certain=size <= 2)


def _validates_worse(stream: Stream) -> bool:
    """Whether every validation of a run that learns was far behind its training."""
    train = middle(stream.recent(20))
    losses = [loss for step, loss, _ in stream.vals if step >= 40 and math.isfinite(loss)]
    return len(losses) > 0 and train < 0.7 * stream.start and min(losses) > 2 * train + 0.3


def _ratio(look: Look) -> float:
    return middle([layer.ratio for layer in look.layers if layer.off is not None])


def _names(paths: Iterable[str]) -> str:
    paths = list(paths)
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _steps(looks: list[Look]) -> str:
    return ", ".join(str(k.step) for k in looks[:4]) + (" ..." if len(looks) > 4 else "")
