"""Mutated fields of what a run leaves: checkpoints of many options, black boxes, summaries, tables, lines; moved runs.

A mutated field is refused in one line with exit code 2 and nothing in the folder changed, or it is without
consequence: what the command says and writes is to the bit what it was. Values that another run could have had, other
finite numbers in a tensor of the same shape for example, cannot be told wrong, and may have the consequences that
they have; so may a run that the guard then stops. Nothing outside the folder is opened for writing, moved or removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.exhaustive.fuzzing.arena import Outcome, run
from tests.exhaustive.fuzzing.lines import QUICK
from tests.exhaustive.fuzzing.mutations import Mutation, fields, mutate

# Each with the batch (of 3 an epoch) after which it is stopped; 0 trains on to the end of its first epoch.
BASES: dict[str, tuple[str, int]] = {
    "adamw": ("optimizer=adamw norm=batch clip=norm", 4),
    "adam": ("optimizer=adam averaging=ema scheduler=one_cycle", 5),
    "momentum": ("optimizer=momentum averaging=soup stopping=early", 0),
    "nesterov": ("optimizer=nesterov averaging=swa averaging.start=0.3 norm=batch", 0),
    "rmsprop": ("optimizer=rmsprop scheduler=plateau guard=rollback", 4),
    "adagrad": ("optimizer=adagrad scheduler=cyclic guard=skip guard.spike=5", 4),
    "adadelta": ("optimizer=adadelta scheduler=exponential clip=value", 5),
    "adan": ("optimizer=adan stopping=early averaging=ema guard=rollback", 5),
    "lamb": ("optimizer=lamb accumulate=2", 4),
    "lion": ("optimizer=lion accumulate=2 averaging=soup", 5),
    "muon": ("optimizer=muon scheduler=step", 4),
    "nadam": ("optimizer=nadam scheduler=linear clip=adaptive", 0),
    "radam": ("optimizer=radam scheduler=multistep", 5),
    "sam": ("optimizer=sam norm=batch", 4),
    "schedule_free": ("optimizer=schedule_free scheduler=none", 5),
    "shampoo": ("optimizer=shampoo scheduler=cosine", 4),
    "soap": ("optimizer=soap scheduler=warmup_stable_decay", 4),
    "sgd": ("optimizer=sgd scheduler=polynomial callbacks=doctor", 5),
    "gd": ("optimizer=gd averaging=soup", 0),
    "normalized_sgd": ("optimizer=normalized_sgd scheduler=inverse_sqrt guard=none", 4),
    "none": ("optimizer=none scheduler=cosine_restarts norm=spectral", 4),
    "lightning": ("optimizer=adamw lean=false trainer.precision=64-true averaging=ema", 5),
}
# Whole numbers that nothing else in a checkpoint says again: within their range each could be another run's.
_FREE = re.compile(
    r".*\.(wait_count|num_bad_epochs|cooldown_counter|stopped_epoch|stopping_reason|last_step|clipped.*|counts\..*|turns\..*)"
    # What an epoch logged is a record: another callback could have logged less, or under another name.
    r"|callbacks\.History\.rows\.\d+\..*|exact\.metrics(\..*)?"
    # Numbers of activations and losses are bounded by nothing, and a pooled network takes images of any size.
    r"|.*\.running_(mean|var)|running\.guard\.loss_so_far|knep\.image_size"
)
# Where in its run a box's step stood: printed alone, and refused where its numbers contradict each other.
_FREE_OF_BOX = ("step", "epoch", "batch_idx", "batches")
_FREE_TEXT = re.compile(r"callbacks\.Doctor\..*|.*stopping_reason_message|knep\.(class_names|config\.(name|doctor)).*")


@dataclass(frozen=True)
class Base:
    """A run to spoil. folder: its own; ends: door -> what it comes to unspoilt."""

    name: str
    folder: Path
    ends: dict[str, Any] = field(default_factory=dict)


def small(lines: str) -> list[str]:
    return [*QUICK, "model.widths=[4,6]", "trainer.max_epochs=2", *lines.split(), "hydra.run.dir=run"]


def stopped(arguments: Sequence[str]) -> None:
    """Trains, and is asked to stop after a batch: the first argument, 0 for none."""
    import knep.engine.fit
    from knep.cli.train import main
    from tests.exhaustive.resume_matrix import Strike

    batch, *lines = arguments
    if int(batch):
        strike: Any = Strike(int(batch), signal.SIGINT)
        knep.engine.fit.fit_member = partial(knep.engine.fit.fit_member, callbacks=[strike])
    main(lines)


def resume(arguments: Sequence[str]) -> None:
    from knep.cli.train import main

    main([f"ckpt={arguments[0]}", "trainer.max_epochs=3"])


def evaluate(arguments: Sequence[str]) -> None:
    from knep.cli.main import main

    main(["evaluate", arguments[0]])


def export(arguments: Sequence[str]) -> None:
    from knep.cli.main import main

    main(["export", arguments[0], f"{arguments[0]}.safetensors"])


def replay(arguments: Sequence[str]) -> None:
    from knep.cli.train import main

    main([f"replay={arguments[0]}/blackbox.pt"])


DOORS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "resume": (resume, "checkpoints/last.ckpt"),
    "evaluate": (evaluate, "checkpoints/final.ckpt"),
    "export": (export, "checkpoints/final.ckpt"),
    "replay": (replay, "blackbox.pt"),
}


def warm() -> None:
    """Imports what the doors use, so that each child need not."""
    for name in (
        "torch.utils.tensorboard",
        "knep.run.replay",
        "knep.export.export",
        "knep.engine.evaluate",
        "tests.exhaustive.resume_matrix",
    ):
        importlib.import_module(name)


def make_bases(root: Path, names: Sequence[str]) -> list[Base]:
    """The runs to spoil, each with what the doors make of it."""
    bases = []
    for name in names:
        lines, batch = BASES[name]
        work = root / name
        work.mkdir(parents=True)
        outcome = run(stopped, [str(batch), *small(lines)], work)
        assert (work / "run" / "checkpoints" / "last.ckpt").is_file(), f"{name}: {outcome.err}"
        bases.append(Base(name, work / "run"))
    work = root / "blackbox"
    work.mkdir()
    run(stopped, ["0", *small("optimizer=momentum optimizer.lr=3e38")], work)
    bases.append(Base("blackbox", work / "run"))
    assert (work / "run" / "blackbox.pt").is_file()
    for base in bases:
        for door in doors_of(base):
            place = root / f"{base.name}_{door}" / "work"
            outcome = _run(base, door, place, lambda folder: None)[0]
            assert outcome.code == 0, f"{base.name} {door}: {outcome.err}"
            base.ends[door] = _end(door, place, outcome)
    return bases


def doors_of(base: Base) -> list[str]:
    """What can be done with a run; with one that its guard stopped, no more than to look at its box."""
    doors = ["replay"] if base.name == "blackbox" else [door for door in DOORS if door != "replay"]
    return [door for door in doors if (base.folder / DOORS[door][1]).is_file()]


def _run(base: Base, door: str, work: Path, spoil: Callable[[Path], Any]) -> tuple[Outcome, Any, dict[str, str]]:
    """A door opened on a spoilt copy of a run, which lies elsewhere than the run itself did."""
    work.mkdir(parents=True)
    outside = work.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_text("the reader's own")
    folder = Path(shutil.copytree(base.folder, work / "old"))
    spoilt = spoil(folder)
    before = _content(folder)
    outcome = run(DOORS[door][0], ["old"], work)
    return outcome, spoilt, {k: v for k, v in before.items() if _content(folder).get(k) != v}


def _content(folder: Path) -> dict[str, str]:
    """Digests of the files that a refusal must leave as they are."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*")) if p.is_file()
    }  # fmt: skip


