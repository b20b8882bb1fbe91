"""What passes through a model shows: here alone is a pass watched, by hooks on modules and by torch functions.

`hooks_on` puts the hooks, `hooked` takes them off at the end, `Recorder` follows modules and functions together; what a
reader keeps of that is its own. A model's own state is kept meanwhile.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from knep.surgery.sample import Inputs, call, doubled, ready

# Functions that bend a signal, by the name that module, function and method share.
BENDS = ("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "rrelu", "prelu", "elu", "elu_", "celu", "selu", "gelu",
         "silu", "mish", "hardswish")  # fmt: skip
BENDS_OR_GATES = ("sigmoid", "tanh", "hardsigmoid")
_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode; each gets its own back.

    What a module keeps of a pass in eval mode, it clears when it is told to train: so they all are, before.
    """
    modes = {m: m.training for m in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        model.train()
        for m, was in modes.items():
            m.training = was


def name_of(function: object) -> str:
    """The name of a torch function or method."""
    return getattr(function, "__name__", str(function))


def hooks_on(
    modules: Iterable[nn.Module],
    enter: Callable[..., Any] | None = None,
    leave: Callable[..., Any] | None = None,
    *,
    always: bool = False,
) -> Iterator[RemovableHandle]:
    """Puts `enter(module, args, kwargs)` in front of each module's calls, `leave(module, args, output)` behind them.

    What `leave` returns takes the place of the output. always: it is called behind a call that raised, too.
    """
    for m in modules:
        if enter is not None:
            yield m.register_forward_pre_hook(enter, with_kwargs=True)
        if leave is not None:
            yield m.register_forward_hook(leave, always_call=always)


@contextmanager
def hooked(modules: Iterable[nn.Module], *hooks: Any, **how: Any) -> Iterator[None]:
    """`hooks_on`, until the end, also by an error."""
    handles: list[RemovableHandle] = []
    try:
        handles.extend(hooks_on(modules, *hooks, **how))  # TorchScript takes none: what has them by then loses them
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recorder(TorchFunctionMode):
    """Follows what runs while it is open: calls of the modules, and of torch functions and methods.

    A kind of recorder says what it keeps: `enter` is called in front of a module's call, `leave` behind it, with output
    None where it raised, and `function` in place of a torch function. inside: the modules that run, innermost last.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.inside: list[nn.Module] = []
        self._modules = modules

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pass

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        pass

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inside.append(module)
        self.enter(module, args, kwargs)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: object) -> Any:
        self.inside.pop()
        return self.leave(module, args, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.function(func, args, dict(kwargs or {}))

    def __enter__(self) -> Any:
        self._hooks = hooked(self._modules, self._begin, self._end, always=True)
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)


def surround(model: nn.Module, make: Callable[[], Recorder]) -> None:
    """Runs every forward of the model in a recorder of its own from here on, whose `leave` may give another output.

    Hooks rather than a module around it, so that the parameters keep their names.
    """
    running: list[Recorder] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(make().__enter__())

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        recorder = running.pop()
        recorder.__exit__(None, None, None)
        return recorder.leave(module, args, output)

    list(hooks_on([model], enter, leave, always=True))


class Bend:
    """One call of an activation, by a module or, in the forward of `module`, by a function of this name."""

    def __init__(self, module: nn.Module, function: str | None, input: Tensor, output: Tensor) -> None:
        self.module, self.function, self.input, self.output = module, function, input, output


class Pass(Recorder):
    """What one pass in eval mode, without gradients, shows of each module.

    start: when its first call began, with those of all modules on one clock; end: when it ended; times: calls;
    given: its arguments by name at the first call; adds: modules whose own forward adds two signals of one shape;
    to_last: whether (N, C, H, W) is turned into (N, H, W, C) somewhere;
    seen: calls with one tensor in and one out, of modules and of activation functions, in the order of their ends.
    """

    def __init__(self, model: nn.Module, sample: Inputs) -> None:
        super().__init__(model.modules())
        self.clock, self.times = 0, Counter[nn.Module]()
        self.start: dict[nn.Module, int] = {}
        self.end: dict[nn.Module, int] = {}
        self.given: dict[nn.Module, dict[str, Any]] = {}
        self.adds: set[nn.Module] = set()
        self.to_last = False
        self.seen: list[Bend] = []
        with torch.no_grad(), mode(model, False), self:
            call(model, ready(model, sample))

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.times[module] += 1
        self.start.setdefault(module, self._tick())
        if module not in self.given:
            names = list(inspect.signature(module.forward).parameters)
            self.given[module] = dict(zip(names, args, strict=False)) | kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.end.setdefault(module, self._tick())
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.seen.append(Bend(module, None, args[0], output))

    def function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        name = name_of(func)
        self.to_last |= name == "permute" and _axes(args) == [0, 2, 3, 1]
        owner = self.inside[-1] if self.inside else None
        if owner is None or not args:
            return output
        if name in _ADDITIONS and _same_shape(*args[:2]):
            self.adds.add(owner)
        if name in (*BENDS, *BENDS_OR_GATES) and isinstance(output, Tensor):
            self.seen.append(Bend(owner, name, args[0], output))
        return output


def _axes(args: tuple[Any, ...]) -> list[Any]:
    """The order of axes that permute is given, as a list or one by one."""
    order: Any = args[1] if len(args) == 2 else args[1:]
    return [axis % 4 for axis in order if isinstance(axis, int)] if isinstance(order, (list, tuple)) else []


def _same_shape(*values: object) -> bool:
    """Whether two values are signals of one shape."""
    signals = [v for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)]
    return len(signals) == 2 and signals[0].shape == signals[1].shape


def same_in_training(
    model: nn.Module, sample: Inputs, forwards: dict[nn.Module, Callable[..., Any]]
) -> dict[nn.Module, str]:
    """Which of the modules compute something else by the other forward than by their own: module -> reason.

    Each is tried on a copy in training mode, on what it sees of the sample, from one state of the random generator.
    """
    found: dict[nn.Module, str] = {}
    tried: set[nn.Module] = set()

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in tried:
            return
        tried.add(module)
        own, other = (_run_copy(module, forward, args, kwargs) for forward in (type(module).forward, forwards[module]))
        if not _equal(own, other):
            found[module] = "torch.fx reads its forward wrongly"

    with torch.no_grad(), mode(model, False), hooked(forwards, compare):
        call(model, doubled(ready(model, sample)))
    return found


def _run_copy(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    twin, args, kwargs = copy.deepcopy((module, args, kwargs))
    for m in twin.modules():
        m._forward_pre_hooks.clear()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pytree.tree_leaves(forward(twin.train(), *args, **kwargs))


def _equal(a: list[Any], b: list[Any]) -> bool:
    def same(x: object, y: object) -> bool:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return x == y
        return x.shape == y.shape and (x.is_meta or torch.equal(x.nan_to_num(), y.nan_to_num()))

    return len(a) == len(b) and all(map(same, a, b))


@dataclass(frozen=True)
class Call:
    """One call of a module: its first tensor in, the tensor out, and how often that had been changed in place."""

    module: nn.Module
    input: Tensor
    output: Tensor
    version: int


def calls(model: nn.Module, sample: Inputs, *, training: bool = False) -> list[Call]:
    """The calls of all submodules, in the order in which they end, when the model reads two images of `sample`.

    The model runs without gradients, in eval mode, so that nothing in it changes; or, for the parts that act only
    then, in training mode, whose buffers are restored. Every module's own mode is restored.
    Calls that take or give something other than a tensor are left out.
    """
    seen: list[Call] = []

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            seen.append(Call(module, inputs[0], output, output._version))

    buffers = {b: b.clone() for b in model.buffers()} if training else {}
    images = doubled(ready(model, sample)) if training else ready(model, sample)
    parts = [m for m in model.modules() if m is not model]
    try:
        with torch.no_grad(), torch.random.fork_rng(enabled=training), mode(model, training), hooked(parts, leave=note):
            call(model, images)
    finally:
        for buffer, value in buffers.items():
            buffer.data.copy_(value)
    return seen


def classifier_of(model: nn.Module, sample: Inputs | None) -> nn.Module | None:
    """The linear layer or convolution that acts last when the model reads `sample`; without, the last registered."""
    kinds = (nn.Linear, _ConvNd)
    if sample is not None:
        return next((call.module for call in reversed(calls(model, sample)) if isinstance(call.module, kinds)), None)
    return next((m for m in reversed(list(model.modules())) if isinstance(m, kinds)), None)
