"""Small foreign nets, as their authors write them: what a recipe meets outside its own models."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal self-attention of one's own, with a mask in a buffer; its output begins at zero where asked."""

    def __init__(self, width, heads, length, zero):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(length, length)).bool())
        if zero:
            nn.init.zeros_(self.c_proj.weight)

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = (t.view(n, length, self.heads, -1).transpose(1, 2) for t in self.c_attn(x).split(width, dim=2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(~self.mask[:length, :length], float("-inf"))
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    def __init__(self, width, heads, length, zero):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads, length, zero)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A causal language model with tied embeddings; without targets it gives the last position's scores alone."""

    def __init__(self, words=40, width=16, length=12, zero=False, last=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, 2, length, zero) for _ in range(2))
        self.ln_f, self.lm_head, self.last = nn.LayerNorm(width), nn.Linear(width, words, bias=False), last
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]] if self.last else x), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Encoder(nn.Module):
    """A bidirectional encoder of (L, N) tokens, as torch has it by default: the batch is the second axis."""

    def __init__(self, words=40, width=16):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 2, 32, 0.1), 2, enable_nested_tensor=False
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, tokens_LN):
        return self.head(self.norm(self.layers(self.words(tokens_LN))).mean(0))


class CausalConv(nn.Module):
    """A causal convolutional net of signals (N, C, L)."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.a, self.n, self.b = nn.Conv1d(2, 8, 3), norm(8), nn.Conv1d(8, 4, 3)

    def forward(self, x_NCL):
        return self.b(F.pad(self.n(self.a(F.pad(x_NCL, (2, 0)))).relu(), (2, 0)))


class UNet(nn.Module):
    """Two levels, group norms, and a last convolution that begins at zero, as in diffusion; it reads a time, too."""

    def __init__(self, zero=True):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.down, self.n1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.mid, self.n2 = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(16, 3, 3, padding=1)
        if zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x, t):
        h = F.silu(self.n1(self.down(x)) + self.time(t[:, None])[:, :, None, None])
        low = F.silu(self.n2(self.mid(h)))
        return self.out(torch.cat([self.up(low), h], 1))


class Recurrent(nn.Module):
    """Words, a GRU with a norm of its states, and a classifier of the last one."""

    def __init__(self, words=40, width=16):
        super().__init__()
        self.words, self.gru = nn.Embedding(words, width), nn.GRU(width, width, 2, batch_first=True, dropout=0.1)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, tokens):
        states, _ = self.gru(self.words(tokens))
        return self.head(self.norm(states)[:, -1])


class GraphConv(nn.Module):
    """A graph layer with a plain weight, and neighbours by an index (2, edges)."""

    def __init__(self, width, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width, out)), nn.Parameter(torch.zeros(out))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x, edge_index):
        x = x @ self.weight
        return torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]]) + x + self.bias


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = GraphConv(6, 16), nn.BatchNorm1d(16), GraphConv(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x, edge_index):
        x = F.relu(self.norm(self.conv1(x, edge_index)))
        return self.head(F.relu(self.conv2(x, edge_index)))


class Detector(nn.Module):
    """Takes a list of images, as torchvision's do; in training it wants targets."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.boxes = nn.Conv2d(8, 4, 1)

    def forward(self, images, targets=None):
        if self.training and targets is None:
            raise ValueError("in training mode, targets should be passed")
        return [{"boxes": self.boxes(self.body(image[None]).relu()).flatten(2)[0].T} for image in images]


class LoRALinear(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Linear(base.in_features, rank, bias=False)
        self.B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x):
        return self.base(x) + self.B(self.A(x))
