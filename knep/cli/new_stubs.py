"""What `knep new` writes for each slot: a stub with the arguments of its contract, and a test that waits for a formula.

A stub runs and does what the slot's `none` does. Its test calls NAME_by_hand, which fails and says so: what stands
behind FILL IN is for the author, and for nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stub:
    """arguments: of the function, the first one before the star; base: of the class, for a slot of objects.

    body: what is in it; values: lines of the YAML; rows: the test; in both, names in braces are put in.
    """

    what: str
    body: str
    rows: str
    arguments: tuple[str, ...] = ()
    returns: str = ""
    base: str = ""
    values: tuple[str, ...] = ()
    partial: bool = True

    @property
    def calls_by_name(self) -> bool:
        """Whether the test takes the trick from its module by its name, and so imports it."""
        return "{made}(" in self.rows or "={made}" in self.rows

    @property
    def is_class(self) -> bool:
        return bool(self.base)

    def code(self, made: str, width: int) -> list[str]:
        """The lines of the function or class."""
        head = [f"class {made}({self.base}):"] if self.base else self._signature(made, width)
        docstring = f'"""FILL IN: what it does to {self.what}, the equation, and the source: authors and year.'
        docstring += '\n\nFILL IN: each value with its range, which `check` holds.\n"""'
        gap = [""] if self.base else []
        return [*head, *_indented(docstring), *gap, *_indented(self.body.format(made=made))]

    def _signature(self, made: str, width: int) -> list[str]:
        first, *others = self.arguments
        stars = [first, "*", *others] if others else [first]
        one = f"def {made}({', '.join(stars)}) -> {self.returns}:"
        many = [f"def {made}(", *(f"    {argument}," for argument in stars), f") -> {self.returns}:"]
        return [one] if len(one) <= width else many

    def option(self, target: str) -> str:
        """The text of the YAML."""
        head = ["# FILL IN: when to use it, and its source.", f"_target_: {target}"]
        return "\n".join([*head, *(["_partial_: true"] if self.partial else []), *self.values]) + "\n"

    def test(self, words: Mapping[str, str], slot: str) -> str:
        """The formula to fill in, and the test that compares the trick with it."""
        fail = f'pytest.fail("fill in {words["name"]}_by_hand, in tests/recipes/test_{slot}.py")'
        return self.rows.format(**words, fail=fail).strip("\n")


def _indented(text: str) -> list[str]:
    return [f"    {line}" if line else "" for line in text.split("\n")]


_MODEL = ("model: nn.Module", "sample: Tensor | None = None")