def _end(door: str, work: Path, outcome: Outcome) -> Any:
    """All that a door makes: weights, state, curve and what is printed, without times and places."""
    folder = work / "old"
    end: dict[str, Any] = {"said": re.sub(r"[\d.,]+ samples/s|samples/s +[\d.,]+|/\S*|\s+", " ", outcome.out)}
    for name in ("final.ckpt", "last.ckpt") if door == "resume" else ():
        if (folder / "checkpoints" / name).is_file():
            state = torch.load(folder / "checkpoints" / name, weights_only=True)
            end[name] = _digest({k: v for k, v in state.items() if k != "knep"})
    end["metrics"] = (folder / "metrics.csv").read_text() if (folder / "metrics.csv").is_file() else ""
    end["exported"] = [_exported(p) for p in sorted(work.glob("*.safetensors"))]
    return end


def _exported(path: Path) -> str:
    """A digest of the content: the format keeps what describes a file in no order."""
    with safe_open(path, "pt") as file:
        return _digest([dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}])  # noqa: SIM118


def _digest(tree: Any) -> str:
    seen = hashlib.sha256()

    def add(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            seen.update(repr((node.dtype, tuple(node.shape))).encode() + node.detach().contiguous().numpy().tobytes())
        elif isinstance(node, dict):
            for key in sorted(node, key=repr):
                seen.update(repr(key).encode())
                add(node[key])
        elif isinstance(node, (list, tuple)):
            for value in node:
                add(value)
        else:
            seen.update(repr(node).encode())

    add(tree)
    return seen.hexdigest()


@dataclass(frozen=True)
class Case:
    base: Base
    door: str
    seed: str

    def spoil(self, folder: Path) -> Mutation:
        """One mutated field: of the door's file four times out of five, else of a text beside it."""
        draw = random.Random(self.seed)
        texts = [spoil for name, spoil in _TEXTS.items() if self.door == "resume" and (folder / name).is_file()]
        if texts and draw.random() < 0.2:
            return draw.choice(texts)(folder, draw)
        path = folder / DOORS[self.door][1]
        state = torch.load(path, weights_only=True)
        kept = [p for p in fields(state) if p[:2] != ("knep", "config") or draw.random() < 0.3]
        made = mutate(state, draw, kept)
        torch.save(state, path)
        if self.door == "resume":
            (folder / "checkpoints" / "best.ckpt").touch()  # the mutated one stays the newest
            path.touch()
        return made


_NO_SUMMARIES = ("[" * 200_000, '{"a":' * 5000, "1" * 5000, f'{{"sealed": {"9" * 5000}}}', "", "\0", "[]", '"x"')
_LINES = (
    "",
    ",",
    "\0",
    "hydra.run.dir=/tmp/x",
    "--multirun",
    "ckpt=../outside",
    "data.root=${oc.env:HOME}",
    "é" * 3000,
)
_LINES += ("seed=" + "9" * 5000, "x: !!python/object:os.system", "- [", "+more=1", "trainer.max_epochs=-1", "1,2,3,4,5")


def _summary(folder: Path, draw: random.Random) -> Mutation:
    path = folder / "summary.json"
    if draw.random() < 0.2:
        path.write_text(draw.choice(_NO_SUMMARIES))
        return Mutation("summary.json", "another text", False)
    tree = json.loads(path.read_text())
    made = mutate(tree, draw)
    with contextlib.suppress(TypeError, ValueError):
        path.write_text(json.dumps(tree))
    return Mutation(f"summary.json {made.field}", made.how, made.legal)


def _lines(name: str, folder: Path, draw: random.Random) -> Mutation:
    """Another line of a text file, or another field of a table."""
    path = folder / name
    lines = path.read_text().splitlines()
    i = draw.randrange(len(lines)) if lines else 0
    other = draw.choice(_LINES)
    made = draw.choice((lambda line: other, lambda line: line * 2, lambda line: re.sub(r"\d", "x", line, count=1)))
    lines[i : i + 1] = [made(lines[i])] if lines else [other]
    path.write_text("\n".join(lines) + "\n")
    return Mutation(f"{name} {i}", other[:40], False)


_TEXTS: Mapping[str, Callable[[Path, random.Random], Mutation]] = {
    "summary.json": _summary,
    **{name: partial(_lines, name) for name in ("overrides.txt", "config.yaml", "metrics.csv", "git_hash.txt")},
}


def cases(bases: Sequence[Base], count: int, seed: int) -> Iterator[Case]:
    """Each base by turns, and its doors: three resumptions for one of each other door."""
    for i in range(count):
        base = bases[i % len(bases)]
        doors = [door for door in doors_of(base) for _ in range(3 if door == "resume" else 1)]
        yield Case(base, doors[i // len(bases) % len(doors)], f"{seed} state {i}")


def fight(case: Case, root: Path) -> tuple[str, str, str]:
    """What is wrong with how a case ended, or ""; how it ended; and what it was."""
    work = root / "case" / "work"
    shutil.rmtree(work.parent, ignore_errors=True)
    outcome, made, changed = _run(case.base, case.door, work, case.spoil)
    end, wrong = judge(case, made, outcome, changed, work)
    name = f"{case.base.name} {case.door} {made.field}: {made.how}"
    return wrong, end, f"{name}\n    {outcome.err.strip()[-250:]}"


def judge(case: Case, made: Mutation, outcome: Outcome, changed: Mapping[str, str], work: Path) -> tuple[str, str]:
    """How a case ended, in a word, and what is wrong with that, or ""."""
    said = [line for line in outcome.lines if line.startswith("knep: ")]
    if outcome.code is None:
        return "wrong", "hangs"
    if outcome.events or sorted(p.name for p in (work.parent / "outside").iterdir()) != ["secret"]:
        return "wrong", f"reaches out: {outcome.events[:1]}"
    if outcome.code == 1 and "Traceback" not in outcome.err and any(work.glob("*/blackbox.pt")):
        return "stopped by the guard", ""
    if "Traceback" in outcome.err or outcome.code not in (0, 2):
        return "wrong", f"exit code {outcome.code}: {' | '.join(outcome.lines[-3:])[-300:]}"
    if outcome.code == 2:
        late = ", ".join(changed)
        if not said or outcome.lines[-1] != said[-1] or len(outcome.lines) > 2:
            return "wrong", f"not one line: {' | '.join(outcome.lines)[-300:]}"
        return ("wrong", f"a refusal changed {late}") if late else ("refused", "")
    gone = [
        name
        for name in changed
        if not (work / "old" / name).exists() and not re.search(r"soup_\d+\.pt|\.hparams$", name)
    ]
    if gone:
        return "wrong", f"removed {gone[0]}"
    end = _end(case.door, work, outcome)
    differs = [k for k, v in case.base.ends[case.door].items() if v != end[k]]
    if not differs:
        return "without consequence", ""
    told = len(said) > 1 or (case.door != "resume" and said) or made.field.startswith(("knep.config", "overrides.txt"))
    if told:
        return "told", ""
    free = _FREE.fullmatch(made.field) or _FREE_TEXT.fullmatch(made.field)
    unguarded = case.base.name == "normalized_sgd" and made.field.startswith("state_dict.")  # any number may come of it
    placed = case.base.name == "blackbox" and made.field in _FREE_OF_BOX
    legal = made.legal or free or placed or unguarded or made.field.startswith("metrics.csv")
    return ("another run's", "") if legal else ("wrong", f"silent: {', '.join(differs)} differ")
