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

from knep.config.catalog import CONF, SLOTS, TASK_SLOTS, cells, options, reason
from knep.errors import InputError
from knep.evidence import readme_table
from knep.evidence.meta.verdicts import CORRECTION, count, pooled, stored
from knep.evidence.report import never
from knep.evidence.verify import RUNS, power
from knep.io.atomic import write_atomic

_HEAD = (
    "| data/model | n | test accuracy | difference, points | p (Holm) | p (signs) | steps to target | time | memory "
    "| verdict | power of `verify` |\n|---|---|---|---|---|---|---|---|---|---|---|"
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
    made = {f"{slot}/{option}.md": card(slot, option) for slot in (*SLOTS, *TASK_SLOTS) for option in options(slot)}
    return made | {"README.md": _contents()}


def unmeasured() -> list[str]:
    """ "slot/option" of every option of the ledger that it has no number of."""
    known = {f"{slot}/{cell['option']}" for slot in SLOTS for cell in cells(slot) if "test_acc" in cell}
    return [f"{slot}/{option}" for slot in SLOTS for option in options(slot) if f"{slot}/{option}" not in known]


def overlooked() -> list[str]:
    """Those of `unmeasured` that nobody has tried; the others no workload of images can take, such as inits of
    transformers, and a cell says why."""
    tried = {f"{slot}/{cell['option']}" for slot in SLOTS for cell in cells(slot)}
    return [name for name in unmeasured() if name not in tried]


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


def advice(slot: str, option: str) -> str:
    """When its card says not to use an option; "" where it says nothing of it."""
    return _about().get(slot, {}).get(option, {}).get("not", "")


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
    if not known:
        return ["\n".join(rows), *notes]
    name = f"{slot}/{known[0]['option']}"
    where = sorted({f"{cell['hardware']}, commit {cell['commit'] or 'unknown'}" for cell in known})
    notes += [f"Measured on {'; '.join(where)}. `knep verify {name}` measures it again, with {RUNS} fresh seeds."]
    return ["\n".join(rows), *_read(slot, known), *notes]


def _read(slot: str, known: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the rows are to be read: against what, corrected for what, untuned, and what a new problem may expect."""
    control = next((cell["control"] for cell in known if cell["control"]), "")
    protocol = "What an interval covers, and what not: [protocol](../../protocol.md)."
    if not control:
        return [f"The control of its slot. {protocol}"]
    ledger = stored()
    said = [
        f"Difference, steps, time and memory against {slot}={control} with the same seeds, 95 % intervals over seeds "
        f"on one split. p of Student's t is corrected over all {count(ledger)} effects of the ledger ({CORRECTION}), "
        f"the sign-flip test's is as it is. {protocol}",
        f"As shipped: no option of this page was tuned, nor was {slot}={control}, and runs are short, "
        f"{_horizon(known)}. {_UNTUNED.get(slot, '')}".strip(),
    ]
    against = [cell["workload"] for cell in known if cell.get("against")]
    if against:
        said.append(f"On {', '.join(against)} this is a use that the card advises against; it counts in no summary.")
    found = pooled(slot, known[0]["option"], ledger)
    if found:
        new = readme_table.share(None, found.new_low, found.new_high)
        said.append(
            f"Over {found.workloads} workloads (random effects), as share of the error of {slot}={control}: "
            f"{readme_table.share(found.mean, found.low, found.high)} removed; {found.i2:.0%} of the variance lies "
            f"between workloads. On a new problem of their kind: {new}."
        )
    else:
        said.append("Fewer than three workloads that may be pooled: nothing is said of a new problem.")
    return said


_UNTUNED = {
    "optimizer": "Each rule has the rate of its own file, and SGD its 0.1: a rule that does better may owe it to that. "
    "`knep compare optimizer=sgd,adamw` tunes both with the same budget."
}


def _horizon(known: Sequence[Mapping[str, Any]]) -> str:
    """How many epochs the runs had, by workload where they differ."""
    epochs: dict[str, list[str]] = {}
    for cell in known:
        said = [line for line in cell["lines"] if line.startswith("trainer.max_epochs=")]
        epochs.setdefault(said[-1].partition("=")[2], []).append(cell["workload"])
    if len(epochs) == 1:
        return f"{next(iter(epochs))} epochs"
    return ", ".join(f"{number} epochs on {' and '.join(names)}" for number, names in epochs.items())


def _row(cell: Mapping[str, Any]) -> str:
    if "refused" in cell:
        return f"| {cell['workload']} | | refused: {_escaped(cell['refused'])} | | | | | | | | |"
    mean = 100 * sum(cell["test_acc"]) / cell["n"]
    effect, words = cell["effect"], [""] * 8
    if effect:
        a, said = effect["accuracy"], effect["verdict"].split(",")[0]
        steps = _span(effect["steps"], 1, "{:+.0f}") if effect["steps"] else ""
        steps = steps or never(effect["unreached"], effect["control_unreached"], cell["n"])
        times = [f"x{effect[key]:.2f}" if effect[key] is not None else "" for key in ("time", "memory")]
        worth = f"{power(a):.0%}" if said in ("helps", "hurts") else ""
        wide = effect["images"]
        more = f"; seeds and images [{100 * wide[0]:+.2f}, {100 * wide[1]:+.2f}]" if wide else ""
        ps = [f"{p:.3f}" for p in (effect["corrected_p"], a["p_flip"])]
        words = [_span(a, 100, "{:+.2f}") + more, *ps, steps, *times, effect["verdict"], worth]
    return f"| {' | '.join([cell['workload'], str(cell['n']), f'{mean:.2f} %', *words])} |"


def _span(effect: Mapping[str, float], scale: float, form: str) -> str:
    mean, low, high = (form.format(scale * effect[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _contents() -> str:
    """README.md of the cards: effects by slot, and what has no number yet."""
    parts = [
        "# Cards",
        "One page per option; `knep cards` writes them from `knep/evidence/results`. Differences of test accuracy in "
        "points against the slot's plain option, with the same seeds; 95 % intervals over seeds on one split; "
        f"verdicts after p was corrected over all {count(stored())} effects of the ledger ({CORRECTION}). Options are "
        "as shipped, nothing was tuned, and runs are short. What all this means: [protocol](../protocol.md).",
    ]
    for slot in SLOTS:
        rows = [
            f"| [{c['option']}]({slot}/{c['option']}.md) | {c['workload']} | {c['n']} "
            f"| {_span(c['effect']['accuracy'], 100, '{:+.2f}')} | x{c['effect']['time'] or 0:.2f} "
            f"| {c['effect']['verdict']} |"
            for c in sorted(cells(slot), key=lambda c: (c["workload"], c["option"]))
            if c.get("effect") and not c.get("against")
        ]
        if rows:
            head = "| option | data/model | n | difference | time | verdict |\n|---|---|---|---|---|---|"
            parts += [f"## {slot}", "\n".join([head, *rows])]
    advised = [(s, c["option"], c["workload"]) for s in SLOTS for c in cells(s) if c.get("against")]
    if advised:
        named = ", ".join(f"[{s}={option}]({s}/{option}.md) on {workload}" for s, option, workload in advised)
        parts += ["## Uses that a card advises against", f"Measured, and on their cards alone: {named}."]
    missing = unmeasured()
    parts += ["## Not measured yet", f"{len(missing)} of {sum(len(options(slot)) for slot in SLOTS)} options."]
    # The ledger's workloads have balanced classes of images, on which losses and draws say nothing.
    missing += [f"{slot}/{option}" for slot in TASK_SLOTS for option in options(slot)]
    for slot in (*SLOTS, *TASK_SLOTS):
        named = [f"[{name}]({name}.md)" for name in missing if name.startswith(f"{slot}/")]
        parts += [", ".join(named)] if named else []
    return "\n\n".join(parts) + "\n"
