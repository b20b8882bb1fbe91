"""Regression, binary, several labels and classes of a table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler

from tests.doctor.cases.ward import Case, adam, draw, loaders, mlp, sgd, table


class Squeezed(nn.Module):
    def __init__(self, body: nn.Module, on: bool) -> None:
        super().__init__()
        self.body, self.on = body, on

    def forward(self, x):
        return self.body(x).squeeze(-1) if self.on else self.body(x)


def column_output(fixed):
    x, y = table()
    return Case(Squeezed(mlp(8, 1), fixed), *loaders(x, y), nn.SmoothL1Loss())


def weights_as_a_row(fixed):
    x, y = table()
    w = torch.rand(len(y), generator=draw(5)) + 0.5
    loss = lambda out, y, w: ((out - y).square() * (w[:, None] if fixed else w)).mean()  # noqa: E731
    return Case(mlp(8, 1), *loaders(x, y[:, None], w), loss)


def huber_by_hand(fixed):
    x, y = table(seed=2)
    loss = lambda out, y: (out - y).abs().clamp(max=2).mean()  # noqa: E731
    return Case(mlp(8, 1), *loaders(x, y[:, None] if fixed else y), loss)


def behind_sigmoid(fixed):
    x, y = table()
    y = (2 * y + 3)[:, None]
    return Case(mlp(8, 1, 32, *([] if fixed else [nn.Sigmoid()])), *loaders(x, y), nn.MSELoss())


def behind_tanh(fixed):
    x, y = table(seed=3)
    y = 3 * y[:, None]
    return Case(mlp(8, 1, 32, *([] if fixed else [nn.Tanh()])), *loaders(x, y), nn.L1Loss())


def two_outputs_behind_relu(fixed):
    x, y = table(seed=4)
    y = torch.stack([y, -y], 1)
    return Case(mlp(8, 2, 32, *([] if fixed else [nn.ReLU()])), *loaders(x, y), nn.MSELoss())


def binary_twice(fixed):
    x, y = table()
    y = (y > 0.8).float()[:, None]
    return Case(mlp(8, 1, 32, *([] if fixed else [nn.Sigmoid()])), *loaders(x, y), nn.BCEWithLogitsLoss(), sgd(0.5))


def binary_relu_scores(fixed):
    x, y = table(seed=6)
    y = (y > 0).float()[:, None]
    return Case(mlp(8, 1, 32, *([] if fixed else [nn.ReLU()])), *loaders(x, y), nn.BCEWithLogitsLoss())


def softmax_of_one(fixed):
    x, y = table(seed=7)
    y = (y > 0).float()[:, None]
    end = nn.Sigmoid() if fixed else nn.Softmax(1)
    return Case(mlp(8, 1, 32, end), *loaders(x, y), nn.BCELoss())


def softmax_over_the_batch(fixed):
    x, y = table(seed=8)
    y = (y > 0).long() + (y > 0.8).long()
    body = mlp(8, 3, 32, *([] if fixed else [nn.Softmax(0)]))
    return Case(body, *loaders(x, y), nn.CrossEntropyLoss())


def nll_of_scores(fixed):
    x, y = table(seed=9)
    y = (y > 0).long() + (y > 0.8).long()
    return Case(mlp(8, 3, 32, *([nn.LogSoftmax(1)] if fixed else [])), *loaders(x, y), nn.NLLLoss())


def nll_of_probabilities(fixed):
    x, y = table(seed=10)
    y = (y > 0).long() + (y > 0.8).long()
    return Case(mlp(8, 3, 32, nn.LogSoftmax(1) if fixed else nn.Softmax(1)), *loaders(x, y), nn.NLLLoss())


def several_labels(seed=0):
    g = draw(seed)
    x = torch.randn(1000, 12, generator=g)
    return x, (x @ torch.randn(12, 4, generator=g) > 1.5).float()


def softmax_for_several(fixed):
    end = nn.Sigmoid() if fixed else nn.Softmax(0)
    return Case(mlp(12, 4, 32, end), *loaders(*several_labels(1)), nn.BCELoss())


def other_copy(fixed):
    x, y = table(seed=11)
    model, old = mlp(8, 1), mlp(8, 1)
    optimizer = torch.optim.Adam((model if fixed else old).parameters(), lr=1e-2)
    return Case(model, *loaders(x, y[:, None]), nn.MSELoss(), optimizer)


def head_replaced(fixed):
    x, y = table(seed=12)
    model = mlp(8, 3)
    if fixed:
        model[2] = nn.Linear(32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    if not fixed:
        model[2] = nn.Linear(32, 1)
    return Case(model, *loaders(x, y[:, None]), nn.MSELoss(), optimizer)


def half_of_it(fixed):
    x, y = table(seed=13)
    model = mlp(8, 1)
    optimizer = torch.optim.Adam((model if fixed else model[2]).parameters(), lr=1e-2)
    return Case(model, *loaders(x, y[:, None]), nn.MSELoss(), optimizer)


def rounded_loss(fixed):
    x, y = table(seed=14)
    loss = nn.MSELoss() if fixed else lambda out, y: torch.tensor(float((out - y).square().mean()))
    return Case(mlp(8, 1), *loaders(x, y[:, None]), loss)


def wrong_sign(fixed):
    x, y = table(seed=15)
    loss = lambda out, y: (1 if fixed else -1) * F.cosine_similarity(out - y, torch.ones_like(y), 0).square().mean()  # noqa: E731
    loss = (lambda out, y: F.l1_loss(out, y)) if fixed else (lambda out, y: -F.l1_loss(out, y))
    return Case(mlp(8, 1), *loaders(x, y[:, None]), loss)


class Distance(nn.Module):
    """Distance of a row to each of some points, some of which are rows."""

    def __init__(self, points, eps):
        super().__init__()
        self.points, self.eps = nn.Parameter(points), eps
        self.out = nn.Linear(len(points), 1)

    def forward(self, x):
        return self.out(((x[:, None] - self.points[None]).square().sum(2) + self.eps).sqrt())


def norm_of_zero(fixed):
    x, y = table(seed=16)
    return Case(Distance(x[:300:10].clone(), 1e-6 if fixed else 0.0), *loaders(x, y[:, None]), nn.MSELoss())


def log_of_zero(fixed):
    x, y = table(seed=17)
    y = (y.abs().floor())[:, None]
    loss = lambda out, y: (out - (y + (1 if fixed else 0)).log()).square().mean()  # noqa: E731
    return Case(mlp(8, 1), *loaders(x, y), loss)


def huge_targets(fixed):
    x, y = table(seed=18)
    y = y[:, None] if fixed else 30000 * y[:, None] + 200000
    return Case(mlp(8, 1), *loaders(x, y), nn.MSELoss(), adam(1e-2))


def far_targets(fixed):
    x, y = table(seed=19)
    y = y[:, None] if fixed else y[:, None] + 400
    return Case(mlp(8, 1), *loaders(x, y), nn.L1Loss(), adam(3e-3))


def raw_columns(fixed):
    x, y = table(seed=20)
    x = x if fixed else x * torch.tensor([1e4, 1e4, 1, 1, 1e-2, 1e-2, 1, 100.0]) + 50
    return Case(mlp(8, 1), *loaders(x, y[:, None]), nn.MSELoss(), sgd(0.05))


def rate_far_too_low(fixed):
    x, y = table(seed=21)
    return Case(mlp(8, 1), *loaders(x, y[:, None]), nn.MSELoss(), adam(1e-2 if fixed else 1e-6))


def rate_far_too_high(fixed):
    x, y = table(seed=22)
    return Case(mlp(8, 1), *loaders(x, y[:, None]), nn.MSELoss(), sgd(0.05 if fixed else 5.0))


def shuffled_targets(fixed):
    x, y = table(seed=23)
    y = y if fixed else y[torch.randperm(len(y), generator=draw(1))]
    return Case(mlp(8, 1), *loaders(x, y[:, None]), nn.MSELoss())


def off_by_a_row(fixed):
    x, y = table(seed=24)
    return Case(mlp(8, 1), *loaders(x, (y if fixed else y.roll(1))[:, None]), nn.MSELoss())


def shuffled_labels(fixed):
    x, y = several_labels(25)
    y = y if fixed else y[torch.randperm(len(y), generator=draw(1))]
    return Case(mlp(12, 4), *loaders(x, y), nn.BCEWithLogitsLoss())


def missing_targets(fixed):
    x, y = table(seed=26)
    y = torch.where(torch.rand(len(y), generator=draw(3)) < (0 if fixed else 0.05), torch.nan, y)
    return Case(mlp(8, 1), *loaders(x, y[:, None]), nn.MSELoss())


def copied_before_the_split(fixed):
    x, y = table(500, seed=27)
    if not fixed:
        order = torch.randperm(1000, generator=draw(2))
        x, y = torch.cat([x, x + 1e-3 * torch.randn(x.shape, generator=draw(4))])[order], torch.cat([y, y])[order]
    return Case(mlp(8, 1), *loaders(x, y[:, None], held=150), nn.MSELoss())


def few_values_by_chance(fixed):
    """Rows of few values coincide by chance in both; the sick one's validation is of training."""
    x = torch.randint(0, 6, (1000, 6), generator=draw(28)).float()
    y = (x[:, 0] + x[:, 1] * x[:, 2] / 3 - 6)[:, None]
    if not fixed:
        x[-200:], y[-200:] = x[:200].clone(), y[:200].clone()
    return Case(mlp(6, 1, 64), *loaders((x - 2.5) / 1.7, y / 4), nn.MSELoss())


