"""Networks that are none of knep's, as users write them: `model=import model.path=scripts.clinic.cases.nets:NAME`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knep.models.user_model import accepted


def mlp(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    widths: tuple[int, ...] = (96, 64),
    act: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
    end: Callable[[], nn.Module] | None = None,
    bias: float | None = None,
) -> nn.Sequential:
    """A plain nn.Sequential; bias: of every hidden unit; end: a module behind the scores."""
    layers: list[nn.Module] = [nn.Flatten()]
    before = in_channels * image_size**2
    for width in widths:
        linear = nn.Linear(before, width)
        if bias is not None:
            nn.init.constant_(linear.bias, bias)
        layers += [linear, *([norm(width)] if norm else []), act()]
        before = width
    layers.append(nn.Linear(before, num_classes))
    return nn.Sequential(*layers, *([end()] if end else []))


def vgg(
    num_classes: int,
    in_channels: int,
    *,
    widths: tuple[int, ...] = (12, 24),
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    act: Callable[[], nn.Module] = nn.ReLU,
    end: Callable[[], nn.Module] | None = None,
    bias: float | None = None,
) -> nn.Sequential:
    """Pairs of convolutions with pooling between them, and a linear head on the mean of the maps."""
    layers: list[nn.Module] = []
    before = in_channels
    for i, width in enumerate(widths):
        layers += [nn.MaxPool2d(2)] if i else []
        for _ in range(2):
            conv = nn.Conv2d(before, width, 3, padding=1)
            if bias is not None:
                nn.init.constant_(conv.bias, bias)  # pyright: ignore[reportArgumentType]
            layers += [conv, *([norm(width)] if norm else []), act()]
            before = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)]
    return nn.Sequential(*layers, *head, *([end()] if end else []))


def lenet(num_classes: int, in_channels: int, image_size: int, *, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    """Two convolutions with mean pooling and two linear layers, tanh throughout (LeCun et al. 1998)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), act(), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), act(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(16 * (image_size // 4) ** 2, 48), act(), nn.Linear(48, num_classes),
    )  # fmt: skip


def pooled(num_classes: int, in_channels: int, *, lost: bool = False) -> nn.Module:
    """Convolutions and the mean of the maps; lost: of normalised maps, whose mean is the same for every image."""
    end: nn.Module = nn.InstanceNorm2d(24) if lost else nn.BatchNorm2d(24)
    return nn.Sequential(
        nn.Conv2d(in_channels, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), end,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes),
    )  # fmt: skip


def waist(
    num_classes: int, in_channels: int, image_size: int, *, width: int = 16, gate: Callable[[], nn.Module] | None = None
) -> nn.Module:
    """A normalised waist between two layers; of one unit, or with a softmax along one, it says nothing."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_channels * image_size**2, 64), nn.ReLU(), nn.Linear(64, width),
        gate() if gate else nn.LayerNorm(width), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, num_classes),
    )  # fmt: skip


class Functional(nn.Module):
    """Activations as functions in forward; cut: where the graph is cut, none, detach or no_grad."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int, cut: str = "none", end: str = "none"):
        super().__init__()
        self.cut, self.end = cut, end
        self.conv1 = nn.Conv2d(in_channels, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(16 * ((image_size + 1) // 2) ** 2, 40)
        self.fc2 = nn.Linear(40, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut != "no_grad"):
            x = self.features(x)
        x = self.fc1(x.detach() if self.cut == "detach" else x)
        x = self.fc2(F.relu(x.detach() if self.cut == "late_detach" else x))
        return F.softmax(x, dim=1) if self.end == "softmax" else torch.sigmoid(x) if self.end == "sigmoid" else x


class ResidualMlp(nn.Module):
    """Pre-norm residual blocks on a flat input, with layer norm and GELU."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int, blocks: int = 4, width: int = 64):
        super().__init__()
        self.embed = nn.Linear(in_channels * image_size**2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Vit(nn.Module):
    """Patches of 2 pixels as tokens, two encoder layers, mean over tokens (Dosovitskiy et al. 2021 in small)."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int, width: int = 32, layers: int = 2):
        super().__init__()
        self.patch = nn.Conv2d(in_channels, width, 2, stride=2)
        self.place = nn.Parameter(0.02 * torch.randn(1, (image_size // 2) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.encoder(tokens).mean(1))


class EvalNorm(nn.BatchNorm2d):
    """Batch norm that stays in evaluation mode, as after a model.eval() that nobody takes back."""

    def train(self, mode: bool = True) -> EvalNorm:
        return super().train(False)


def _named(name: str, build: Callable[..., nn.Module], **fixed: Any) -> Callable[[int, int, int], nn.Module]:
    """A function of its own: a config cannot name a partial."""

    def made(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
        given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
        return build(**accepted(build, given), **fixed)

    made.__name__ = made.__qualname__ = name
    return made


_SOFTMAX = partial(nn.Softmax, dim=1)
_DEEP = (48,) * 8
deep_relu = _named("deep_relu", mlp, widths=_DEEP)
deep_tanh = _named("deep_tanh", mlp, widths=_DEEP, act=nn.Tanh)
deep_sigmoid = _named("deep_sigmoid", mlp, widths=_DEEP, act=nn.Sigmoid)
deep_norm = _named("deep_norm", mlp, widths=_DEEP, norm=nn.BatchNorm1d)
mlp_norm = _named("mlp_norm", mlp, norm=nn.LayerNorm)
mlp_tanh = _named("mlp_tanh", mlp, act=nn.Tanh)
mlp_sigmoid = _named("mlp_sigmoid", mlp, act=nn.Sigmoid)
mlp_gelu = _named("mlp_gelu", mlp, act=nn.GELU)
mlp_softmax = _named("mlp_softmax", mlp, end=_SOFTMAX)
mlp_squashed = _named("mlp_squashed", mlp, end=nn.Sigmoid)
mlp_dead = _named("mlp_dead", mlp, bias=-4.0)
mlp_dying = _named("mlp_dying", mlp, bias=-2.0)
mlp_tiny = _named("mlp_tiny", mlp, widths=(2,))
mlp_waist = _named("mlp_waist", mlp, widths=(64, 1, 64))
mlp_small = _named("mlp_small", mlp, widths=(24,))
mlp_huge = _named("mlp_huge", mlp, widths=(1024, 1024))
vgg_plain = _named("vgg_plain", vgg, norm=None)
vgg_softmax = _named("vgg_softmax", vgg, end=_SOFTMAX)
vgg_dead = _named("vgg_dead", vgg, norm=None, bias=-3.0)
vgg_tiny = _named("vgg_tiny", vgg, widths=(1, 2))
vgg_sigmoid = _named("vgg_sigmoid", vgg, widths=(12, 24), norm=None, act=nn.Sigmoid)
vgg_slow_norm = _named("vgg_slow_norm", vgg, norm=partial(nn.BatchNorm2d, momentum=1e-4))
vgg_eval_norm = _named("vgg_eval_norm", vgg, norm=EvalNorm)
pooled_lost = _named("pooled_lost", pooled, lost=True)
waist_lost = _named("waist_lost", waist, width=1)
waist_gated = _named("waist_gated", waist, width=1, gate=_SOFTMAX)
lenet_sigmoid = _named("lenet_sigmoid", lenet, act=nn.Sigmoid)
lenet_relu = _named("lenet_relu", lenet, act=nn.ReLU)
functional_softmax = _named("functional_softmax", Functional, end="softmax")
functional_sigmoid = _named("functional_sigmoid", Functional, end="sigmoid")
functional_detach = _named("functional_detach", Functional, cut="detach")
functional_no_grad = _named("functional_no_grad", Functional, cut="no_grad")
functional_late = _named("functional_late", Functional, cut="late_detach")
