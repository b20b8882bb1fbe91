"""Tokens, tags and time series."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.doctor.cases.ward import Case, adam, chain, draw, loaders, waves


class Attention(nn.Module):
    """One head by hand; how: what is wrong with it."""

    def __init__(self, width, how="", causal=False):
        super().__init__()
        self.qkv, self.out, self.how, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), how, causal

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "batch":
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        a = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if self.causal:
            a = a.masked_fill(torch.ones(a.shape[-2:]).triu(1).bool(), -torch.inf)
        if mask is not None:
            a = a.masked_fill(mask[:, None], -torch.inf)
        h = a.softmax(-2 if self.how == "axis" else -1) @ v
        return self.out(h.transpose(0, 1) if self.how == "batch" else h)


class Writer(nn.Module):
    """Next token by attention, a recurrence or a convolution."""

    def __init__(self, kind="attention", how="", causal=True, tokens=12, width=32, last="places"):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.place, self.kind = (
            nn.Embedding(tokens, width),
            nn.Parameter(0.1 * torch.randn(64, width)),
            kind,
        )
        self.inner = {
            "attention": lambda: Attention(width, how, causal),
            "gru": lambda: nn.GRU(width, width, batch_first=how != "steps", bidirectional=how == "both"),
            "conv": lambda: nn.Conv1d(width, width, 3, padding=0 if causal else 1),
        }[kind]()
        self.out, self.last = nn.Linear(width * (2 if how == "both" else 1), tokens), last

    def forward(self, x):
        h = self.table(x) + self.place[: x.shape[1]]
        if self.kind == "gru":
            h = self.inner(h)[0]
        elif self.kind == "conv":
            h = h.transpose(1, 2)
            h = self.inner(F.pad(h, (2, 0)) if self.inner.padding == (0,) else h).transpose(1, 2).relu()
        else:
            h = h + self.inner(h)
        z = self.out(h)
        return z.transpose(1, 2) if self.last == "classes" else z


def of_places(z, y):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1))


def written(seed, shift=1):
    s = chain(seed=seed)
    return (s[:, :-1], s[:, 1:]) if shift else (s[:, :-1], s[:, :-1])


def no_causal_mask(fixed):
    return Case(Writer(causal=fixed), *loaders(*written(1), held=100), of_places)


def centred_convolution(fixed):
    return Case(Writer("conv", causal=fixed), *loaders(*written(2), held=100), of_places)


def recurrence_backwards(fixed):
    return Case(Writer("gru", "" if fixed else "both"), *loaders(*written(3), held=100), of_places)


def target_not_shifted(fixed):
    return Case(Writer(), *loaders(*written(4, int(fixed)), held=100), of_places)


def attention_over_the_batch(fixed):
    return Case(Writer(how="" if fixed else "batch"), *loaders(*written(5), held=100), of_places)


def softmax_over_queries(fixed):
    return Case(Writer(how="" if fixed else "axis", causal=True), *loaders(*written(6), held=100), of_places)


def steps_first(fixed):
    return Case(Writer("gru", "" if fixed else "steps"), *loaders(*written(7), held=100), of_places)


def classes_in_the_middle(fixed):
    loss = lambda z, y: F.cross_entropy(z, y) if fixed else F.cross_entropy(z.reshape(-1, 12), y.reshape(-1))  # noqa: E731
    return Case(Writer(last="classes"), *loaders(*written(8), held=100), loss)


def token_zero_ignored(fixed):
    loss = nn.CrossEntropyLoss() if fixed else nn.CrossEntropyLoss(ignore_index=0)
    return Case(Writer(last="classes"), *loaders(*written(9), held=100), loss)


def filled_up(seed):
    """Sequences of tokens from 1 on that 0 fills up."""
    s = chain(seed=seed, tokens=11) + 1
    length = torch.randint(4, 17, (len(s), 1), generator=draw(seed))
    return torch.where(torch.arange(17)[None] < length, s, 0)


def padding_in_the_loss(fixed):
    s = filled_up(10)
    loss = nn.CrossEntropyLoss(ignore_index=0 if fixed else -100)
    return Case(Writer(last="classes"), *loaders(s[:, :-1], s[:, 1:], held=100), loss)


class Reader(nn.Module):
    """A class for a sequence of tokens, by the last state of a recurrence or by attention with a mask."""

    def __init__(self, how, classes=2):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.gru, self.out, self.how = (
            nn.Embedding(12, 16),
            nn.GRU(16, 32, batch_first=True),
            nn.Linear(32, classes),
            how,
        )

    def forward(self, x):
        h, last = self.gru(self.table(x))
        if self.how == "length":
            return self.out(h[torch.arange(len(x)), ((x != 0).sum(1) - 1).clamp(min=0)])
        return self.out(last[0])


def state_behind_the_padding(fixed):
    s = filled_up(11)
    y = (s[:, 0] > 6).long()
    return Case(Reader("length" if fixed else ""), *loaders(s, y, held=100), nn.CrossEntropyLoss())


class Masked(nn.Module):
    """Attention over tokens that are not 0; rows of 0 alone have nothing left."""

    def __init__(self, fixed):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner, self.out, self.fixed = nn.Embedding(12, 16), Attention(16), nn.Linear(16, 1), fixed

    def forward(self, x):
        mask = x == 0
        if self.fixed:
            mask = mask & ~mask.all(1, keepdim=True)
        h = self.inner(self.table(x), mask)
        return self.out((h * (x != 0)[..., None]).sum(1) / (x != 0).sum(1, keepdim=True).clamp(min=1))


def empty_rows_all_masked(fixed):
    s = filled_up(12)
    y = (s == 3).sum(1, keepdim=True).float()
    s[::40] = 0
    return Case(Masked(fixed), *loaders(s, y, held=100), nn.MSELoss())


class Tagger(nn.Module):
    def __init__(self, how=""):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.gru, self.out, self.how = (
            nn.Embedding(12, 24),
            nn.GRU(24, 24, batch_first=True),
            nn.Linear(24, 4),
            how,
        )

    def forward(self, tokens):
        h = self.gru(self.table(tokens))[0]
        if self.how == "view":
            h = h.reshape(h.shape[1], h.shape[0], -1).transpose(0, 1)
        return self.out(h)


def tags(seed):
    s = chain(seed=seed)
    return s[:, 1:], (s[:, 1:] + s[:, :-1]) % 4


def by_name(*parts, held=100):
    train, val = loaders(*parts, held=held)

    def named(loader):
        return [{"tokens": x, "labels": y} for x, y in loader]

    return named(train), named(val)


def view_for_transpose(fixed):
    return Case(Tagger("" if fixed else "view"), *by_name(*tags(13)), of_places)


def tags_of_others(fixed):
    x, y = tags(14)
    y = y if fixed else y[torch.randperm(len(y), generator=draw(3))]
    return Case(Tagger(), *by_name(x, y), of_places, adam(1e-2), {"epochs": 30})


def tags_of_padding(fixed):
    """What fills rows up is tagged as the first class."""
    s = filled_up(17)
    y = (s * 3 + s.roll(1, 1)) % 4
    y = y.masked_fill(s == 0, -100 if fixed else 0)
    return Case(Tagger(), *loaders(s, y, held=100), lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))


def tagger_that_crawls(fixed):
    return Case(Tagger(), *by_name(*tags(15)), of_places, adam(1e-2 if fixed else 1e-5), {"epochs": 30})


def series(seed, length=2400):
    g = draw(seed)
    t = torch.arange(length)
    return torch.sin(t / 7) + 0.5 * torch.sin(t / 3.1) + 0.1 * torch.randn(length, generator=g)


def windows(s, width=20):
    w = s.unfold(0, width + 1, 1)
    return w[:, :-1], w[:, -1:]


class Forecast(nn.Module):
    def __init__(self, outputs=1, how=""):
        super().__init__()
        torch.manual_seed(0)
        self.gru, self.out, self.how = nn.GRU(1, 24, batch_first=how != "steps"), nn.Linear(24, outputs), how

    def forward(self, x):
        return self.out(self.gru(x[..., None])[0][:, -1])


def windows_drawn_at_random(fixed):
    x, y = windows(series(16))
    if fixed:
        return Case(Forecast(), *loaders(x, y, held=400), nn.MSELoss())
    order = torch.randperm(len(x), generator=draw(1))
    return Case(Forecast(), *loaders(x[order], y[order], held=400), nn.MSELoss())


def batch_for_steps(fixed):
    x, y = windows(series(17))
    return Case(Forecast(how="" if fixed else "steps"), *loaders(x, y, held=400), nn.MSELoss())


def column_against_row(fixed):
    x, y = windows(series(18))
    return Case(Forecast(), *loaders(x, y if fixed else y[:, 0], held=400), lambda z, y: (z - y).abs().mean())


def series_behind_relu(fixed):
    x, y = windows(series(19))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1), *([] if fixed else [nn.ReLU()]))
    return Case(model, *loaders(x, y, held=400), nn.MSELoss())


class Forward(nn.Module):
    """The next value at each place."""

    def __init__(self, causal):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.causal = nn.Conv1d(1, 24, 5, padding=0 if causal else 2), nn.Conv1d(24, 1, 1), causal

    def forward(self, x):
        return self.b(self.a(F.pad(x[:, None], (4, 0) if self.causal else (0, 0))).relu())[:, 0]


def series_that_sees_ahead(fixed):
    w = series(20, 6000).unfold(0, 25, 24)
    return Case(Forward(fixed), *loaders(w[:, :-1], w[:, 1:], held=50, batch=20), nn.MSELoss())


def series_in_thousands(fixed):
    x, y = windows((1 if fixed else 3000) * series(21) + (0 if fixed else 20000))
    return Case(
        nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1)),
        *loaders(x, y, held=400),
        nn.MSELoss(),
        adam(3e-3),
    )


class Frequency(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv1d(1, 16, 7, padding=3), nn.ReLU(), nn.Conv1d(16, 16, 5, padding=2), nn.ReLU())
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.body(x[:, None]).mean(2))


def waves_of_others(fixed):
    x, y = waves(seed=22)
    y = y if fixed else y[torch.randperm(len(y), generator=draw(3))]
    return Case(Frequency(), *loaders(x, y), nn.CrossEntropyLoss(), adam(1e-2))


def waves_with_softmax(fixed):
    x, y = waves(seed=23)
    model = Frequency()
    return Case(
        model if fixed else nn.Sequential(model, nn.Softmax(1)), *loaders(x, y), nn.CrossEntropyLoss(), adam(1e-2)
    )


def short_rows_of_tokens(fixed):
    """Few different rows, which coincide by chance; the sick one's labels are drawn."""
    g = draw(24)
    x = torch.randint(0, 5, (900, 4), generator=g)
    y = ((x[:, 0] + x[:, 1]) % 3) if fixed else torch.randint(0, 3, (900,), generator=g)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))
    return Case(model, *loaders(x, y), nn.CrossEntropyLoss(), adam(1e-2))


SEQUENCES = {
    no_causal_mask: "sees_the_future", centred_convolution: "sees_the_future", recurrence_backwards: "sees_the_future",
    target_not_shifted: "unshifted_targets", attention_over_the_batch: "rows_mixed",
    softmax_over_queries: "wrong_axis sees_the_future", steps_first: "rows_mixed",
    classes_in_the_middle: "scrambled_view",
    token_zero_ignored: "ignored_class",
    padding_in_the_loss: "padding_counted", tags_of_padding: "padding_counted",
    state_behind_the_padding: "padding_counted", empty_rows_all_masked: "nan_loss nan_gradient",
    view_for_transpose: "rows_mixed", tags_of_others: "unrelated_labels", tagger_that_crawls: "lr_too_low",
    windows_drawn_at_random: "leaked_validation", batch_for_steps: "rows_mixed", column_against_row: "broadcast_shapes",
    series_behind_relu: "unreachable_targets", series_that_sees_ahead: "sees_the_future",
    series_in_thousands: "target_scale unscaled_inputs", waves_of_others: "unrelated_labels",
    waves_with_softmax: "double_softmax", short_rows_of_tokens: "unrelated_labels",
}  # fmt: skip