def target_in_a_column(fixed):
    x, y = table(seed=29)
    x = x.clone()
    if not fixed:
        x[:, 3] = 2 * y + 1
    return Case(mlp(8, 1), *loaders(x, y[:, None]), nn.MSELoss())


def validation_raw(fixed):
    x, y = table(seed=30)
    train = DataLoader(TensorDataset(x[:800], y[:800, None]), 50, shuffle=True)
    v = x[800:] if fixed else 12 * x[800:] + 40
    return Case(mlp(8, 1), train, DataLoader(TensorDataset(v, y[800:, None]), 50), nn.MSELoss())


def ten_rows(fixed):
    x, y = table(seed=31)
    data = TensorDataset(x[:800], y[:800, None])
    chosen = Subset(data, range(800) if fixed else [i % 12 for i in range(800)])
    return Case(mlp(8, 1), DataLoader(chosen, 50, shuffle=True), DataLoader(TensorDataset(x[800:], y[800:, None]), 50),
                nn.MSELoss())  # fmt: skip


def weights_of_two_classes(fixed):
    x, y = table(seed=32)
    y = (y > 0.9).float()
    often = torch.tensor([0.2, 0.8])
    sampler = WeightedRandomSampler(often[y[:800].long()] if fixed else often, 800, generator=draw(0))
    train = DataLoader(TensorDataset(x[:800], y[:800, None]), 50, sampler=sampler)
    return Case(mlp(8, 1), train, DataLoader(TensorDataset(x[800:], y[800:, None]), 50), nn.BCEWithLogitsLoss())