STUBS = {
    "scaling": Stub(
        what="raw pixels",
        arguments=("batches: Iterable[Tensor] = ()",),
        returns="nn.Module",
        body="return _Affine(torch.zeros(1), torch.ones(1))  # FILL IN: shift and scale",
        rows='''
def {name}_by_hand(x):
    """FILL IN: the raw pixels x (N, C, H, W) as they are after the scaling, in float64."""
    {fail}


def {name}_is_its_formula():
    x = torch.randint(0, 256, (300, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    want = {name}_by_hand(x.double())
    torch.testing.assert_close({made}([x])(x).double(), want, rtol=1e-5, atol=1e-5)
''',
    ),
    "augment": Stub(
        what="training batches",
        base="_Training",
        partial=False,
        body="""
def change(self, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    return x, y  # FILL IN
""".strip("\n"),
        rows='''
def {name}_by_hand(x, y):
    """FILL IN: images and labels that the batch becomes, with loops or the same draws, not with the code under test."""
    {fail}


def {name}_is_its_formula():
    x, y = batch(3)
    torch.manual_seed(5)
    out, labels = {made}()(x, y, CLASSES)
    torch.manual_seed(5)
    want, shares = {name}_by_hand(x, y)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(labels, shares)
''',
    ),
    "norm": Stub(
        what="the signal",
        arguments=(*_MODEL, 'position: str = "before_activation"', "insert: bool = False"),
        returns="list[Change]",
        values=("position: before_activation  # or after_activation", "insert: false  # true: where there is none yet"),
        body="""
refuse_empty_zero_gains(model, "{made}")
return []  # FILL IN: normalise(model, Kind(...), sample, position, insert), as `rms` does
""".strip("\n"),
        rows='''
def {name}_by_hand(x):
    """FILL IN: the signal x, (N, C, H, W) or (N, C), as it is after the norm, in float64."""
    {fail}


def {name}_is_its_formula():
    for x in signals():
        want = {name}_by_hand(x)
        torch.testing.assert_close(filled(norm.{name}, x)(x), want)
''',
    ),
    "activation": Stub(
        what="a signal",
        arguments=_MODEL,
        returns="list[Change]",
        body="return []  # FILL IN: _exchange(model, sample, ...), as `silu` does",
        rows='''
def {name}_by_hand(x):
    """FILL IN: the activation of x, in float64, from exp, log and the like."""
    {fail}


def {name}_is_its_formula():
    want = {name}_by_hand(X)
    equals(activation.{name}, lambda x: want)
''',
    ),
    "dropout": Stub(
        what="a signal in training",
        arguments=(*_MODEL, "p: float = 0.1"),
        returns="list[Change]",
        values=("p: 0.1  # share that is dropped, in [0, 1)",),
        body="""
check("p", p, "[0, 1)")
return []  # FILL IN: one of _drop_values and _drop_maps
""".strip("\n"),
        rows='''
def {name}_by_hand(x, y):
    """FILL IN: asserts what must hold of y, which x becomes: the share that is dropped, and that the mean stays."""
    {fail}


def {name}_is_its_formula():
    model, x = nn.Sequential(Place("head", 16, depth=1.0)), torch.ones(5000, 16)
    dropout.{name}(model, p=P)
    {name}_by_hand(x, model(x))
    is_identity_in_eval(model, x)
''',
    ),
    "init": Stub(
        what="the weights",
        arguments=_MODEL,
        returns="list[Change]",
        body='return []  # FILL IN: _normal(model, "{made}", lambda fan: ...) or fill(...)',
        rows='''
def {name}_by_hand(n_in: int, n_out: int) -> float:
    """FILL IN: the standard deviation of a weight of a layer with these fans."""
    {fail}


def {name}_is_its_formula() -> None:
    spread("{name}", {name}_by_hand)
''',
    ),
    "optimizer": Stub(
        what="the weights in a step",
        arguments=("param_groups: Groups", "lr: float", "weight_decay: float = 0.0"),
        returns="Optimizer",
        values=("lr: 0.1  # FILL IN", "weight_decay: 0.0  # FILL IN: added to the gradient, or decoupled"),
        body="""
check("lr", lr, "(0, inf)")
check("weight_decay", weight_decay, "[0, inf)")
return Idle(param_groups, {{"lr": lr, "weight_decay": weight_decay}})  # FILL IN: one of knep.optim.optimizers
""".strip("\n"),
        rows='''
def {name}_by_hand(w: np.ndarray, g: np.ndarray, s: dict, t: int, hp: dict) -> np.ndarray:
    """FILL IN: the weights after step t (from 1) with gradient g; s keeps what lasts, hp has lr and weight_decay."""
    {fail}


def {name}_is_its_formula() -> None:
    follows("{name}", {name}_by_hand)()
''',
    ),
    "clip": Stub(
        what="the gradients",
        arguments=("parameters: Iterable[Tensor]",),
        returns="Tensor",
        body="return global_norm(gradients(parameters))  # FILL IN: edit them in place behind it",
        rows='''
def {name}_by_hand(gradients: list[Tensor]) -> list[Tensor]:
    """FILL IN: what the gradients become, in float64."""
    {fail}


def {name}_is_its_formula() -> None:
    params = parameters(3.0)
    want = {name}_by_hand(grads(params))
    assert make("{name}")(params).item() == pytest.approx(3.0)
    torch.testing.assert_close(grads(params), want, rtol=1e-12, atol=0)
''',
    ),
    "scheduler": Stub(
        what="the rate",
        arguments=("optimizer: Optimizer", "total_steps: int", "steps_per_epoch: int"),
        returns="LRScheduler",
        body="return Unchanged(optimizer)  # FILL IN: warmed(...) or staircase(...)",
        rows='''
def {name}_by_hand(t: np.ndarray) -> np.ndarray:
    """FILL IN: the share of the base rate at the steps t, from 0, of STEPS with EPOCH an epoch."""
    {fail}


def {name}_is_its_formula() -> None:
    equal(factors("{name}"), {name}_by_hand(T))
''',
    ),
    "regularization": Stub(
        what="the loss, or to weights behind a step",
        base="Regularizer",
        partial=False,
        body="""
def penalty(self, params: Sequence[Tensor]) -> Tensor | float:
    return 0.0  # FILL IN, or `after_step` in its place
""".strip("\n"),
        rows='''
def {name}_by_hand(weights: list[np.ndarray]) -> float:
    """FILL IN: what is added to the loss, from the weights that decay."""
    {fail}


def {name}_is_its_formula() -> None:
    net = model()
    want = {name}_by_hand(arrays(net))
    assert float(make("{name}").penalty(decayed(net))) == pytest.approx(want, rel=1e-12)
''',
    ),
    "averaging": Stub(
        what="the weights that are tested",
        base="_Single",
        partial=False,
        body="""
def on_train_batch_end(
    self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
) -> None:
    pass  # FILL IN, or build on `_Average` as `Ema` does
""".strip("\n"),
        rows='''
def {name}_by_hand(trained):
    """FILL IN: the weights that are tested, from those after each step, in float64."""
    {fail}


def {name}_is_its_formula():
    with tempfile.TemporaryDirectory() as folder:
        module, _, _ = fit({made}(), folder)
    close(weights(module.model), {name}_by_hand(module.trained))
''',
    ),
    "stopping": Stub(
        what="the length of the run",
        base="Callback",
        partial=False,
        body="""
def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
    pass  # FILL IN: trainer.should_stop, from trainer.callback_metrics
""".strip("\n"),
        rows='''
def {name}_by_hand(curve):
    """FILL IN: the epochs that are trained on this curve of losses, and the epoch, from 1, whose weights are tested."""
    {fail}


def {name}_is_its_formula():
    curve = [1.0, 0.5, 0.4, 0.45, 0.41, 0.3, 0.2]
    with tempfile.TemporaryDirectory() as folder:
        found = fit(curve, folder, stop={made})
    assert found == {name}_by_hand(curve)
''',
    ),
}
