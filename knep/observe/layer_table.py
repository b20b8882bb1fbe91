"""Layer by layer: the size of each output and of its gradient in one pass, and the first that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from knep.observe.layer_stats import LayerStats
from knep.surgery.record import hooked

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_SHOWN = ("largest", "mean", "std", "finite")


@dataclass
class Row:
    """One call of a module: its path, class, and the statistics of its output and of that output's gradient."""

    path: str
    kind: str
    output: LayerStats | None = None
    gradient: LayerStats | None = None


@dataclass
class Table:
    """The calls of one pass, in their order. backward: numbers of the rows in the order of their gradients."""

    rows: list[Row] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)

    def first_bad(self) -> tuple[int, str] | None:
        """(row, "output" or "gradient") of the first output that is not finite; of the first gradient where all are."""
        for i, row in enumerate(self.rows):
            if row.output is not None and row.output.finite < 1:
                return i, "output"
        for i in self.backward:
            gradient = self.rows[i].gradient
            if gradient is not None and gradient.finite < 1:
                return i, "gradient"
        return None

    def place(self) -> str | None:
        """The first bad place in words."""
        bad = self.first_bad()
        if bad is None:
            return None
        row = self.rows[bad[0]]
        return f"the {'output' if bad[1] == 'output' else 'gradient of the output'} of {row.path} ({row.kind})"

    def plain(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]


@contextmanager
def watched(model: nn.Module) -> Iterator[Table]:
    """Fills the table with what passes through `model` (its leaves, and itself) meanwhile."""
    table, paths = Table(), dict[nn.Module, str]()
    for path, module in model.named_modules():
        inner = [name for name, _ in module.named_children() if name != "parametrizations"]
        if path == "" or not (inner or "parametrizations" in path):
            paths[module] = path or "model"
    with hooked(paths, leave=_noting(table, paths)):
        yield table


def _noting(table: Table, paths: dict[nn.Module, str]) -> Any:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        path = paths[module]
        if path != "model" and any(output is x for x in inputs):
            return  # a place that is empty
        row, number = Row(path, type(module).__name__), len(table.rows)
        table.rows.append(row)
        first = next(iter(_tensors(output)), None)
        if first is None:
            return
        row.output = LayerStats.of(first.detach().double())

        def note_gradient(gradient: Tensor) -> None:
            row.gradient = LayerStats.of(gradient.double())
            table.backward.append(number)

        if first.requires_grad:
            first.register_hook(note_gradient)

    return note


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def show(table: Table) -> RichTable:
    """The table for a terminal, with the first bad place marked."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    from knep.utils.text import shown

    made, bad = RichTable(box=None, pad_edge=False), table.first_bad()
    for name in ("", "layer", "", *(f"output {s}" for s in _SHOWN), *(f"gradient {s}" for s in _SHOWN)):
        made.add_column(name, justify="right" if " " in name else "left", no_wrap=True)
    for i, row in enumerate(table.rows):
        mark = f"bad {bad[1]}" if bad and bad[0] == i else ""
        cells = [*_cells(row.output), *_cells(row.gradient)]
        made.add_row(mark, escape(shown(row.path)), escape(shown(row.kind)), *cells, style="bold red" if mark else None)
    return made


def _cells(stats: LayerStats | None) -> list[str]:
    if stats is None:
        return ["-"] * len(_SHOWN)
    return [f"{stats.largest:.3g}", f"{stats.mean:.3g}", f"{stats.std:.3g}", f"{stats.finite:.1%}"]