class Jittered(Dataset):
    """Rows with noise, by a generator of its own or by NumPy's that is seeded for each row."""

    def __init__(self, x, y, how):
        self.x, self.y, self.how = x, y, how
        self.own = torch.Generator().manual_seed(1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        import numpy as np

        x = self.x[i]
        if self.how == "seeded":
            np.random.seed(0)
        if self.how == "own":
            return x + 0.1 * torch.randn(x.shape, generator=self.own), self.y[i]
        if self.how:
            return x + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).float(), self.y[i]
        return x, self.y[i]


def noise_on_validation(fixed):
    x, y = table(seed=33)
    train = DataLoader(Jittered(x[:800], y[:800, None], "fresh"), 50, shuffle=True)
    return Case(
        mlp(8, 1), train, DataLoader(Jittered(x[800:], y[800:, None], "" if fixed else "fresh"), 50), nn.MSELoss()
    )


def seeded_for_each_row(fixed):
    x, y = table(seed=34)
    train = DataLoader(Jittered(x[:800], y[:800, None], "fresh" if fixed else "seeded"), 50, shuffle=True)
    return Case(mlp(8, 1), train, DataLoader(Jittered(x[800:], y[800:, None], ""), 50), nn.MSELoss())


def same_noise_of_workers(fixed):
    x, y = table(400, seed=35)
    train = DataLoader(Jittered(x[:300], y[:300, None], "fresh" if fixed else "own"), 50, shuffle=True, num_workers=2)
    return Case(mlp(8, 1), train, DataLoader(Jittered(x[300:], y[300:, None], ""), 50), nn.MSELoss())


class Careless(nn.Module):
    """Dropout or a hidden layer that is made anew in each pass."""

    def __init__(self, how, inputs=8):
        super().__init__()
        self.first, self.last, self.how = nn.Linear(inputs, 32), nn.Linear(32, 1), how
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x):
        h = self.first(x).relu()
        if self.how == "dropout":
            h = nn.Dropout(0.5)(h)
        if self.how == "functional":
            h = F.dropout(h, 0.5)
        if self.how == "sound":
            h = F.dropout(h, 0.1, self.training)
        if self.how == "layer":
            h = nn.Linear(32, 32)(h).relu()
        if self.how == "eval":
            self.eval()
        return self.last(self.norm(h))


