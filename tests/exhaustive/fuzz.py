"""Random lines, keys that nobody reads, damaged folders, mutated fields of what a run leaves.

`python -m tests.exhaustive.fuzz` throws them; `--help` says how many. Each case must end in a run of two steps that is
sane, or in one line that names what was wrong, with exit code 2: no traceback, no hang over 30 s, nothing written
outside the run folder, none left behind by what was refused. A sound line whose numbers overflow all the same, such as
N(0, 1) weights in fifty layers, is stopped by the guard in one line, with a black box and exit code 1, and counted
apart. How mutated fields are judged, `fuzzing.states` says.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from knep.config.catalog import GROUPS, options
from knep.config.compose import compose_config
from knep.errors import InputError
from tests.exhaustive import formats
from tests.exhaustive.fuzzing import states as fuzz_states
from tests.exhaustive.fuzzing.arena import Outcome, run
from tests.exhaustive.fuzzing.lines import QUICK, damage, lines


@dataclass(frozen=True)
class Case:
    """name: as it is printed; prepare: fills the work folder and returns the arguments of `train.py`."""

    name: str
    prepare: Callable[[Path], list[str]]
    keys: tuple[str, ...] = ()


def train(arguments: Sequence[str]) -> None:
    from knep.cli.train import main

    main(list(arguments))


def line_cases(count: int, seed: int) -> Iterator[Case]:
    for i in range(count):
        thrown = lines(random.Random(f"{seed} line {i}"))
        arguments = [*QUICK, *thrown, "hydra.run.dir=run"]
        keys = tuple(re.split(r"[=@]", line.lstrip("+~"))[0] for line in thrown)
        yield Case(" ".join(thrown), lambda work, a=arguments: a, keys)


def write_images(root: Path) -> list[str]:
    for k, name in enumerate(("ant", "bee")):
        for part in ("train", "test"):
            (root / part / name).mkdir(parents=True)
            for i in range(8):
                suffix = ("png", "jpg", "gif", "webp")[i % 4]
                Image.new("RGB", (12, 12), (90 * k, i, 0)).save(root / part / name / f"{i}.{suffix}")
    return ["data=image_folder", "data.size=8", "data.batch_size=6", "data.workers=0"]


def write_mnist(root: Path) -> list[str]:
    return [formats.mnist(root, 60, ".gz"), "data.batch_size=25"]


def write_cifar10(root: Path) -> list[str]:
    return [formats.cifar10(root, 100), "data.batch_size=45"]


def write_cifar100(root: Path) -> list[str]:
    return [formats.cifar100(root, 200), "data.batch_size=45", "data.val_share=0.5"]


def write_svhn(root: Path) -> list[str]:
    return [formats.svhn(root, 60), "data.batch_size=25"]


def folder_cases(count: int, seed: int, finished: Path) -> Iterator[Case]:
    kinds = (write_images, write_mnist, write_cifar10, write_svhn, write_cifar100, None, None, None)
    for i in range(count):
        draw = random.Random(f"{seed} folder {i}")
        kind = kinds[i % len(kinds)]

        def prepare(
            work: Path, kind: Callable[[Path], list[str]] | None = kind, draw: random.Random = draw
        ) -> list[str]:
            if kind is None:
                shutil.copytree(finished, work / "old")
                damage(work / "old", draw)
                return ["ckpt=old", "trainer.max_epochs=2"]
            data = kind(work / "data")
            damage(work / "data", draw)
            quick = [q for q in QUICK if not q.startswith("data")]
            return [*quick, *data, f"data.root={work / 'data'}", "hydra.run.dir=run"]

        yield Case(f"{kind.__name__.removeprefix('write_') if kind else 'run'} folder {i}", prepare)


def judge(case: Case, outcome: Outcome, work: Path) -> str:
    """What is wrong with how a case ended, or ""."""
    if outcome.code is None:
        return "hangs"
    if outcome.events:
        return f"reaches out: {outcome.events[0]}"
    if stopped(outcome, work):
        return ""
    if "Traceback" in outcome.err or outcome.code not in (0, 2):
        return f"exit code {outcome.code}: {' | '.join(outcome.lines[-3:])[-300:]}"
    said = [line for line in outcome.lines if line.startswith("knep: ")]
    if outcome.code == 0:
        sane = any(work.glob("*/summary.json")) or "--" in case.name
        return "" if sane else "ends well without a summary"
    # Damaged pixels show while they are decoded, when training has begun; a config is refused before.
    if (work / "run").exists() and (case.keys or not (work / "run" / "tensorboard").exists()):
        return "leaves its run folder behind"
    if not said or outcome.lines[-1] != said[-1]:
        return f"not one line: {' | '.join(outcome.lines)[-300:]}"
    parts = {part for key in case.keys for part in (key, key.rpartition(".")[2], key.partition(".")[0]) if part}
    return "" if not parts or any(part in said[-1] for part in parts) else f"names no key: {said[-1][:200]}"


def stopped(outcome: Outcome, work: Path) -> bool:
    """Whether the guard ended a run at a step that was not finite, and left its black box."""
    said = [line for line in outcome.lines if line.startswith("knep: ")]
    one = len(said) == 1 and said[0] == outcome.lines[-1] and said[0].startswith("knep: step ")
    return outcome.code == 1 and one and "Traceback" not in outcome.err and any(work.glob("*/blackbox.pt"))


def fight(case: Case) -> tuple[str, Outcome]:
    """Runs a case in a folder of its own; what is wrong with it, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        outcome = run(train, case.prepare(work), work)
        return judge(case, outcome, work), outcome


