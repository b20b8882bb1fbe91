"""`knep cards`: a page for every option, with what it does, when to use it and when not, and what was measured of it.

The pages are generated from the YAML files, the docstrings, about.yaml and the ledger's results, and from nothing else.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from knep.config.catalog import CONF, SLOTS, cells, options, reason
from knep.errors import InputError
from knep.evidence import readme_table
from knep.evidence.verify import RUNS, expected
from knep.io.atomic import write_atomic

_HEAD = (
    "| data/model | n | test accuracy | difference, points | steps to target | time | memory | verdict "
    "| two more runs, points |\n|---|---|---|---|---|---|---|---|---|"
)


def cards(words: Sequence[str]) -> int:
    """`knep cards [FOLDER]`: writes the pages that are out of date, by default in docs/cards. Returns 0.

    Without FOLDER, the table between the marks of README.md in the current folder too.
    """
    if len(words) > 1:
        raise InputError(f"{words[1]}: cards takes one folder, for example knep cards docs/cards")
    folder = Path(words[0]) if words else Path("docs") / "cards"
    stale = outdated(folder)
    if not words and Path("README.md").is_file():
        _fill(Path("README.md"))
    for path, text in stale.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    print(f"{len(stale)} of {len(pages())} pages written in {folder}")
    return 0


def _fill(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wanted = readme_table.filled(text)
    if wanted != text:
        write_atomic(page, wanted)
        print(f"the table of effects written in {page}")


def outdated(folder: Path) -> dict[Path, str]:
    """The pages in `folder` that are missing or say something else than they should, with what they should say."""
    wanted = {folder / name: text for name, text in pages().items()}
    return {p: text for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text}


def pages() -> dict[str, str]:
    """File name under docs/cards -> text, for every option of every slot, and the table of contents."""
    made = {f"{slot}/{option}.md": card(slot, option) for slot in SLOTS for option in options(slot)}
    return made | {"README.md": _contents()}


def unmeasured() -> list[str]:
    """ "slot/option" of every option that the ledger has no number of."""
    known = {f"{slot}/{cell['option']}" for slot in SLOTS for cell in cells(slot) if "test_acc" in cell}
    return [f"{slot}/{option}" for slot in SLOTS for option in options(slot) if f"{slot}/{option}" not in known]


def card(slot: str, option: str) -> str:
    """The page of one option."""
    about = _about().get(slot, {}).get(option, {})
    parts = [f"# {slot}={option}", reason(slot, option), *_what(slot, option)]
    parts += [f"**{title}.** {about[key]}" for key, title in _SAID.items() if key in about]
    told = [cell for cell in cells(slot) if cell["option"] == option]
    missing = [] if any("test_acc" in cell for cell in told) else ["Not measured yet."]
    parts += ["## Measured", *missing, *(_measured(slot, told) if told else [])]
    return "\n\n".join(parts) + "\n"


_SAID = {"equation": "Equation", "not": "When not"}


@lru_cache
def _about() -> dict[str, dict[str, dict[str, str]]]:
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("about.yaml")))
    return found


def _what(slot: str, option: str) -> list[str]:
    """What its function says of itself, up to its hyper-parameters, and the function's name."""
    found = re.search(r"^_target_: (\S+)", (CONF / slot / f"{option}.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        return []
    target = found[1]
    name = f"**Function.** `{target}`"
    if not target.startswith("knep."):
        return [name]
    from hydra.utils import get_object

    paragraphs = (inspect.getdoc(get_object(target)) or "").split("\n\n")
    own = [p for p in paragraphs if not re.match(r"(Raises|Returns|[a-z_, ]+:) ", p)]
    return [f"**What it does.** {_escaped(' '.join(' '.join(own).split()))}", name]


def _escaped(text: str) -> str:
    return re.sub(r"([<>|*_])", r"\\\1", text)


def _measured(slot: str, measured: Sequence[Mapping[str, Any]]) -> list[str]:
    rows, notes = [_HEAD], []
    for cell in measured:
        rows.append(_row(cell))
        if "lines" in cell:
            last = len(cell["seeds"]) - 1
            command = f"python train.py {' '.join(cell['lines'])} threads=1 seed=0"
            notes.append(f"{cell['workload']}: `{command}`, and so on to seed={last}.")
            notes += [f"{cell['workload']}, failed: {_escaped(why)}." for why in cell["reasons"]]
    known = [cell for cell in measured if "test_acc" in cell]
    if known:
        control = next((f"{slot}={cell['control']}" for cell in known if cell["control"]), "")
        against = f"Difference, steps, time and memory against {control} with the same seeds" if control else ""
        notes.insert(0, f"{against}, 95 % intervals." if control else "The control of its slot.")
        where = sorted({f"{cell['hardware']}, commit {cell['commit'] or 'unknown'}" for cell in known})
        notes += [f"Measured on {'; '.join(where)}. `knep verify {slot}/{known[0]['option']}` measures it again."]
    return ["\n".join(rows), *notes]


def _row(cell: Mapping[str, Any]) -> str:
    if "refused" in cell:
        return f"| {cell['workload']} | | refused: {_escaped(cell['refused'])} | | | | | | |"
    mean = 100 * sum(cell["test_acc"]) / cell["n"]
    low, high = expected(cell["test_acc"], RUNS)
    effect, words = cell["effect"], [""] * 5
    if effect:
        steps = _span(effect["steps"], 1, "{:+.0f}") if effect["steps"] else ""
        steps += f", {effect['unreached']} of {cell['n']} never" if effect["unreached"] else ""
        difference = f"{_span(effect['accuracy'], 100, '{:+.2f}')}, p = {effect['corrected_p']:.3f}"
        times = [f"x{effect[key]:.2f}" if effect[key] is not None else "" for key in ("time", "memory")]
        words = [difference, steps, *times, effect["verdict"]]
    numbers = [cell["workload"], str(cell["n"]), f"{mean:.2f} %", *words, f"{100 * low:.2f} to {100 * high:.2f}"]
    return f"| {' | '.join(numbers)} |"


def _span(effect: Mapping[str, float], scale: float, form: str) -> str:
    mean, low, high = (form.format(scale * effect[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _contents() -> str:
    """README.md of the cards: effects by slot, and what has no number yet."""
    parts = [
        "# Cards",
        "One page per option; `knep cards` writes them from `knep/evidence/results`. Differences of test accuracy in "
        "points against the slot's plain option, with the same seeds; 95 % intervals; p "
        "corrected within a slot (Holm).",
    ]
    for slot in SLOTS:
        rows = [
            f"| [{c['option']}]({slot}/{c['option']}.md) | {c['workload']} | {c['n']} "
            f"| {_span(c['effect']['accuracy'], 100, '{:+.2f}')} | x{c['effect']['time'] or 0:.2f} "
            f"| {c['effect']['verdict']} |"
            for c in sorted(cells(slot), key=lambda c: (c["workload"], c["option"]))
            if c.get("effect")
        ]
        if rows:
            head = "| option | data/model | n | difference | time | verdict |\n|---|---|---|---|---|---|"
            parts += [f"## {slot}", "\n".join([head, *rows])]
    missing = unmeasured()
    parts += ["## Not measured yet", f"{len(missing)} of {sum(len(options(slot)) for slot in SLOTS)} options."]
    for slot in SLOTS:
        named = [f"[{name}]({name}.md)" for name in missing if name.startswith(f"{slot}/")]
        parts += [", ".join(named)] if named else []
    return "\n\n".join(parts) + "\n"
