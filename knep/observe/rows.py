"""What one forward and backward pass shows, as plain data: a row per layer called, a row per parameter, the scores."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Ends = Literal["scores", "probabilities", "log-probabilities", "unit interval", "constant"]


@dataclass
class Layer:
    """One call of a function that makes or bends the signal.

    path: of the module in whose forward it was called; kind: that module's class, or the function's name where the
    module does more than this; function: linear, conv2d, relu, batch_norm, ...; units: channels or features;
    features: numbers per image that come out, width: that go in; fan_in: inputs that one output sums over, 0 where
    there are no weights; scale: standard deviation of the weights x sqrt(fan_in), which a linear layer multiplies a
    signal by.
    mean, std, size: of the output's numbers, size being their root mean square; spread: their standard deviation
    between images, root mean square over features, in parts of size; cosine: mean cosine similarity of the outputs of
    two images; finite: share of finite numbers.
    dead: share of units that are zero for every image and place, None where the function is no ReLU;
    saturated: share of numbers where the slope is below 5 % of the largest, None where the function has no flat end.
    gradient: standard deviation of the loss's gradient by the output; flow: root mean square over images of the norm of
    the gradient of an image's own loss; None where none arrives.
    """

    path: str
    kind: str
    function: str
    units: int = 0
    features: int = 0
    width: int = 0
    fan_in: int = 0
    scale: float | None = None
    mean: float = 0.0
    std: float = 0.0
    size: float = 0.0
    spread: float = 0.0
    cosine: float = 0.0
    finite: float = 1.0
    dead: float | None = None
    saturated: float | None = None
    gradient: float | None = None
    flow: float | None = None

    @property
    def signal(self) -> float:
        """Standard deviation between images, root mean square over features."""
        return self.spread * self.size

    @property
    def weighted(self) -> bool:
        """Whether it multiplies by weights."""
        return self.fan_in > 0


@dataclass
class Weight:
    """One parameter in a pass, before any step. gradient: norm, None where the backward pass does not reach it; zeros:
    share of the gradient that is exactly zero; trainable: requires_grad."""

    name: str
    ndim: int
    numel: int
    norm: float
    gradient: float | None
    zeros: float
    trainable: bool

    @property
    def ratio(self) -> float | None:
        """Gradient by weight, of norms; None where there is no gradient or no weight."""
        return self.gradient / self.norm if self.gradient is not None and self.norm > 0 else None


@dataclass
class Scores:
    """The model's output (N, K) before training.

    loss: of the patient's criterion; chance: ln K, 0 for other outputs than scores of classes; ends: what rows are;
    last: the function that made them, "" where it is not known; flat: whether as rows (N, K), not as maps of one pixel;
    axis: along which probabilities sum to 1.
    """

    mean: float
    std: float
    loss: float
    chance: float
    ends: Ends = "scores"
    last: str = ""
    flat: bool = False
    axis: int = 1


@dataclass
class Signals:
    """Of one pass over `images` training images in training mode without dropout.

    layers: in the order of their calls; input_mean, input_std: of the scaled images; reached: whether the loss depends
    on any parameter by the graph; called: paths of the modules that ran; standardized: whether each image batch was
    brought to mean 0 and deviation 1 first.
    """

    layers: list[Layer]
    weights: list[Weight]
    scores: Scores
    images: int
    input_mean: float
    input_std: float
    reached: bool = True
    called: set[str] = field(default_factory=set)
    standardized: bool = False

    @property
    def linear(self) -> list[Layer]:
        """The layers with weights."""
        return [layer for layer in self.layers if layer.weighted]

    @property
    def finite(self) -> bool:
        return all(layer.finite == 1 for layer in self.layers) and math.isfinite(self.scores.loss)

    @property
    def gradient_norm(self) -> float:
        """Of all parameters."""
        return math.sqrt(sum(w.gradient**2 for w in self.weights if w.gradient is not None))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None."""
        row = asdict(self) | {"called": sorted(self.called)}
        row["layers"] = [_finite(asdict(layer) | {"signal": layer.signal}) for layer in self.layers]
        row["weights"] = [_finite(asdict(w) | {"ratio": w.ratio}) for w in self.weights]
        row["scores"] = _finite(asdict(self.scores))
        return _finite(row)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