def finished_run(folder: Path) -> Path:
    """A run to spoil, made in a child like everything else."""
    work = folder / "first"
    work.mkdir()
    outcome = run(train, [*QUICK, "hydra.run.dir=run"], work)
    assert outcome.code == 0, outcome.err
    return work / "run"


def warm() -> None:
    """Imports and composes once, so that each child need not."""
    import knep.engine.fit
    import knep.run.report
    from knep.engine.sanity_check import rehearse

    assert knep.engine.fit
    assert knep.run.report
    rehearse(compose_config(list(QUICK)).run)


def states(root: Path, count: int, seed: int, verbose: bool) -> Counter[str]:
    """Mutates so many fields of what runs of many options leave; returns how often which end was met."""
    fuzz_states.warm()
    ends: Counter[str] = Counter()
    for case in fuzz_states.cases(fuzz_states.make_bases(root, list(fuzz_states.BASES)), count, seed):
        wrong, end, name = fuzz_states.fight(case, root)
        ends[f"states: {end}"] += 1
        if not ends.total() % 100:
            print(_told(ends), file=sys.stderr, flush=True)
        if wrong or verbose:
            print(f"{name}\n    {wrong or end}", flush=True)
    return ends


def key_lines(each: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """(choice, line, key) for so many invented keys of every option of every group, and of every group of settings."""
    letters = "abcdefghijklmnopqrstuvwxyz_0123456789"
    draw = random.Random(f"{seed} keys")

    def invented() -> str:
        return draw.choice(letters[:26]) + "".join(draw.choices(letters, k=draw.randint(2, 11)))

    for group in [*sorted(set(GROUPS) - {"recipe"}), "trainer", ""]:
        for option in options(group) if group in GROUPS else [""]:
            for _ in range(each):
                key = f"{group}.{invented()}".strip(".")
                sign, value = draw.choice(("+", "++", "")), draw.choice(("1", "true", "[1,2]", "abc", "{a:1}", "null"))
                yield f"{group}={option}" if option else "", f"{sign}{key}={value}", key


# Callbacks are the user's own: there alone a target is the line to write.
_LEADS_ASTRAY = re.compile(r"\b(?<!callbacks\.)\w+\._(target|partial)_")


def keys(each: int, seed: int, verbose: bool) -> Counter[str]:
    """Whether a key that no code reads is refused in one line which names it, without a word of targets."""
    ends: Counter[str] = Counter()
    for choice, line, key in key_lines(each, seed):
        end, said = "refused", ""
        try:
            compose_config([word for word in (choice, line) if word])
            end = "wrong: taken"
        except InputError as error:
            said = str(error)
            if "\n" in said or key.rpartition(".")[2] not in said or _LEADS_ASTRAY.search(said):
                end = "wrong: says something else"
        except Exception as error:  # whatever comes is what is sought
            end, said = "wrong: a traceback", repr(error)
        ends[f"keys: {end}"] += 1
        if end != "refused" or verbose:
            print(f"{choice} {line}\n    {end}: {said[:300]}", flush=True)
    return ends


_END = {0: "ran", 1: "stopped by the guard", 2: "refused", None: "wrong"}


def _told(ends: Counter[str]) -> str:
    return ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--keys", type=int, default=20, help="invented keys of every option")
    parser.add_argument("--folders", type=int, default=500)
    parser.add_argument("--states", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every case with its end")
    args = parser.parse_args()
    warm()
    ends = keys(args.keys, args.seed, args.verbose)
    with tempfile.TemporaryDirectory() as folder:
        first = finished_run(Path(folder))
        for kind, cases in (
            ("lines", line_cases(args.lines, args.seed)),
            ("folders", folder_cases(args.folders, args.seed, first)),
        ):
            for case in cases:
                wrong, outcome = fight(case)
                ends[f"{kind}: {'wrong' if wrong else _END[outcome.code]}"] += 1
                if not ends.total() % 100:
                    print(_told(ends), file=sys.stderr, flush=True)
                if wrong or args.verbose:
                    print(f"{case.name}\n    {wrong or outcome.err.strip()[-300:]}", flush=True)
        if args.states:
            ends += states(Path(folder) / "states", args.states, args.seed, args.verbose)
    print(_told(ends))
    raise SystemExit(any("wrong" in end for end in ends))


if __name__ == "__main__":
    main()
