"""A small transformer over tokens: causal, for the next token, or not, for a tag of each."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knep.errors import InputError
from knep.nn.blocks import Activation, Norm
from knep.nn.place import Place
from knep.utils.validation import whole

_STD = 0.02


class Attention(nn.Module):
    """(N, L, C) to (N, L, C): each token reads all others, or, causal, those before it and itself."""

    def __init__(self, width: int, heads: int, causal: bool, depth: float) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.residual = Place("residual", width, depth)

    def forward(self, x_NLC: Tensor) -> Tensor:
        parts = self.qkv(x_NLC).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        read_NHLD = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.residual(self.out(read_NHLD.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x)): norms before each branch (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, causal: bool, place: float, step: float, norm: Norm, act: Activation):
        super().__init__()
        self.norm1 = norm(width)
        self.attention = Attention(width, heads, causal, place - step / 2)
        self.norm2 = norm(width)
        parts = {
            "expand": nn.Linear(width, 4 * width),
            "act": act(),
            "dropout": Place("hidden", 4 * width),
            "project": nn.Linear(4 * width, width),
            "residual": Place("residual", width, place),
        }
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Embeddings of tokens and places, blocks, a norm, a linear classifier for each token. See `transformer`."""

    def __init__(
        self,
        vocabulary: int,
        num_classes: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        causal: bool,
        tied: bool,
        norm: Norm,
        act: Activation,
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        steps = [k / depth for k in range(1, depth + 1)]
        self.blocks = nn.Sequential(*(Block(width, heads, causal, at, 1 / depth, norm, act) for at in steps))
        self.norm = norm(width)
        self.dropout = Place("head", width)
        self.classifier = nn.Linear(width, num_classes, bias=False)
        self._start(depth)
        if tied:
            self.classifier.weight = self.tokens.weight

    def _start(self, depth: int) -> None:
        """As GPT-2: N(0, 0.02), biases 0, and less by sqrt(branches) where a branch ends (Radford et al. 2019)."""
        for path, m in self.named_modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                ends = path.endswith(("attention.out", "mlp.project"))
                nn.init.normal_(m.weight, 0, _STD / (2 * depth) ** 0.5 if ends else _STD)
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, x_NL: Tensor) -> Tensor:
        if x_NL.ndim != 2 or x_NL.is_floating_point() or x_NL.shape[1] > self.places.num_embeddings:
            raise InputError(
                f"model=transformer reads whole numbers of tokens (N, L), L up to {self.places.num_embeddings}, and "
                f"got {str(x_NL.dtype).removeprefix('torch.')} {tuple(x_NL.shape)}: write task=tokens or task=tagging, "
                "with data of tokens"
            )
        x = self.tokens(x_NL) + self.places(torch.arange(x_NL.shape[1], device=x_NL.device))
        return self.classifier(self.dropout(self.norm(self.blocks(x))))


def transformer(
    in_channels: int,
    num_classes: int,
    image_size: int,
    *,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    causal: bool = True,
    tied: bool = False,
    norm: Norm = nn.LayerNorm,
    activation: Activation = nn.GELU,
) -> Transformer:
    """Tokens int64 (N, L) of in_channels kinds to scores (N, L, num_classes), L up to image_size (Vaswani et al. 2017).

    Norms before each branch, learned places, and the weights of GPT-2's first step (Radford et al. 2019).
    Places: residual at the end of each branch, hidden behind each activation, head before the classifier. Its norm
    layers stand on the last axis, where the slot `norm` exchanges them.

    width: numbers a token has, a multiple of heads; depth: blocks; heads: of each attention; causal: a token reads what
    stands before it alone, as the next one's prediction needs; tied: the classifier's weights are the embeddings'
    (Press and Wolf 2017). norm: of the last axis.
    Raises InputError for sizes that are not positive whole numbers, a width that heads do not divide, or tied with
    other classes than tokens.
    """
    for name, value in (("width", width), ("depth", depth), ("heads", heads)):
        whole(name, value, 1)
    if width % heads:
        raise InputError(f"width={width} must be a multiple of heads={heads}: write width={-(-width // heads) * heads}")
    for name, value in (("causal", causal), ("tied", tied)):
        if not isinstance(value, bool):
            raise InputError(f"{name} must be true or false, got {value}")
    if tied and num_classes != in_channels:
        raise InputError(
            f"tied needs a class for each of {in_channels} tokens, and there are {num_classes}: write false"
        )
    return Transformer(in_channels, num_classes, image_size, width, depth, heads, causal, tied, norm, activation)