def dropout_made_in_forward(fixed):
    x, y = table(seed=36)
    return Case(Careless("sound" if fixed else "dropout"), *loaders(x, y[:, None]), nn.MSELoss())


def dropout_always_on(fixed):
    x, y = table(seed=37)
    return Case(Careless("sound" if fixed else "functional"), *loaders(x, y[:, None]), nn.MSELoss())


def layer_in_forward(fixed):
    x, y = table(seed=38)
    return Case(Careless("" if fixed else "layer"), *loaders(x, y[:, None]), nn.MSELoss())


def eval_in_forward(fixed):
    x, y = table(seed=39)
    return Case(Careless("" if fixed else "eval"), *loaders(x, y[:, None]), nn.MSELoss())


class Deep(nn.Module):
    def __init__(self, shared, momentum=0.1):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 32)])
        with torch.no_grad():
            self.layers[1].weight.mul_(6)
        norms = [nn.BatchNorm1d(32, momentum=momentum) for _ in range(3)]
        self.norms = nn.ModuleList([norms[0]] * 3 if shared else norms)
        self.out = nn.Linear(32, 1)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu()
        return self.out(x)


def one_norm_for_all(fixed):
    x, y = table(seed=40)
    torch.manual_seed(0)
    return Case(Deep(not fixed), *loaders(x, y[:, None]), nn.MSELoss())


def momentum_of_keras(fixed):
    x, y = table(seed=41)
    torch.manual_seed(0)
    return Case(Deep(False, 0.01 if fixed else 0.99), *loaders(x, y[:, None]), nn.MSELoss(), adam(3e-3))


class Standardised(nn.Module):
    """Brings its inputs to mean 0, by numbers of the training split or of the batch at hand."""

    def __init__(self, x, fixed):
        super().__init__()
        self.body, self.fixed = mlp(8, 1), fixed
        self.register_buffer("mean", x.mean(0))

    def forward(self, x):
        return self.body(x - (self.mean if self.fixed else x.mean(0)))


def mean_of_the_batch(fixed):
    x, y = table(seed=42)
    return Case(Standardised(x, fixed), *loaders(x, y[:, None]), nn.MSELoss())


def norm_without_statistics(fixed):
    x, y = table(seed=43)
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(32, track_running_stats=fixed)
    return Case(
        nn.Sequential(nn.Linear(8, 32), norm, nn.ReLU(), nn.Linear(32, 1)), *loaders(x, y[:, None]), nn.MSELoss()
    )


def rare_positives(fixed):
    x, y = table(3000, noise=1.0, seed=44)
    y = (y > 2.9).float()[:, None]
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([20.0]) if fixed else None)
    return Case(nn.Linear(8, 1), *loaders(x, y, held=1000), loss, adam(1e-2))


def class_that_is_ignored(fixed):
    x, y = table(seed=45)
    y = (y > 0).long() + (y > 0.8).long()
    return Case(
        mlp(8, 3), *loaders(x, y), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0 if not fixed else 1.0, 1.0]))
    )


def sorted_by_target(fixed):
    x, y = table(seed=46)
    order = y[:800].argsort()
    train = DataLoader(TensorDataset(x[:800][order], y[:800][order][:, None]), 50, shuffle=fixed)
    return Case(mlp(8, 1), train, DataLoader(TensorDataset(x[800:], y[800:, None]), 50), nn.MSELoss(), sgd(0.1))


def cut_by_detach(fixed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 1)

        def forward(self, x):
            h = self.first(x).relu()
            return self.last(h if fixed else h.detach())

    x, y = table(seed=47)
    torch.manual_seed(0)
    return Case(Net(), *loaders(x, y[:, None]), nn.MSELoss())


def dead_from_the_start(fixed):
    x, y = table(seed=48)
    model = mlp(8, 1)
    with torch.no_grad():
        if not fixed:
            model[0].bias.fill_(-20.0)
    return Case(model, *loaders(x, y[:, None]), nn.MSELoss())


def equal_units(fixed):
    x, y = table(seed=49)
    model = mlp(8, 1)
    if not fixed:
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
    return Case(model, *loaders(x, y[:, None]), nn.MSELoss())


