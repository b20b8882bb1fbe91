"""Activation functions made visible: while a model is looked at, each call of one that its code shows is a child."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from knep.nn.kinds import ACTIVATIONS
from knep.nn.own_activations import own_activation
from knep.surgery.edit import Change
from knep.surgery.rewrite_calls import Site, children_of, exchange, is_function, own_class, sites_of
from knep.surgery.watch import FUNCTIONS, Call, Called, FunctionCall


@dataclass(eq=False)
class Unit:
    """One activation function: its owner and the owner's path, the child that stands for it, and where it is called.

    site: None for an attribute of the owner that holds a function, such as self.act = F.relu.
    """

    path: str
    owner: nn.Module
    name: str
    called: Called
    site: Site | None

    @property
    def old(self) -> nn.Module | None:
        """The module that does the same, if that is known."""
        return FUNCTIONS[self.called.function]() if self.site is None else self.site.old

    @property
    def inplace(self) -> bool:
        return self.site is not None and self.site.inplace

    def __str__(self) -> str:
        where = (
            f"as {self.name}" if self.site is None else f"called in {own_class(self.owner).__name__}.{self.site.method}"
        )
        return f"{self.called.function.__name__}, {where}"

    def become(self, new: nn.Module) -> str:
        """Puts `new` where the function was called; returns its path."""
        setattr(self.owner, self.name, new.train(self.owner.training))
        if self.site is not None:
            self._call((self.name, False))
        return f"{self.path}.{self.name}".lstrip(".")

    def restore(self) -> None:
        """Undoes the exposure, unless something else stands there by now."""
        if getattr(self.owner, self.name) is not self.called:
            return
        delattr(self.owner, self.name)
        if self.site is None:
            setattr(self.owner, self.name, self.called.function)
        else:
            self._call(None)

    def _call(self, child: tuple[str, bool] | None) -> None:
        assert self.site is not None
        children = dict(children_of(self.owner))
        children.pop((self.site.method, self.site.number), None)
        exchange(self.owner, children | ({(self.site.method, self.site.number): child} if child else {}))


@contextmanager
def exposed(model: nn.Module) -> Iterator[list[Unit]]:
    """All activation functions of the model's modules as children; afterwards only those that have `become` another."""
    units: list[Unit] = []
    try:
        for path, module in list(model.named_modules()):
            if path and own_activation(module):  # exchanged as a whole
                continue
            _expose_attributes(path, module, units)
            _expose_calls(path, module, units)
        yield units
    finally:
        for unit in units:
            unit.restore()


def _expose_attributes(path: str, module: nn.Module, units: list[Unit]) -> None:
    for name, value in list(vars(module).items()):
        if is_function(value):
            called = Called(value)
            units.append(Unit(path, module, name, called, None))
            setattr(module, name, called)


def _expose_calls(path: str, module: nn.Module, units: list[Unit]) -> None:
    if isinstance(module, Called):
        return
    children = dict(children_of(module))
    for site in sites_of(module):
        if (site.method, site.number) not in children:
            called, name = Called(site.function), _free_name(module)
            module.add_module(name, called)
            units.append(Unit(path, module, name, called, site))
            children[site.method, site.number] = (name, True)
            exchange(module, children)


def _free_name(module: nn.Module) -> str:
    number = 0
    while hasattr(module, f"activation_{number}"):
        number += 1
    return f"activation_{number}"


def unreached(model: nn.Module, seen: list[Call], functions: list[FunctionCall]) -> list[Change]:
    """A Change for each kind of activation function that some module called, and which is no child."""
    paths = {module: path for path, module in model.named_modules()}
    read = {id(call.input) for call in seen if not isinstance(call.module, nn.Identity)}
    found = {
        (call.module, call.function.__name__): None
        for call in functions
        if issubclass(FUNCTIONS[call.function], ACTIVATIONS) or id(call.output) in read
    }
    return [
        Change(
            paths[m] or "the model", f"{name}()", f"not reached: no call that the source of {type(m).__name__} shows"
        )
        for m, name in found
    ]
