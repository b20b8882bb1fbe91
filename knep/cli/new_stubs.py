"""The stubs that `knep new` writes, from stubs.yaml: what each is in code, in YAML and as a test."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Stub:
    """arguments: of the function, `positional` of them before the star; base: of the class, for a slot of objects.

    body: what is in it; values: lines of the YAML; by_hand: the signature of the formula; formula: what it gives; test:
    compares the trick with it. module: the head of a module of its own, for a slot that is a folder.
    """

    what: str
    body: str
    by_hand: str
    formula: str
    test: str
    arguments: tuple[str, ...] = ()
    returns: str = ""
    base: str = ""
    values: tuple[str, ...] = ()
    partial: bool = True
    positional: int = 1
    module: str = ""

    @property
    def calls_by_name(self) -> bool:
        """Whether the test takes the trick from its module by its name, and so imports it."""
        return "{made}(" in self.test or "={made}" in self.test

    def code(self, made: str, width: int) -> list[str]:
        """The lines of the function or class."""
        head = [f"class {made}({self.base}):"] if self.base else self._signature(made, width)
        docstring = f'"""FILL IN: what it does to {self.what}, the equation, and the source: authors and year.'
        docstring += '\n\nFILL IN: each value with its range, which `check` holds.\n"""'
        gap = "\n\n" if self.base else "\n"
        return [*head, *_indented(docstring + gap + self.body.format(made=made)).split("\n")]

    def _signature(self, made: str, width: int) -> list[str]:
        first, others = self.arguments[: self.positional], self.arguments[self.positional :]
        stars = [*first, "*", *others] if others else [*first]
        one = f"def {made}({', '.join(stars)}) -> {self.returns}:"
        many = [f"def {made}(", *(f"    {argument}," for argument in stars), f") -> {self.returns}:"]
        return [one] if len(one) <= width else many

    def option(self, target: str) -> str:
        """The text of the YAML."""
        head = ["# FILL IN: when to use it, and its source.", f"_target_: {target}"]
        return "\n".join([*head, *(["_partial_: true"] if self.partial else []), *self.values]) + "\n"

    def rows(self, words: Mapping[str, str], slot: str) -> str:
        """The formula to fill in, and the test that compares the trick with it."""
        name = words["name"]
        fail = f'pytest.fail("fill in {name}_by_hand, in tests/recipes/test_{slot}.py")'
        typed = " -> None" if "->" in self.by_hand else ""
        formula = f'def {name}_by_hand{self.by_hand}:\n    """FILL IN: {self.formula}"""\n    {fail}'
        return f"{formula}\n\n\ndef {name}_is_its_formula(){typed}:\n{_indented(self.test.format(**words))}"


def _indented(text: str) -> str:
    return textwrap.indent(text, "    ")


@lru_cache
def stubs() -> Mapping[str, Stub]:
    """Slot -> its stub."""
    import yaml

    rows = yaml.safe_load(Path(__file__).with_name("stubs.yaml").read_text(encoding="utf-8"))
    return {slot: Stub(**row) for slot, row in rows.items()}