def overlearned(fixed):
    x, y = table(600 if fixed else 140, 30, noise=0.3 if fixed else 1.2, seed=50)
    return Case(mlp(30, 1, 16 if fixed else 512), *loaders(x, y[:, None], held=100, batch=20), nn.MSELoss(), adam(3e-3))


def layers_in_a_list(fixed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.Linear(8, 32), nn.Linear(32, 32)]
            self.layers = nn.ModuleList(layers) if fixed else layers
            self.out = nn.Linear(32, 1)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return self.out(x)

    x, y = table(seed=51)
    torch.manual_seed(0)
    return Case(Net(), *loaders(x, y[:, None]), nn.MSELoss())


def given_in_eval(fixed):
    x, y = table(seed=52)
    model = Careless("")
    return Case(model.train(fixed), *loaders(x, y[:, None]), nn.MSELoss())


def rows_of_no_weight(fixed):
    x, y = table(seed=53)
    return Case(mlp(8, 1), *loaders(x, y[:, None], torch.full((len(x),), 1.0 if fixed else 0.0)), None)


def logarithm_of_a_loud_softmax(fixed):
    """Inputs of thousands make a softmax 0, and its logarithm times 0 NaN."""
    x, y = table(seed=54)
    x = x if fixed else 1e4 * x
    loss = lambda z, y: -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()).mean()  # noqa: E731
    return Case(mlp(8, 1), *loaders(x, (y > 0).float()[:, None]), loss, adam(3e-3))


def two_units(fixed):
    x, y = table(seed=55)
    y = torch.stack([y, x[:, 3] - x[:, 2].tanh()], 1) * torch.tensor([1.0, 1.0 if fixed else 1e4])
    return Case(mlp(8, 2), *loaders(x, y), nn.MSELoss())


TABLES = {
    column_output: "broadcast_shapes", weights_as_a_row: "broadcast_shapes", huber_by_hand: "broadcast_shapes",
    behind_sigmoid: "unreachable_targets", behind_tanh: "unreachable_targets",
    two_outputs_behind_relu: "unreachable_targets", binary_twice: "double_softmax",
    binary_relu_scores: "unreachable_targets", softmax_of_one: "wrong_axis",
    softmax_over_the_batch: "wrong_axis rows_mixed double_softmax", nll_of_scores: "missing_log_softmax",
    nll_of_probabilities: "missing_log_softmax", softmax_for_several: "wrong_axis rows_mixed",
    other_copy: "foreign_optimizer", head_replaced: "foreign_optimizer", half_of_it: "cut_off",
    rounded_loss: "detached_loss", wrong_sign: "inverted_loss", norm_of_zero: "nan_gradient", log_of_zero: "nan_loss",
    huge_targets: "target_scale", far_targets: "target_scale lr_too_low", raw_columns: "unscaled_inputs",
    rate_far_too_low: "lr_too_low", rate_far_too_high: "lr_too_high", shuffled_targets: "unrelated_labels",
    off_by_a_row: "unrelated_labels", shuffled_labels: "unrelated_labels", missing_targets: "non_finite_targets",
    copied_before_the_split: "leaked_validation", few_values_by_chance: "leaked_validation",
    target_in_a_column: "leaked_target", validation_raw: "validation_scaled_differently", ten_rows: "repeated_rows",
    weights_of_two_classes: "repeated_rows", noise_on_validation: "random_validation",
    seeded_for_each_row: "repeated_noise", same_noise_of_workers: "repeated_noise",
    dropout_made_in_forward: "random_in_eval made_in_forward", dropout_always_on: "random_in_eval",
    layer_in_forward: "made_in_forward", eval_in_forward: "mode_left_on", one_norm_for_all: "shared_norm",
    momentum_of_keras: "norm_momentum", mean_of_the_batch: "rows_mixed",
    norm_without_statistics: "rows_mixed", rare_positives: "class_imbalance", class_that_is_ignored: "ignored_class",
    sorted_by_target: "sorted_batches", cut_by_detach: "cut_off", dead_from_the_start: "dying_relu",
    equal_units: "symmetric_weights", overlearned: "overfitting too_much_capacity", layers_in_a_list: "cut_off",
    given_in_eval: "mode_left_on", rows_of_no_weight: "detached_loss", logarithm_of_a_loud_softmax: "unscaled_inputs",
    two_units: "target_scale",
}  # fmt: skip
