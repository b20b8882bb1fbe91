"""What the fuzzer throws: override lines by a grammar over the real config tree, and damaged folders."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from knep.config.catalog import GROUPS, options
from knep.config.compose import compose_config

# Small enough to run two steps; the last key of a pair wins, so a thrown line has the last word.
QUICK = (
    "recipe=none",
    "data=synthetic",
    "data.images=80",
    "data.image_size=8",
    "data.batch_size=36",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "progress=false",
    "threads=1",
)
# Fetching, compiling and starting processes take longer than two steps are worth; none of them is input to be checked.
_LEFT_OUT = ("compile", "profile", "ckpt", "allow_targets", "trainer.strategy", "trainer.num_nodes", "trainer.devices")
_LEFT_OUT += ("data.root", "trainer.max_epochs")
_SLOW = {"data": ("cifar10", "cifar100", "mnist", "svhn", "fashion_mnist"), "trainer": ("ddp", "ddp_sim", "fsdp")}
_NUMBERS = ("0", "1", "2", "-1", "0.5", "-0.5", "1e-30", "1e30", "1e308", "1e999", "inf", "-inf", "nan", "007", "1e")
_NUMBERS += (str(2**31), str(2**63), str(10**30), "-" + "9" * 40, "0x10", "1_000", "\u0663")
_WORDS = ("true", "false", "null", "''", '""', "none", "None", "fast", "\u00e9", "\u202e", "a b", "'a b'", "3 epochs")
_WORDS += ("10%", "5m", "~", "*", "../../x", "/etc/passwd", "<b>x</b>", "x" * 300, "\U0001f4a9", "\u65e5\u672c")
_SHAPES = ("[]", "[1,2]", "[[1],[2]]", "[a,b]", "{}", "{a:1}", "{a:{b:c}}", "[null]", "[true,1.5,x]")
_SHAPES += ("{_target_:os.system}",)
_SYNTAX = ("${seed}", "${nowhere}", "${oc.env:HOME}", "${optimizer}", "${", "}", "[1,", "{a:", "choice(1,2)")
_SYNTAX += ("a=b", "=")
_SYNTAX += ("range(1,3)", "glob(*)", "int(3)", "str(3)", "'unclosed", "\\", ",", "1,2", "sort(3,1)")


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a config with its value, groups too."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
    return found


def _choice(draw: random.Random) -> str:
    group = draw.choice(GROUPS[1:])
    return f"{group}={draw.choice([o for o in options(group) if o not in _SLOW.get(group, ())])}"


def _value(draw: random.Random) -> str:
    return draw.choice(draw.choice((_NUMBERS, _NUMBERS, _WORDS, _SHAPES, _SYNTAX)))


def _near(draw: random.Random, value: Any) -> str:
    """A value of the right kind, usually out of its range."""
    if isinstance(value, bool):
        return draw.choice(("true", "false", "True", "yes", "1"))
    if isinstance(value, (int, float)):
        return draw.choice((str(value), str(value * -1), str(value * 50), str(value + 1), str(value / 7), "0"))
    return _value(draw)


def _misspelt(draw: random.Random, key: str) -> str:
    at = draw.randrange(len(key))
    return draw.choice((key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], f"{key}.deeper.still", key.upper()))


def lines(draw: random.Random) -> list[str]:
    """One to four override lines: groups that exist, and keys that they have, mostly with something wrong."""
    chosen = [_choice(draw) for _ in range(draw.randrange(3))]
    try:
        known = flat(compose_config([*QUICK, *chosen]).config)
    except ValueError:
        return chosen  # two options that contradict each other: wrong enough
    keys = [k for k in known if not k.startswith(_LEFT_OUT)]
    thrown = []
    for _ in range(1 + (draw.random() < 0.3)):
        key = draw.choice(keys)
        form = draw.randrange(10)
        value = _near(draw, known[key]) if form % 2 else _value(draw)
        if form == 0:
            thrown.append(f"{_misspelt(draw, key)}={value}")
        elif form == 2:
            thrown.append(
                draw.choice((f"+{key}={value}", f"++{key}={value}", f"~{key}", f"{key}", f"+{key}.new={value}"))
            )
        elif form == 4:
            thrown.append(f"{draw.choice(GROUPS)}={value}")
        else:
            thrown.append(f"{key}={value}")
    return [*chosen, *thrown]


def _truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(min(len(content), draw.choice((1, 8, 64)))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def _noise(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.choice((0, 1, 100, 5000))))


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def _folder_instead(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _link_nowhere(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice(("nowhere", path.name, "/dev/null", "..")))


def _odd_name(path: Path, draw: random.Random) -> None:
    name = draw.choice((b"\xff\xfe", b"a\nb", "é\u202e".encode(), b" ", b".hidden", b"x" * 200)) + path.suffix.encode()
    os.rename(path, path.parent / os.fsdecode(name))


def _swap(path: Path, draw: random.Random) -> None:
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    if others:
        shutil.copyfile(draw.choice(others), path)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    _truncate,
    _flip,
    _flip,
    _noise,
    _remove,
    _folder_instead,
    _link_nowhere,
    _odd_name,
    _swap,
)


def damage(folder: Path, draw: random.Random) -> list[str]:
    """Spoils one to three files of a folder; returns what was done."""
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        if files:
            path, how = draw.choice(files), draw.choice(DAMAGES)
            how(path, draw)
            done.append(f"{how.__name__[1:]} {path.relative_to(folder)!r}")
    return done
