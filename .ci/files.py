"""Two hooks that need nothing but Python: `files.py end FILES` and `files.py large FILES` name what is wrong.

end: text that does not end with one line end. large: more than LARGEST bytes, which git would keep for ever.
"""

import sys
from pathlib import Path

LARGEST = 500 * 1024


def ends_badly(path: Path) -> bool:
    data = path.read_bytes()
    return bool(data) and (not data.endswith(b"\n") or data.endswith(b"\n\n"))


def is_large(path: Path) -> bool:
    return path.stat().st_size > LARGEST


WRONG = {"end": (ends_badly, "does not end with one line end"), "large": (is_large, f"has more than {LARGEST} bytes")}


def main(word: str, *names: str) -> int:
    wrong, why = WRONG[word]
    found = [name for name in names if Path(name).is_file() and wrong(Path(name))]
    for name in found:
        print(f"{name} {why}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
